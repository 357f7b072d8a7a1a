"""Strips of images that show noise being added to an image, or an image emerging from noise during sampling.

Axes: picture, channels, height, width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from keifu.data.images.io import to_bytes, to_signed
from keifu.generation.images.pixel_diffusion import SeededNoise
from keifu.generation.images.samplers import SamplerStep
from keifu.layers.diffusion.noise_schedule import Noise, add_noise


class Strip(NamedTuple):
    """Pictures and a caption for each, for a sheet of one row or two."""

    pictures: UInt8[Tensor, "picture channels height width"]
    captions: list[str]
    columns: int


def noising_strip(
    picture: UInt8[Tensor, "channels height width"], noise: Noise, count: int = 8, seed: int = 0
) -> Strip:
    """A picture at evenly spaced timesteps, from itself to the last, with the same noise growing on it."""
    clean = to_signed(picture)[None].expand(count, -1, -1, -1)
    added = SeededNoise([seed])(clean[:1]).expand_as(clean)
    timestep = torch.linspace(0, noise.steps - 1, count).round().long()
    noisy = torch.cat([clean[:1], add_noise(clean, added, noise.alpha_bar, timestep)[1:]])
    return Strip(to_bytes(noisy), ["picture", *(f"t = {t}" for t in timestep[1:].tolist())], count)


def denoising_strip(states: Sequence[SamplerStep], place: int = 0, count: int = 8) -> Strip:
    """One picture's way out of noise, evenly spaced: x above, and below it the picture that the network saw in it."""
    steps = torch.linspace(0, len(states) - 1, min(count, len(states))).round().long().tolist()
    chosen = [states[step] for step in steps]
    rows: list[Float[Tensor, "picture channels height width"]] = [
        torch.stack([state.x[place] for state in chosen]),
        torch.stack([state.picture[place] for state in chosen]),
    ]
    captions = [f"{name}, step {step + 1}" for name in ("x", "seen") for step in steps]
    return Strip(to_bytes(torch.cat(rows)).cpu(), captions, len(steps))

"""A drawing that begins with a picture in place of noise alone, or keeps what a mask leaves of one; knows no network
and no sampler.

The picture with the noise of some level is where the sampler sets out (SDEdit; Meng et al., 2021). What the mask leaves
is put back, with the same noise, before the network looks again (Lugmayr et al., 2022, equation 8a). Axes: batch,
`*shape` = what the network sees of a picture.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keifu.errors import UserError
from keifu.generation.denoiser import Denoiser, Network
from keifu.generation.sampler_table import Route
from keifu.generation.samplers import Drawn, Random
from keifu.layers.noise import Noise
from keifu.layers.noise_levels import CLEAN, Level, Path


class Kept(NamedTuple):
    """A picture, the noise that the drawing began with, and where it is drawn anew: all else is kept."""

    picture: Float[Tensor, "batch *shape"]
    noise: Float[Tensor, "batch *shape"]
    anew: Bool[Tensor, "..."]

    def put_back(self, x: Float[Tensor, "batch *shape"], level: Level) -> Float[Tensor, "batch *shape"]:
        """x, and where nothing is drawn anew the picture with its noise at this level."""
        return torch.where(self.anew, x, level.alpha * self.picture + level.sigma * self.noise)


class Keeping(Denoiser):
    """A denoiser whose network sees what is kept as it is at each level, but for the first one, `start`.

    Samplers move each number of x by itself, so what they carry where a picture is kept reaches nothing else.
    """

    def __init__(self, network: Network, noise: Noise, clip: bool, threshold: bool, kept: Kept, start: Level):
        super().__init__(network, noise, clip, threshold)
        self.kept, self.start = kept, start

    def output(self, x: Float[Tensor, "batch *shape"], level: Level) -> Tensor:
        """What the network says of x with the kept parts put back."""
        return super().output(x if level == self.start else self.kept.put_back(x, level), level)


def shortened(path: Path, strength: float) -> Path:
    """The last steps of a path, as large a share of them as the strength says, rounded down; none is a `UserError`."""
    steps = len(path.strides)
    taken = int(steps * strength)
    if not taken:
        raise UserError(
            f"A strength of {strength:g} leaves none of {steps} steps: take more steps, or a strength of at least "
            f"{1 / steps:.2g}."
        )
    return path._replace(strides=path.strides[steps - taken :])


def noisy(picture: Float[Tensor, "batch *shape"], noise: Tensor, path: Path) -> Float[Tensor, "batch *shape"]:
    """The picture at the level where a path begins."""
    level = path.strides[0].here
    return level.alpha * picture + level.sigma * noise


def walked(
    chosen: Route, network: Network, x: Tensor, path: Path, random: Random, kept: Kept | None = None
) -> Iterator[Drawn]:
    """Where the sampler stands after each step of this path from x, with what is kept in its place."""
    if kept is None:
        yield from chosen.walk(chosen.denoiser(network), x, path, random)
        return
    denoiser = chosen.denoiser(network, partial(Keeping, kept=kept, start=path.strides[0].here))
    levels = [*(stride.here for stride in path.strides[1:]), CLEAN]
    for state, level in zip(chosen.walk(denoiser, x, path, random), levels, strict=True):
        yield Drawn(kept.put_back(state.x, level), kept.put_back(state.picture, CLEAN))

"""A drawing that begins with a picture in place of noise alone, or keeps what a mask leaves of one; knows no network
and no sampler.

The picture with the noise of some level is where the sampler sets out (SDEdit; Meng et al., 2021). What the mask leaves
is put back, with the same noise, before the network looks again (Lugmayr et al., 2022, equation 8a). Axes: batch,
`*shape` = what the network sees of a picture.

Picture files that a drawing begins with or is guided by: known by a digest, read in the drawing's size; knows no
network.

Axes: channels, height, width.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from keifu.data.images.io import fit_image, read_image, to_signed
from keifu.errors import UserError
from keifu.generation.images.denoiser import Denoiser, Network
from keifu.generation.images.samplers import Random, SamplerRoute, SamplerStep
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.diffusion.sampling_schedule import CLEAN, Level, SamplingPath


class KeptRegion(NamedTuple):
    """A picture, the noise that the drawing began with, and where it is drawn anew: all else is kept."""

    picture: Float[Tensor, "batch *shape"]
    noise: Float[Tensor, "batch *shape"]
    anew: Bool[Tensor, "..."]

    def put_back(self, x: Float[Tensor, "batch *shape"], level: Level) -> Float[Tensor, "batch *shape"]:
        """x, and where nothing is drawn anew the picture with its noise at this level."""
        return torch.where(self.anew, x, level.alpha * self.picture + level.sigma * self.noise)


class Inpainting(Denoiser):
    """A denoiser whose network sees what is kept as it is at each level, but for the first one, `start`.

    Samplers move each number of x by itself, so what they carry where a picture is kept reaches nothing else.
    """

    def __init__(self, network: Network, noise: Noise, clip: bool, threshold: bool, kept: KeptRegion, start: Level):
        super().__init__(network, noise, clip, threshold)
        self.kept, self.start = kept, start

    def output(self, x: Float[Tensor, "batch *shape"], level: Level) -> Tensor:
        """What the network says of x with the kept parts put back."""
        return super().output(x if level == self.start else self.kept.put_back(x, level), level)


def truncate_path(path: SamplingPath, strength: float) -> SamplingPath:
    """The last steps of a path, as large a share of them as the strength says, rounded down; none is a `UserError`."""
    steps = len(path.strides)
    taken = int(steps * strength)
    if not taken:
        raise UserError(
            f"A strength of {strength:g} leaves none of {steps} steps: take more steps, or a strength of at least "
            f"{1 / steps:.2g}."
        )
    return path._replace(strides=path.strides[steps - taken :])


def add_initial_noise(
    picture: Float[Tensor, "batch *shape"], noise: Tensor, path: SamplingPath
) -> Float[Tensor, "batch *shape"]:
    """The picture at the level where a path begins."""
    level = path.strides[0].here
    return level.alpha * picture + level.sigma * noise


def run_inpainting(
    chosen: SamplerRoute,
    network: Network,
    x: Tensor,
    path: SamplingPath,
    random: Random,
    kept: KeptRegion | None = None,
) -> Iterator[SamplerStep]:
    """Where the sampler stands after each step of this path from x, with what is kept in its place."""
    if kept is None:
        yield from chosen.walk(chosen.denoiser(network), x, path, random)
        return
    denoiser = chosen.denoiser(network, partial(Inpainting, kept=kept, start=path.strides[0].here))
    levels = [*(stride.here for stride in path.strides[1:]), CLEAN]
    for state, level in zip(chosen.walk(denoiser, x, path, random), levels, strict=True):
        yield SamplerStep(kept.put_back(state.x, level), kept.put_back(state.picture, CLEAN))


WHITE_FROM = 128  # of 255


@dataclass(frozen=True)
class InputImage:
    """A picture file: where it is, and the SHA-256 of its bytes, so that another in its place is not taken for it."""

    place: str
    digest: str

    def image(self) -> Image.Image:
        """The picture, upright and without transparency; one that changed since is a `UserError`."""
        if read_input_image(self.place).digest != self.digest:
            raise UserError(f"{self.place} is not the file that it was: its digest was {self.digest[:12]}.")
        return read_image(Path(self.place)).image

    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        width, height = self.image().size
        return height, width

    def pixels(self, size: tuple[int, int], channels: int) -> Float[Tensor, "channels height width"]:
        """Numbers from -1 to 1, the middle of it scaled to this size where it has another."""
        held = fit_image(self.image(), size, channels)
        return to_signed(torch.from_numpy(held.copy()).permute(2, 0, 1))

    def white(self, size: tuple[int, int]) -> Bool[Tensor, "1 height width"]:
        """Where it is rather white than black, scaled in the same way."""
        held = fit_image(self.image(), size, 1)
        return torch.from_numpy(held.copy()).permute(2, 0, 1) >= WHITE_FROM


def read_input_image(path: str | Path) -> InputImage:
    """The picture at this place as it is now; where there is none, a `UserError`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no picture {path}.")
    return InputImage(str(path.resolve()), digest_of(path))


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()

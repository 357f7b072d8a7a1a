"""Image-to-image (SDEdit) and inpainting: sampling starts from a noised image, and keeps the region outside the mask.

SDEdit (Meng et al., 2021) starts the sampler from the image with noise of an intermediate level. Inpainting restores
the kept region, with the same noise, before every evaluation of the network (Lugmayr et al., 2022, equation 8a). Input
image files are identified by a digest and scaled to the size of the output. Axes: batch, `*shape` = of the network's
input; channels, height, width of an image file.
"""

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
from keifu.files import sha256
from keifu.inference.images.denoiser import Denoiser, Network, Sample
from keifu.inference.images.samplers import ConfiguredSampler, Random, SamplerStep
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.diffusion.sampling_schedule import CLEAN, Level, Schedule


class KeptRegion(NamedTuple):
    """Image, initial noise, and mask of the part to generate. The other part is kept."""

    picture: Sample
    noise: Sample
    anew: Bool[Tensor, "..."]

    def put_back(self, x: Sample, level: Level) -> Sample:
        """Return x with the image, noised to this level, in the kept region."""
        return torch.where(self.anew, x, level.alpha * self.picture + level.sigma * self.noise)


class Inpainting(Denoiser):
    """Denoiser whose network gets the kept region noised to the level of x, except at the first level, `start`.

    Samplers update each number of x separately, so their values in the kept region affect nothing else.
    """

    def __init__(self, network: Network, noise: Noise, clip: bool, threshold: bool, region: KeptRegion, start: Level):
        super().__init__(network, noise, clip, threshold)
        self.region, self.start = region, start

    def output(self, x: Sample, level: Level) -> Tensor:
        """Compute the network's output for x after restoring the kept region."""
        return super().output(x if level == self.start else self.region.put_back(x, level), level)


def add_initial_noise(picture: Sample, noise: Tensor, schedule: Schedule) -> Sample:
    """Add noise to the image, at the first level of a schedule."""
    level = schedule.steps[0].level
    return level.alpha * picture + level.sigma * noise


def run_inpainting(
    sampler: ConfiguredSampler,
    network: Network,
    x: Tensor,
    schedule: Schedule,
    random: Random,
    region: KeptRegion | None,
) -> Iterator[SamplerStep]:
    """Run the sampler from x along this schedule with the kept region restored. Yield the state after each step."""
    if region is None:
        yield from sampler.run(sampler.denoiser(network), x, schedule, random)
        return
    denoiser = sampler.denoiser(network, partial(Inpainting, region=region, start=schedule.steps[0].level))
    levels = [*(step.level for step in schedule.steps[1:]), CLEAN]
    for state, level in zip(sampler.run(denoiser, x, schedule, random), levels, strict=True):
        yield SamplerStep(region.put_back(state.x, level), region.put_back(state.picture, CLEAN))


WHITE_FROM = 128  # of 255; lighter mask pixels count as white


@dataclass(frozen=True)
class InputImage:
    """Image file: its path, and the SHA-256 of its bytes, which shows whether the file has changed."""

    place: str
    digest: str

    def image(self) -> Image.Image:
        """Return the image, upright and without transparency. Raises `UserError` if the file has changed."""
        if read_input_image(self.place).digest != self.digest:
            raise UserError(f"{self.place} is not the file that it was: its digest was {self.digest[:12]}.")
        return read_image(Path(self.place)).image

    def size(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        width, height = self.image().size
        return height, width

    def pixels(self, size: tuple[int, int], channels: int) -> Float[Tensor, "channels height width"]:
        """Return the pixels from -1 to 1, scaled and centre-cropped to this size."""
        fitted = fit_image(self.image(), size, channels)
        return to_signed(torch.from_numpy(fitted.copy()).permute(2, 0, 1))

    def white(self, size: tuple[int, int]) -> Bool[Tensor, "1 height width"]:
        """Return the mask of pixels lighter than middle grey, scaled and cropped in the same way."""
        fitted = fit_image(self.image(), size, 1)
        return torch.from_numpy(fitted.copy()).permute(2, 0, 1) >= WHITE_FROM


def read_input_image(path: str | Path) -> InputImage:
    """Return the image file at this path. Raises `UserError` if it is missing."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no picture {path}.")
    return InputImage(str(path.resolve()), sha256(path))

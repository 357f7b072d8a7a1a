"""Image preprocessing of published networks, bit for bit: resize, centre crop, normalise.

The results equal those of transformers' CLIPImageProcessor and Idefics3ImageProcessor with Pillow. Pillow resizes to
whole bytes. A byte is multiplied by 1/255 in float64, rounded to float32, reduced by the mean and divided by the
standard deviation. OpenAI's code divides by 255 in float32 and rounds halves differently when it crops, so it can
differ in the last bit or by one pixel.

Axes: picture, channels, rows, columns.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor

from keifu.errors import UserError

LARGEST_RATIO = 200  # maximal ratio of a picture's sides
FILTERS = {filter.name.lower(): filter for filter in Image.Resampling}


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Normalisation of pixels. `mean` and `std` have one number for each channel: 3 (red, green, blue) or 1 (grey)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalised(
        self, pixels: UInt8[Tensor, "picture channels rows columns"]
    ) -> Float32[Tensor, "picture channels rows columns"]:
        """Return the pixels normalised, on their device."""
        table, values = self._table.to(pixels.device), pixels.int()
        return torch.stack([table[channel][values[:, channel]] for channel in range(len(table))], 1)

    @cached_property
    def _table(self) -> Float32[Tensor, "channels bytes"]:
        """Normalised value of each byte in each channel."""
        values = (np.arange(256, dtype=np.float64) * 0.00392156862745098).astype(np.float32)
        mean, std = (np.array(values, np.float32)[:, None] for values in (self.mean, self.std))
        return torch.from_numpy((values - mean) / std)


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Normalisation):
    """Resizing, cropping and normalisation of pictures.

    The shorter side is resized to `size` pixels by the filter `resample` (with `squash`, both sides). The middle,
    `crop` x `crop`, is kept; outside the picture it is black.
    """

    size: int
    crop: int
    resample: str
    squash: bool

    def cut(self, image: Image.Image) -> UInt8[Tensor, "channels crop crop"]:
        """Resize and crop one picture to bytes. `keifu.data.images.io` has already handled transparency and 16 bits.

        Raises `UserError` if one side is more than 200 times the other: resized, the picture could fill the memory.
        """
        if max(image.size) > LARGEST_RATIO * min(image.size):
            raise UserError(f"A picture has {image.width:,} x {image.height:,} pixels, one side much longer: cut it.")
        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        width, height = self._resized(*image.size)
        if image.size != (width, height):
            image = image.resize((width, height), FILTERS[self.resample])
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        pixels = np.array(image.crop((left, top, left + self.crop, top + self.crop)))
        return torch.from_numpy(pixels.reshape(self.crop, self.crop, -1).transpose(2, 0, 1).copy())

    def tiles(self, image: Image.Image) -> UInt8[Tensor, "1 channels crop crop"]:
        """Return one picture as its only tile."""
        return self.cut(image)[None]

    def __call__(self, images: Sequence[Image.Image]) -> Float32[Tensor, "picture channels crop crop"]:
        """Preprocess several pictures in parallel."""
        if not images:
            raise UserError("There is no picture: give at least one.")
        with ThreadPoolExecutor(torch.get_num_threads()) as workers:
            return self.normalised(torch.stack(list(workers.map(self.cut, images))))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after resizing. The longer side is rounded down."""
        short, long = min(width, height), max(width, height)
        longer = self.size if self.squash else int(self.size * long / short)
        return (self.size, longer) if width <= height else (longer, self.size)


@dataclass(frozen=True, kw_only=True)
class TiledPreprocessing(Normalisation):
    """Splitting of pictures into tiles (Idefics3; Laurençon et al., 2024), and normalisation.

    The longer side is resized to `longest` pixels by the filter `resample`; then both sides are rounded to multiples of
    `tile`. If a picture has several tiles, the last tile is the whole picture at `tile` x `tile`. Without `split`, it
    is the only tile.
    """

    longest: int
    tile: int
    split: bool
    resample: str

    def grid(self, image: Image.Image) -> tuple[int, int]:
        """Return the numbers of rows and columns of tiles before the tile of the whole picture; (0, 0) if it is the
        only tile."""
        width, height = self._sizes(image)[1]
        return (0, 0) if width == height == self.tile else (height // self.tile, width // self.tile)

    def tiles(self, image: Image.Image) -> UInt8[Tensor, "tiles channels tile tile"]:
        """Return the tiles of one picture as bytes, row by row. `keifu.data.images.io` has already handled transparency
        and 16 bits."""
        (rows, columns), resized_image = self.grid(image), image.convert("RGB")
        for size in self._sizes(image):
            resized_image = resized_image.resize(size, FILTERS[self.resample])
        overview = torch.from_numpy(
            np.array(resized_image.resize((self.tile, self.tile), FILTERS[self.resample]))
        ).permute(2, 0, 1)
        if not rows:
            return overview[None]
        pixels = (
            torch.from_numpy(np.array(resized_image)).unflatten(0, (rows, self.tile)).unflatten(2, (columns, self.tile))
        )
        return torch.cat([pixels.permute(0, 2, 4, 1, 3).flatten(0, 1), overview[None]])

    def _sizes(self, image: Image.Image) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return width and height after each of the two resizing steps. The shorter side is even after the first."""
        short = _follow(self.longest, *image.size)
        short = max(1, short + short % 2)
        first = (self.longest, short) if image.width >= image.height else (short, self.longest)
        if not self.split:
            return first, (self.tile, self.tile)
        long = self._multiple(max(first))
        short = self._multiple(max(1, _follow(long, *first)))
        return first, (long, short) if first[0] >= first[1] else (short, long)

    def _multiple(self, pixels: int) -> int:
        return -(-pixels // self.tile) * self.tile


def _follow(long: int, width: int, height: int) -> int:
    """Return the shorter side, rounded down, of a picture whose longer side becomes `long`."""
    return int(long / (width / height)) if width >= height else int(long * (width / height))

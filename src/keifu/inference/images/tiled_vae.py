"""Tiled autoencoder (VAE): images to latents and back, in tiles for large images, in float32 if half precision fails.

A whole image needs the memory of its largest layer; with tiles, that of one tile and of the image. All tiles have the
requested size; they are evenly spaced and overlap. In an overlap each tile is weighted by the distance to its edge, so
that no seam is visible. (diffusers cuts at fixed distances, so its last tiles are smaller and have little context.)
Axes: batch, channels, height, width of latents; colours, rows, columns of images.
"""

import math
import sys
from collections.abc import Callable
from itertools import product
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.errors import UserError

Place: TypeAlias = tuple[slice, slice]  # rows and columns, in cells
Pixels = Float[Tensor, "batch channels height width"]


def decode_tiled(
    work: Callable[[Pixels, Place], Tensor], x: Pixels, side: int, overlap: int, cell: int = 1, result_cell: int = 1
) -> Float[Tensor, "made_batch made_channels made_height made_width"]:
    """Compute `work(tile, position)` for overlapping tiles of x, and blend the results into one tensor.

    side, overlap: size of tiles and minimal overlap in cells. cell, result_cell: side of a cell in x and in the result.
    """
    rows, columns = (tile_starts(length // cell, side, overlap) for length in x.shape[2:])
    canvas = total = None
    for top, left in product(rows, columns):
        area = slice(top, top + side), slice(left, left + side)
        piece = work(x[(..., *(grow_tile(axis, cell) for axis in area))], area)
        weight = blend_weights(piece.shape[2])[:, None] * blend_weights(piece.shape[3])
        if canvas is None or total is None:
            size = [length // cell * result_cell for length in x.shape[2:]]
            canvas, total = piece.new_zeros(*piece.shape[:2], *size), weight.new_zeros(size)
        there = (..., *(grow_tile(axis, result_cell) for axis in area))
        canvas[there] += piece * weight.to(piece)
        total[there] += weight
    assert canvas is not None and total is not None
    return canvas.div_(total.to(canvas))


def tile_starts(length: int, side: int, overlap: int) -> list[int]:
    """Return the starts of tiles that cover `length` with an overlap of at least `overlap`. One tile has the start
    0."""
    if length <= side:
        return [0]
    count = math.ceil((length - overlap) / (side - overlap))
    return [round(number * (length - side) / (count - 1)) for number in range(count)]


def grow_tile(cells: slice, size: int) -> slice:
    """Convert a range of cells to a range of numbers. size: numbers in a cell."""
    return slice(cells.start * size, cells.stop * size)


def blend_weights(length: int) -> Float[Tensor, " length"]:
    """Return each position's distance to the nearer end: 1, 2, ..., 2, 1."""
    ramp = torch.arange(1.0, length + 1, dtype=torch.float32, device="cpu")
    return torch.minimum(ramp, ramp.flip(0))


WHOLE = 1024 * 1024  # larger pictures, in pixels, are tiled by default
TILE = 512
NO_TILES = "Tiles are for pictures made of latents, and this model draws pixels: leave --tile out."
Latents = Float[Tensor, "batch channels height width"]
Pictures = Float[Tensor, "batch colours rows columns"]


class LatentCodec:
    """Encoder and decoder of an `ImageModel` with one latent for each `factor` pixels of a side. tile: side of tiles in
    pixels; 0 for none."""

    def __init__(self, model: Any, factor: int, tile: int):
        self.model, self.factor, self.side = model, factor, tile // factor

    @torch.inference_mode()
    def pictures(self, latents: Latents) -> Pictures:
        """Decode latents to pictures of about -1 to 1, one by one, because a large one takes much memory."""
        return torch.cat([self._sure(lambda x=latent: self._picture(x)) for latent in latents.split(1)])

    @torch.inference_mode()
    def latents(self, picture: Float[Tensor, "1 colours rows columns"], noise: Latents) -> Latents:
        """Encode one picture; return a sample of its latents for each row of standard normal noise."""

        def coded() -> Tensor:
            if not self._tiles(noise):
                return self.model.to_latents(picture, noise)
            return decode_tiled(
                lambda piece, area: self.model.to_latents(piece, noise[(..., *area)]),
                picture, self.side, self.side // 4, cell=self.factor,
            )  # fmt: skip

        return self._sure(coded)

    def _picture(self, latents: Latents) -> Pictures:
        if not self._tiles(latents):
            return self.model.to_pictures(latents)
        return decode_tiled(
            lambda piece, area: self.model.to_pictures(piece),
            latents,
            self.side,
            self.side // 4,
            result_cell=self.factor,
        )

    def _tiles(self, latents: Latents) -> bool:
        return self.model.autoencoder is not None and 0 < self.side < max(latents.shape[2:])

    def _sure(self, work: Callable[[], Tensor]) -> Tensor:
        """Return the result of `work`. If it is not finite in half precision, convert the autoencoder to float32 and
        repeat: Stable Diffusion's has values beyond float16."""
        result, inner = work(), self.model.autoencoder
        if inner is None or bool(result.isfinite().all()):
            return result
        dtype = next(inner.parameters()).dtype
        if dtype.itemsize > 2:
            return result
        name = str(dtype).removeprefix("torch.")
        print(f"The autoencoder has numbers that are not finite in {name}: it goes on in float32.", file=sys.stderr)
        inner.float()
        return work()


def tile_of(tile: int | None, size: tuple[int, int], factor: int) -> int:
    """Return the side of tiles for pictures of this height and width: `tile`; by default `TILE` for more than `WHOLE`
    pixels, else 0. Raises `UserError` for an impossible side."""
    if factor == 1:
        if tile:
            raise UserError(NO_TILES)
        return 0
    if tile is None:
        return TILE // factor * factor if size[0] * size[1] > WHOLE else 0
    if tile and (tile % factor or tile < 4 * factor):
        near = max(4, round(tile / factor)) * factor
        raise UserError(f"Tiles need sides of {factor} x 4, 5, ... pixels, not {tile}: take {near}, or 0 for none.")
    return tile

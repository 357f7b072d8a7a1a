"""Work on a large picture piece by piece, so that memory is bounded by a piece's; knows no network.

Pieces are all as large as asked for, lie evenly and overlap; where they do, each counts the more the farther its own
edge is away, so that no seam has a step. (diffusers cuts at fixed distances, and the last pieces, of whatever is left,
see little around them.) Axes: batch, channels, height, width.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Place: TypeAlias = tuple[slice, slice]  # rows and columns, in cells
Pixels = Float[Tensor, "batch channels height width"]


def tiled(
    work: Callable[[Pixels, Place], Tensor], x: Pixels, side: int, overlap: int, cell: int = 1, made: int = 1
) -> Float[Tensor, "made_batch made_channels made_height made_width"]:
    """What `work` makes of each piece and its place, blended where pieces overlap.

    side, overlap: of pieces, at least, in cells: `cell` numbers of x, of which `made` numbers come out.
    """
    rows, columns = (starts(length // cell, side, overlap) for length in x.shape[2:])
    canvas = total = None
    for top, left in product(rows, columns):
        place = slice(top, top + side), slice(left, left + side)
        piece = work(x[(..., *(grown(each, cell) for each in place))], place)
        weight = tent(piece.shape[2])[:, None] * tent(piece.shape[3])
        if canvas is None or total is None:
            size = [length // cell * made for length in x.shape[2:]]
            canvas, total = piece.new_zeros(*piece.shape[:2], *size), torch.zeros(size)
        there = (..., *(grown(each, made) for each in place))
        canvas[there] += piece * weight.to(piece)
        total[there] += weight
    assert canvas is not None and total is not None
    return canvas.div_(total.to(canvas))


def starts(length: int, side: int, overlap: int) -> list[int]:
    """Where pieces of this side begin that cover a length and overlap by so much at least; one where they are not
    needed."""
    if length <= side:
        return [0]
    count = math.ceil((length - overlap) / (side - overlap))
    return [round(number * (length - side) / (count - 1)) for number in range(count)]


def grown(cells: slice, size: int) -> slice:
    """A range of cells as one of their numbers."""
    return slice(cells.start * size, cells.stop * size)


def tent(length: int) -> Float[Tensor, " length"]:
    """How far each number is from the nearer end: 1, 2, ..., 2, 1."""
    ramp = torch.arange(1.0, length + 1)
    return torch.minimum(ramp, ramp.flip(0))

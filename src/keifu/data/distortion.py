"""Small random distortions of pictures that leave their meaning; knows no model and no file.

Axes: rows = pictures, height, width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor


@dataclass(frozen=True)
class Distortion:
    """How far pictures are moved, turned, sized and bent: each is the largest change, for `bend` the usual one."""

    shift: float = 1.5  # pixels, along each axis
    turn: float = 12.0  # degrees
    zoom: float = 0.12  # share of the size
    shear: float = 0.2  # pixels sideways for each pixel down
    bend: float = 0.8  # pixels: standard deviation of a smooth field (elastic distortion: Simard et al., 2003)
    cells: int = 5  # of that field along each axis: fewer is smoother

    def __call__(
        self, pictures: Float[Tensor, "rows height width"], generator: Generator
    ) -> Float[Tensor, "rows height width"]:
        """Each picture distorted by numbers of its own, drawn from the generator; what comes from outside is zero."""
        rows, height, width = pictures.shape
        grid = F.affine_grid(self._affine(rows, width, generator), [rows, 1, height, width], align_corners=False)
        field = torch.randn(rows, 2, self.cells, self.cells, generator=generator) * (2 * self.bend / width)
        field = F.interpolate(field, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        return F.grid_sample(pictures[:, None], grid + field, align_corners=False)[:, 0]

    def _affine(self, rows: int, width: int, generator: Generator) -> Float[Tensor, "rows 2 3"]:
        """Rotation, zoom, shear and shift in one matrix a picture, in units of half its width."""
        turn, zoom, shear, *shift = 2 * torch.rand(5, rows, generator=generator) - 1
        angle, size = turn * self.turn * math.pi / 180, (zoom * math.log1p(self.zoom)).exp()
        cos, sin, lean = size * angle.cos(), size * angle.sin(), shear * self.shear
        x, y = (2 * self.shift / width * each for each in shift)
        return torch.stack([cos, lean * cos - sin, x, sin, lean * sin + cos, y], 1).view(rows, 2, 3)

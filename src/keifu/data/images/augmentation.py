"""Random image augmentation: flips, shifts, rotation and colour by a hash of seed, step and index; and elastic
distortion.

Axes: picture, channels, height, width.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Generator, Tensor

from keifu.errors import UserError
from keifu.ranges import Natural, NotNegative

STEP = np.uint64(0x9E3779B97F4A7C15)
LUMINANCE = 0.299, 0.587, 0.114  # luminance weights of red, green and blue (ITU-R BT.601)
Bytes = UInt8[Tensor, "picture channels height width"]
Grey = Float[Tensor, "rows height width"]
Values = Float[Tensor, "picture channels height width"]


@dataclass(frozen=True)
class Augmentation:
    """The strength of each augmentation; by default none."""

    flip: bool = False
    """Mirror every second one from left to right; not for letters and digits."""
    shift: Natural = 0
    """Move by at most this number of whole pixels in each direction; the edge is repeated."""
    crop: NotNegative = 0.0
    """Cut away at most this share of each side, and enlarge what is left."""
    rotation: NotNegative = 0.0
    """Largest rotation in degrees, to either side."""
    brightness: NotNegative = 0.0
    """Add or take away at most this share of white."""
    contrast: NotNegative = 0.0
    """Stretch or shrink differences from the picture's mean by at most this share."""
    saturation: NotNegative = 0.0
    """The same for differences from grey; pictures that are grey stay as they are."""

    def __post_init__(self) -> None:
        limits = {"shift": math.inf, "rotation": 180.0}
        for field in fields(self):
            value, top = vars(self)[field.name], limits.get(field.name, 1.0)
            if not 0 <= value <= top:
                raise UserError(f"augmentation's {field.name} is {value}, but it must be from 0 to {top:g}.")
        if self.crop == 1:
            raise UserError("augmentation's crop is 1.0, which would leave nothing: it must be below 1.")

    def __call__(self, pictures: Bytes, seed: int, step: int, indices: np.ndarray) -> Bytes:
        """Augment pictures. The changes of a picture depend only on the seed, the step and the picture's index."""
        if self == Augmentation():
            return pictures
        chance = torch.from_numpy(uniform(seed, step, indices, 10).T.copy()).float()
        values = pictures.float()
        if self.flip or self.shift or self.crop or self.rotation:
            values = self._move(values, chance)
        if self.brightness or self.contrast or self.saturation:
            values = self._recolour(values, chance)
        return values.round().clamp(0, 255).to(torch.uint8)

    def _move(self, values: Values, chance: Float[Tensor, "10 picture"]) -> Values:
        """Apply all geometric changes by one resampling: an affine map from output positions to input positions."""
        height, width = values.shape[2:]
        sign = torch.where(chance[0] < 0.5, -1.0, 1.0) if self.flip else torch.ones(len(values))
        scale = 1 - self.crop * chance[1]
        angle = math.radians(self.rotation) * (2 * chance[2] - 1)
        whole_pixels = ((2 * self.shift + 1) * chance[3:5]).floor().clamp(max=2 * self.shift) - self.shift
        moved = 2 * whole_pixels / torch.tensor([[width], [height]]) + (1 - scale) * (2 * chance[5:7] - 1) * (
            self.crop > 0
        )
        # Positions are in [-1, 1] on both axes, so a rotation must use the picture's proportions.
        across, down = scale * angle.cos(), scale * angle.sin()
        rows = [
            torch.stack([sign * across, -down * height / width, moved[0]], 1),
            torch.stack([sign * down * width / height, across, moved[1]], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), list(values.shape), align_corners=False)
        return F.grid_sample(values, grid, "bilinear", "border", align_corners=False)

    def _recolour(self, values: Values, chance: Float[Tensor, "10 picture"]) -> Values:
        signed = (2 * chance[7:] - 1)[..., None, None, None]
        values = values + 255 * self.brightness * signed[0]
        mean = values.mean((1, 2, 3), keepdim=True)
        values = mean + (values - mean) * (1 + self.contrast * signed[1])
        if values.shape[1] == 3:
            grey = (values * torch.tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True)
            values = grey + (values - grey) * (1 + self.saturation * signed[2])
        return values


def uniform(seed: int, step: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Return float64 numbers in [0, 1), [index, count]: SplitMix64 (Steele, Lea and Flood, 2014) keyed by seed, step
    and index."""
    key = _mix(np.array([seed % 2**64], np.uint64) + STEP)
    key = _mix(key + np.array([(step + 1) % 2**64], np.uint64) * STEP)
    keys = _mix(key + (np.asarray(indices).astype(np.uint64) + np.uint64(1)) * STEP)
    numbers = _mix(keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * STEP)
    return (numbers >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Distortion:
    """Strength of each distortion: a maximum, except `bend`, a standard deviation."""

    shift: float = 1.5  # pixels, along each axis
    turn: float = 12.0  # degrees
    zoom: float = 0.12  # share of the size
    shear: float = 0.2  # pixels sideways for each pixel down
    bend: float = 0.8  # pixels: standard deviation of a smooth field (elastic distortion: Simard et al., 2003)
    cells: int = 5  # of that field along each axis; fewer are smoother

    def __call__(self, pictures: Grey, generator: Generator) -> Grey:
        """Distort each picture with separate random numbers. Pixels from outside the picture are 0."""
        rows, height, width = pictures.shape
        grid = F.affine_grid(self._affine(rows, width, generator), [rows, 1, height, width], align_corners=False)
        field = torch.randn(rows, 2, self.cells, self.cells, generator=generator) * (2 * self.bend / width)
        field = F.interpolate(field, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        return F.grid_sample(pictures[:, None], grid + field, align_corners=False)[:, 0]

    def _affine(self, rows: int, width: int, generator: Generator) -> Float[Tensor, "rows 2 3"]:
        """Return rotation, zoom, shear and shift as one matrix for each picture, in units of half its width."""
        turn, zoom, shear, *shift = 2 * torch.rand(5, rows, generator=generator) - 1
        angle, size = turn * self.turn * math.pi / 180, (zoom * math.log1p(self.zoom)).exp()
        cos, sin, lean = size * angle.cos(), size * angle.sin(), shear * self.shear
        x, y = (2 * self.shift / width * share for share in shift)
        return torch.stack([cos, lean * cos - sin, x, sin, lean * sin + cos, y], 1).view(rows, 2, 3)

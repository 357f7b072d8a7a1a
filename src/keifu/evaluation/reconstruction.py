"""How alike two pictures of the same thing are, pixel for pixel: PSNR and SSIM; knows no model.

Axes: picture, channels, height, width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from keifu.errors import UserError

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
Bytes = UInt8[Tensor, "picture channels height width"]
Others = UInt8[Tensor, "others channels high wide"]  # must be as the first ones are, or it is a `UserError`


def psnr(pictures: Bytes, others: Others) -> Float[Tensor, " picture"]:
    """The peak signal-to-noise ratio of each pair in decibels; infinite where they are the same."""
    _check(pictures, others)
    error = (pictures.double() - others.double()).square().mean((1, 2, 3))
    return (10 * (255**2 / error).log10()).float()


def ssim(pictures: Bytes, others: Others) -> Float[Tensor, " picture"]:
    """The structural similarity of each pair, 1 where they are the same, the mean over channels and over all places
    where the window fits in (Wang et al., 2004: a Gaussian of 11 x 11 pixels, σ 1.5)."""
    _check(pictures, others)
    if min(pictures.shape[2:]) < WINDOW:
        raise UserError(f"SSIM needs pictures of at least {WINDOW} x {WINDOW} pixels, not {tuple(pictures.shape[2:])}.")
    x, y = pictures.double(), others.double()
    means = _blurred(torch.stack([x, y, x * x, y * y, x * y]))
    x, y, xx, yy, xy = means
    variances, covariance = xx - x * x + yy - y * y, xy - x * y
    index = (2 * x * y + C1) * (2 * covariance + C2) / ((x * x + y * y + C1) * (variances + C2))
    return index.mean((1, 2, 3)).float()


def _blurred(values: Float[Tensor, "kind picture channels height width"]) -> Tensor:
    """The Gaussian's means at every place where it fits in."""
    offsets = torch.arange(WINDOW, dtype=values.dtype) - WINDOW // 2
    weights = (-0.5 * (offsets / SIGMA) ** 2).exp()
    weights = weights / weights.sum()
    planes = values.flatten(0, 2)[:, None]
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return planes.view(*values.shape[:3], *planes.shape[2:])


def _check(pictures: Bytes, others: Others) -> None:
    if pictures.shape != others.shape:
        raise UserError(f"Pictures of {tuple(pictures.shape)} and {tuple(others.shape)} cannot be compared one by one.")

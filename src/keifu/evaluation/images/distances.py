"""Distances between sets of images (FID, KID, precision, recall, nearest neighbours) and between two (PSNR, SSIM).

Sets are compared by features, one row of numbers for each image (see features.py).

Axes: real and drawn = the two sets, dim; of images: picture, channels, height, width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor

from keifu.errors import UserError

AT_ONCE = 2**24  # distances that are computed at once
PART = 4096  # pictures that are searched at once
SUBSETS, SUBSET = 100, 1000  # of the kernel distance, as in its paper
Real = Float[Tensor, "real dim"]
Drawn = Float[Tensor, "drawn dim"]


class Kernel(NamedTuple):
    """Mean and standard deviation of the subsets' kernel distances, and the size of the subsets."""

    mean: float
    deviation: float
    size: int


def frechet(real: Real, generated: Drawn) -> float:
    """Return the squared Fréchet distance between normal distributions with the sets' means and covariances.

    With Inception's features it is the FID (Heusel et al., 2017). It is biased upwards for few pictures, most if there
    are fewer pictures than features. Raises `UserError` for fewer than two pictures.
    """
    if (fewest := min(len(real), len(generated))) < 2:
        raise UserError(f"{fewest} pictures have no covariance: at least 2 are needed.")
    real, generated = real.double(), generated.double()
    covariance, other = real.T.cov(), generated.T.cov()
    root = _root(covariance)
    cross = torch.linalg.eigvalsh(root @ other @ root).clamp_min(0).sqrt().sum()
    return float((real.mean(0) - generated.mean(0)).square().sum() + covariance.trace() + other.trace() - 2 * cross)


def _root(symmetric: Tensor) -> Tensor:
    """Return the square root of a symmetric matrix whose eigenvalues are not negative, up to rounding."""
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def sliced_wasserstein(real: Real, generated: Drawn, directions: int = 64) -> float:
    """Return the mean Wasserstein distance along random directions, the same ones at each call, of two sets of equal
    size (Rabin et al., "Wasserstein Barycenter and Its Application to Texture Mixing", 2011)."""
    generator = torch.Generator().manual_seed(0)
    lines = F.normalize(torch.randn(real.shape[1], directions, generator=generator).to(real), dim=0)
    return float(((real @ lines).sort(0).values - (generated @ lines).sort(0).values).abs().mean())


def discrepancy(real: Real, generated: Drawn) -> float:
    """Return the squared maximum mean discrepancy with the kernel (x·y / dim + 1)³. It is unbiased, so it may be
    negative (Bińkowski et al., "Demystifying MMD GANs", 2018)."""
    real, generated = real.double(), generated.double()

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.T / one.shape[1] + 1) ** 3

    def within(rows: Tensor) -> Tensor:
        values = kernel(rows, rows)
        return (values.sum() - values.diagonal().sum()) / (len(rows) * (len(rows) - 1))

    return float(within(real) + within(generated) - 2 * kernel(real, generated).mean())


def kernel_distance(real: Real, generated: Drawn, subsets: int = SUBSETS, size: int = SUBSET, seed: int = 0) -> Kernel:
    """Return the unbiased squared kernel distance (KID's formula): its mean over random subsets without repetition.

    With few pictures, the subsets have at most half of the smaller set, because equal subsets would show no
    variation.
    """
    size = min(size, min(len(real), len(generated)) // 2)
    if size < 2:
        raise UserError(f"The kernel distance needs 4 pictures on each side, not {len(real)} and {len(generated)}.")
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(subsets):
        subset = [rows[torch.randperm(len(rows), generator=generator)[:size]] for rows in (real, generated)]
        estimates.append(discrepancy(*subset))
    values = torch.tensor(estimates, dtype=torch.float64)
    return Kernel(float(values.mean()), float(values.std()) if subsets > 1 else 0.0, size)


def manifold(real: Real, generated: Drawn, neighbours: int = 3) -> tuple[float, float]:
    """Return improved precision and recall (Kynkäänniemi et al., 2019): the shares of generated images near real ones,
    and of real images near generated ones.

    Each is the share of one set inside the other's manifold: inside a ball around a picture of the other set whose
    radius is the distance to its k-th nearest neighbour there."""
    if min(len(real), len(generated)) <= neighbours:
        raise UserError(f"Precision and recall need more than {neighbours} pictures on each side.")
    return _coverage(real, generated, neighbours), _coverage(generated, real, neighbours)


def _coverage(around: Real, rows: Drawn, neighbours: int) -> float:
    """Return the share of rows inside at least one ball."""
    radii = torch.cat([part.kthvalue(neighbours + 1, 1).values for part in _distances(around, around)])
    return float(torch.cat([(part <= radii).any(1) for part in _distances(rows, around)]).float().mean())


def _distances(rows: Drawn, references: Real) -> Iterator[Float[Tensor, "part real"]]:
    """Yield float64 Euclidean distances of parts of the rows to all others. They are computed by matrix
    multiplication."""
    references = references.double()
    for part in rows.split(max(1, AT_ONCE // len(references))):
        yield torch.cdist(part.double(), references)


def nearest(
    rows: Num[Tensor, "rows dim"], among: Num[Tensor, "among dim"]
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Return the Euclidean distance and the index of the point in `among` nearest to each row; of several, the first.
    Bytes are accepted too."""
    if not len(among):
        raise UserError("There is no picture to search for a nearest one.")
    best, indices = torch.full((len(rows),), torch.inf), torch.zeros(len(rows), dtype=torch.int64)
    values = rows.float()
    for first in range(0, len(among), PART):
        distance, index = torch.cdist(values, among[first : first + PART].float()).min(1)
        nearer = distance < best
        best, indices = torch.where(nearer, distance, best), torch.where(nearer, index + first, indices)
    # matrix multiplication finds the point but rounds, so the distance is computed from the differences
    return (values - among[indices].float()).norm(dim=1), indices


WINDOW, SIGMA = 11, 1.5  # size and σ of SSIM's Gaussian in pixels
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
Bytes = UInt8[Tensor, "picture channels height width"]


def psnr(pictures: Bytes, other_pictures: Bytes) -> Float[Tensor, " picture"]:
    """Return the peak signal-to-noise ratio of each pair in decibels; infinite if both are equal."""
    error = (pictures.double() - other_pictures.double()).square().mean((1, 2, 3))
    return (10 * (255**2 / error).log10()).float()


def ssim(pictures: Bytes, other_pictures: Bytes) -> Float[Tensor, " picture"]:
    """Return the structural similarity of each pair, 1 if both are equal: the mean over channels and over all positions
    of the window (Wang et al., 2004: a Gaussian of 11 x 11 pixels, σ 1.5)."""
    if min(pictures.shape[2:]) < WINDOW:
        raise UserError(f"SSIM needs pictures of at least {WINDOW} x {WINDOW} pixels, not {tuple(pictures.shape[2:])}.")
    x, y = pictures.double(), other_pictures.double()
    x, y, xx, yy, xy = _blur(torch.stack([x, y, x * x, y * y, x * y]))
    variances, covariance = xx - x * x + yy - y * y, xy - x * y
    index = (2 * x * y + C1) * (2 * covariance + C2) / ((x * x + y * y + C1) * (variances + C2))
    return index.mean((1, 2, 3)).float()


def _blur(values: Float[Tensor, "kind picture channels height width"]) -> Tensor:
    """Return the Gaussian-weighted means at every position of the window."""
    offsets = torch.arange(WINDOW, dtype=values.dtype) - WINDOW // 2
    weights = (-0.5 * (offsets / SIGMA) ** 2).exp()
    weights = weights / weights.sum()
    planes = values.flatten(0, 2)[:, None]
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return planes.view(*values.shape[:3], *planes.shape[2:])

"""Points of a plane in classes: two moons, two spiral arms, eight clusters. All are mixtures of normal distributions,
so that the density and its score are known exactly, with any amount of noise.

Axes: batch, components = of the mixture; a point has two numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from keifu.errors import require_known

Points = Float[Tensor, "batch 2"]
Labels = Int[Tensor, " batch"]


@dataclass(frozen=True, eq=False)
class PointMixture:
    """PointMixture of equally probable normal distributions with the same deviation. labels: the class of each."""

    means: Float[Tensor, "components 2"]
    labels: Int[Tensor, " components"]
    deviation: float

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return int(self.labels.max()) + 1

    def draw(self, count: int, generator: Generator, label: int | None = None) -> tuple[Points, Labels]:
        """Draw points, of one class or of all, and return them with their classes."""
        of_class = torch.arange(len(self.means)) if label is None else (self.labels == label).nonzero()[:, 0]
        component = of_class[torch.randint(len(of_class), (count,), generator=generator)]
        noise = torch.randn(count, 2, generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.deviation * noise, self.labels[component]

    def score(self, x: Points, sigma: Float[Tensor, " batch"], label: Labels | None = None) -> Points:
        """Return the gradient of the logarithm of the density at x, after normal noise of deviation sigma was added to
        the points. label: classes on which the density is conditioned; None, or `n_classes` of a point: on none."""
        variance = (self.deviation**2 + sigma.to(x) ** 2)[:, None]
        means = self.means.to(x)
        logits = -(x[:, None] - means).square().sum(-1) / (2 * variance)
        if label is not None:
            other = (self.labels != label[:, None]) & (label < self.n_classes)[:, None]
            logits = logits.masked_fill(other, -math.inf)
        return (logits.softmax(1) @ means - x) / variance


def moons() -> PointMixture:
    """Return two interlocking half circles of 32 distributions each."""
    angle = math.pi * (torch.arange(32) + 0.5) / 32
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    return PointMixture(torch.cat([upper, -upper]), torch.arange(64) // 32, 0.1)


def spiral() -> PointMixture:
    """Return two spiral arms of 48 distributions each."""
    radius = 0.1 + 0.9 * ((torch.arange(48) + 0.5) / 48).sqrt()
    angle = 2.5 * math.pi * radius
    arm = 1.4 * radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return PointMixture(torch.cat([arm, -arm]), torch.arange(96) // 48, 0.05)


def clusters() -> PointMixture:
    """Return eight distributions on a circle. Neighbours are of different classes."""
    angle = math.pi / 4 * torch.arange(8)
    return PointMixture(1.2 * torch.stack([angle.cos(), angle.sin()], 1), torch.arange(8) % 2, 0.15)


MIXTURES: dict[str, Callable[[], PointMixture]] = {"moons": moons, "spiral": spiral, "clusters": clusters}


def mixture(name: str) -> PointMixture:
    """Return the mixture of that name. Raises `UserError`, with the nearest name, if it is unknown."""
    require_known("set of points", name, MIXTURES)
    return MIXTURES[name]()

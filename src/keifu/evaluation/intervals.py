"""95% confidence intervals: Wilson's for a proportion, and the bootstrap's for a mean."""

import math
from collections.abc import Sequence

import numpy as np

from keifu.evaluation.registry import Figures

Z = 1.959963984540054  # 95% of a normal distribution is within this many standard deviations of its mean
RESAMPLES = 1000
Values = Sequence[float | int] | np.ndarray
Numbers = Values | None
Interval = tuple[float, float]


def wilson(successes: int, total: int) -> Interval:
    """Return Wilson's score interval (1927) of a proportion. It is within [0, 1], and valid for few items. For `total`
    0 it is (0, 1)."""
    if not total:
        return 0.0, 1.0
    share = successes / total
    spread = Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Values, clusters: Numbers = None, sizes: Numbers = None) -> Interval:
    """Return the percentile interval (Efron, 1979) of a mean, by resampling with replacement with a fixed seed.

    clusters: cluster number of each value; values of one cluster, such as relatives, are resampled together.
    sizes: number of things that each value counts, such as tokens; the mean is then sum of values / sum of sizes.
    """
    items = np.asarray(values, dtype=np.float64)
    numbers = np.arange(len(items)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums, counts = np.bincount(numbers, items), np.bincount(numbers, sizes)
    generator = np.random.default_rng(0)
    samples = (generator.integers(0, len(sums), len(sums)) for _ in range(RESAMPLES))
    low, high = np.percentile([sums[some].sum() / counts[some].sum() for some in samples], [2.5, 97.5])
    return float(low), float(high)


def share_figures(name: str, successes: int, total: int) -> Figures:
    """Return a proportion and its Wilson interval, as figures of an evaluation."""
    return {name: round(successes / max(1, total), 4), f"{name}, 95% interval": as_text(wilson(successes, total))}


def mean_figures(name: str, values: Values, clusters: Numbers = None, sizes: Numbers = None) -> Figures:
    """Return a mean and its bootstrap interval, as figures of an evaluation. clusters, sizes: see `bootstrap`."""
    total = np.sum(values) / (np.size(values) if sizes is None else np.sum(sizes))
    return {name: round(float(total), 4), f"{name}, 95% interval": as_text(bootstrap(values, clusters, sizes))}


def as_text(interval: Interval) -> str:
    """Return an interval with four decimals, as figures show it."""
    return "{:.4f} to {:.4f}".format(*interval)

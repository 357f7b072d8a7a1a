"""95% confidence intervals: Wilson's for a proportion, and the bootstrap's for a mean."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # 95% of a normal distribution lies within so many standard deviations of its mean


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion: within 0 and 1, and sound for few items and near the ends.

    It is (0, 1) where `total` is 0.
    """
    if not total:
        return 0.0, 1.0
    share = successes / total
    spread = Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], resamples: int = 1000) -> tuple[float, float]:
    """The percentile interval (Efron, 1979) of a mean, from as many resamples with replacement; always the same."""
    items = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(0)
    means = [items[generator.integers(0, len(items), len(items))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

"""How sure a figure is that comes from so many items: 95% intervals; knows not what was counted."""

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959964  # of a normal distribution, 95% lies within so many deviations


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of `total` items: within 0 and 1, and sound for few items and shares
    near the ends."""
    if not total:
        return 0.0, 1.0
    share, spread = right / total, Z * Z / total
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], draws: int = 1000) -> tuple[float, float]:
    """The percentile interval (Efron, 1979) of a mean, from as many items drawn again and again, always the same."""
    items, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    means = [items[generator.integers(0, len(items), len(items))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

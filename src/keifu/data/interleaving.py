"""Weighted interleaving of sources.

This is Webster's (Sainte-Laguë's) method for seats in a parliament. A source with share w is due at the times 0.5 / w,
1.5 / w, 2.5 / w and so on. Each row comes from the source that is due next. Among the first N rows a source has w · N
of them, up to half a row and w · n / 2, where n is the number of sources.
"""

from typing import NamedTuple

import numpy as np


class InterleaveState(NamedTuple):
    """Source of each of some consecutive rows, and the number of rows that this source gave before it."""

    whose: np.ndarray
    numbers: np.ndarray


def interleave(shares: np.ndarray, start: int, stop: int) -> InterleaveState:
    """Return the sources of rows `start` to `stop` - 1, counted from 0. Shares are positive and their sum is 1.

    The cost does not depend on `start`.
    """
    count = len(shares)
    first = np.maximum(np.floor(shares * (start - count)).astype(np.int64) - 1, 0)  # earlier ones are before `start`
    last = np.ceil(shares * (stop + count)).astype(np.int64) + 1
    lengths = last - first
    whose = np.repeat(np.arange(count), lengths)
    numbers = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths - first, lengths)
    order = np.lexsort((whose, (numbers + 0.5) / shares[whose]))
    indices = order[start - int(first.sum()) : stop - int(first.sum())]
    return InterleaveState(whose[indices], numbers[indices])


def source_of_row(shares: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the source of each of these rows, which may be in any order."""
    if not len(numbers):
        return np.zeros(0, np.int64)
    start = int(numbers.min())
    return interleave(shares, start, int(numbers.max()) + 1).whose[numbers - start]

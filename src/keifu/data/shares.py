"""Who is next, when several take turns by their shares: exact over time, and known for any turn at once; knows no text.

The turns are those of Webster's (Sainte-Laguë's) method for seats in a parliament: the one with the share w is due at
the times 0.5 / w, 1.5 / w, 2.5 / w and so on, and a turn goes to who is due next. After any number of turns N each has
had w · N of them, give or take half a turn and w · n / 2, where n take turns.
"""

from typing import NamedTuple

import numpy as np


class Turns(NamedTuple):
    """Of some turns in a row: whose each is, and how many turns that one had had before it."""

    whose: np.ndarray
    numbers: np.ndarray


def turns(shares: np.ndarray, start: int, stop: int) -> Turns:
    """The turns from `start` until before `stop`, counted from 0; shares are above 0 and their sum is 1.

    It costs the same for late turns as for early ones.
    """
    count = len(shares)
    first = np.maximum(np.floor(shares * (start - count)).astype(np.int64) - 1, 0)  # those before are surely over
    last = np.ceil(shares * (stop + count)).astype(np.int64) + 1
    lengths = last - first
    whose = np.repeat(np.arange(count), lengths)
    numbers = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths - first, lengths)
    order = np.lexsort((whose, (numbers + 0.5) / shares[whose]))
    wanted = order[start - int(first.sum()) : stop - int(first.sum())]
    return Turns(whose[wanted], numbers[wanted])


def which(shares: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Whose turn each of these is; they may be in any order."""
    if not len(numbers):
        return np.zeros(0, np.int64)
    start = int(numbers.min())
    return turns(shares, start, int(numbers.max()) + 1).whose[numbers - start]

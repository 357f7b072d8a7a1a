"""Building blocks of batches: padding, length buckets, batch-size warm-up, epochs, weighted interleaving of sources.

Axes: batch = rows, length = tokens.

Interleaving is Webster's (Sainte-Laguë's) method for seats in a parliament: a source with the share w is due at the
times 0.5 / w, 1.5 / w, 2.5 / w and so on, and each row comes from the source that is due next. After any number of
rows N each source has given w · N of them, to within half a row and w · n / 2, where n is the number of sources.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from keifu.errors import UserError

Rows = Sequence[Sequence[int]]


def pad(rows: Rows, pad_id: int) -> tuple[Int64[Tensor, "batch length"], Bool[Tensor, "batch length"] | None]:
    """The rows as one tensor, padded on the right, and a mask that is True on real tokens.

    The mask is None where all are equally long: attention without one is faster.
    """
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    ids = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64, device="cpu")
    longest = int(lengths.max())
    if longest == int(lengths.min()):
        return ids.view(len(rows), longest), None
    mask = torch.arange(longest, device="cpu") < lengths[:, None]
    tokens = torch.full(mask.shape, pad_id, device="cpu")
    tokens[mask] = ids
    return tokens, mask


def length_buckets(lengths: Sequence[int], tokens: int, rows: int) -> Iterator[list[int]]:
    """The places of rows that go through a model together, the longest first: neighbours in length.

    A pass has at most `rows` rows and, with its padding, `tokens` tokens; a longer row is alone. Where it has a quarter
    of them, it also ends before a shorter row, which would be padded. The longest come first, so that a pass that does
    not fit in memory fails at once.
    """
    together: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if together:
            longest, shortest, count = lengths[together[0]], lengths[together[-1]], len(together)
            full = count == rows or longest * (count + 1) > tokens
            if full or (lengths[place] < shortest and longest * count >= tokens // 4):
                yield together
                together = []
        together.append(place)
    if together:
        yield together


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Where each of several sequences that follow one another begins, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def check_step(step: int) -> None:
    """A negative step is a `UserError`."""
    if step < 0:
        raise UserError(f"The step is {step}, but steps are counted from 0.")


class Epochs:
    """An endless stream of epochs over `n` items, each epoch in an order of its own, with random access by step.

    The batch of step s holds the items from s · batch_size on, so it may reach from one epoch into the next. An epoch's
    order is a random permutation of 0 to n - 1 that depends only on the seed and the epoch's number, or the n items
    that `order(epoch)` gives. So a resumed run continues at a late step at once, with the batches that it would have
    had. The orders of two epochs are kept.
    """

    def __init__(self, n: int, batch_size: int, seed: int, order: Callable[[int], Any] | None = None):
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self._order = lru_cache(maxsize=2)(order or self._permutation)

    @property
    def steps(self) -> float:
        """Batches after which every item was seen once."""
        return self.n / self.batch_size

    def batch(self, step: int) -> np.ndarray:
        """The items of a step's batch; the first step is 0."""
        check_step(step)
        return self.items(step * self.batch_size + np.arange(self.batch_size))

    def items(self, positions: np.ndarray) -> np.ndarray:
        """The items at these ascending positions of the stream, the first of which is 0."""
        epochs, places = np.divmod(positions, self.n)
        return np.concatenate([self._order(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])

    def item(self, step: int) -> Any:
        """The item of a step, where `order` gives whole batches."""
        check_step(step)
        epoch, place = divmod(step, self.n)
        return self._order(epoch)[place]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.n)


def sort_pools(rows: np.ndarray, keys: np.ndarray, pool: int) -> np.ndarray:
    """Rows in this order, but each `pool` of them sorted by their keys; those of equal keys stay in order."""
    return rows[np.lexsort([keys[rows], np.arange(len(rows)) // pool])]


@dataclass(frozen=True, eq=False)
class Batching:
    """How an epoch is cut: batch i holds the rows from bounds[i] up to bounds[i + 1], the same bounds every epoch, of a
    random order in which each `pool` of rows is sorted by `keys`. `name` says all that it depends on."""

    name: str
    keys: np.ndarray
    pool: int
    bounds: list[int]

    def order(self, random: np.random.Generator) -> np.ndarray:
        """All rows, in an order of the epoch's own."""
        return sort_pools(random.permutation(len(self.keys)), self.keys, self.pool)

    def batches(self, random: np.random.Generator) -> list[np.ndarray]:
        """The rows of each batch of an epoch."""
        return np.split(self.order(random), self.bounds[1:-1])

    def epochs(self, seed: int, last: int = 0) -> Epochs:
        """Epochs of whole batches, which come in a random order but for the `last` ones of each."""
        n = len(self.bounds) - 1

        def order(epoch: int) -> list[np.ndarray]:
            random = np.random.default_rng([seed, epoch])
            batches = self.batches(random)
            return [batches[place] for place in (*random.permutation(n - last), *range(n - last, n))]

        return Epochs(n, 1, seed, order)


def by_rows(sizes: np.ndarray, rows: int = 80, pool: int = 1600) -> Batching:
    """Batches of `rows` rows; each `pool` of rows drawn at random is sorted by length and cut into batches.

    Bahdanau et al. (2014, appendix B.2) draw 1,600 pairs, sort them, and make 20 batches of 80.
    """
    return Batching(f"{rows} rows of {pool}", sizes.sum(1), pool, [*range(0, len(sizes), rows), len(sizes)])


@dataclass(frozen=True)
class BatchSizeSchedule:
    """Batches have rows[i] rows from step starts[i] on, until starts[i + 1]; steps are counted from 0."""

    starts: tuple[int, ...]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(a < b for a, b in pairwise(self.starts)):
            raise UserError(
                f"The steps at which a batch grows must ascend from above 0, and they are {self.starts[1:]}."
            )
        if min(self.rows) < 1:
            raise UserError(f"batch_size is {min(self.rows)}, but it must be at least 1.")

    @cached_property
    def _before(self) -> list[int]:
        """Rows of all steps before each start."""
        stages = zip(pairwise(self.starts), self.rows, strict=False)
        return np.cumsum([0, *((end - start) * rows for (start, end), rows in stages)]).tolist()

    def at(self, step: int) -> int:
        """The rows of a step."""
        return self.rows[bisect_right(self.starts, step) - 1]

    def before(self, step: int) -> int:
        """The rows of all steps before this one."""
        check_step(step)
        stage = bisect_right(self.starts, step) - 1
        return self._before[stage] + (step - self.starts[stage]) * self.rows[stage]

    def numbers(self, step: int) -> np.ndarray:
        """The positions of a step's rows in the stream of all rows."""
        return self.before(step) + np.arange(self.at(step))

    @property
    def largest(self) -> int:
        """The first step whose batch has the most rows."""
        return self.starts[self.rows.index(max(self.rows))]

    def __str__(self) -> str:
        if len(self.rows) == 1:
            return str(self.rows[0])
        return ",".join(f"{rows}@{start}" for start, rows in zip(self.starts, self.rows, strict=True))


def batch_size_stages(smaller: Iterable[tuple[int, int]], last: int) -> BatchSizeSchedule:
    """Batches of so many rows up to such a step, pair after pair, and of `last` rows afterwards (PaLM, section 5)."""
    pairs = list(smaller)
    return BatchSizeSchedule((0, *(until for _, until in pairs)), (*(rows for rows, _ in pairs), last))


def linear_batch_size(first: int, over: int, last: int) -> BatchSizeSchedule:
    """Batch-size warm-up from `first` to `last` rows, linear in the rows seen, over so many rows (GPT-3, appendix B).

    A step has first + ⌊(last − first) · seen / over⌋ rows.
    """
    if not 1 <= first <= last:
        raise UserError(f"A batch that grows to {last} rows starts with 1 to {last}, and here with {first}.")
    starts, rows, seen = [0], [first], 0
    while rows[-1] < last:
        next_at = -(-(rows[-1] + 1 - first) * over // (last - first))  # the rows after which a step has one more
        steps = max(1, -(-(next_at - seen) // rows[-1]))
        seen += steps * rows[-1]
        starts.append(starts[-1] + steps)
        rows.append(min(last, first + (last - first) * seen // max(1, over)))
    return BatchSizeSchedule(tuple(starts), tuple(rows))


class InterleaveState(NamedTuple):
    """For consecutive rows: the source of each, and how many rows that source gave before it."""

    whose: np.ndarray
    numbers: np.ndarray


def interleave(shares: np.ndarray, start: int, stop: int) -> InterleaveState:
    """The sources of rows `start` to `stop` - 1, counted from 0; shares are above 0 and their sum is 1.

    It costs the same for late rows as for early ones.
    """
    count = len(shares)
    first = np.maximum(np.floor(shares * (start - count)).astype(np.int64) - 1, 0)  # those before are surely over
    last = np.ceil(shares * (stop + count)).astype(np.int64) + 1
    lengths = last - first
    whose = np.repeat(np.arange(count), lengths)
    numbers = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths - first, lengths)
    order = np.lexsort((whose, (numbers + 0.5) / shares[whose]))
    wanted = order[start - int(first.sum()) : stop - int(first.sum())]
    return InterleaveState(whose[wanted], numbers[wanted])


def source_of_row(shares: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The source of each of these rows, which may be in any order."""
    if not len(numbers):
        return np.zeros(0, np.int64)
    start = int(numbers.min())
    return interleave(shares, start, int(numbers.max()) + 1).whose[numbers - start]

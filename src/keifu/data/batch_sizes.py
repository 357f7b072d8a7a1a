"""Batch sizes that grow during training: in stages (PaLM), or linearly in the sequences seen (GPT-3)."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from keifu.data.epochs import check_step
from keifu.errors import UserError


@dataclass(frozen=True)
class BatchSizeSchedule:
    """Schedule of batch sizes: steps starts[i] to starts[i + 1] - 1 have rows[i] rows. Steps count from 0."""

    starts: tuple[int, ...]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(a < b for a, b in pairwise(self.starts)):
            raise UserError(f"The steps at which a batch grows must ascend from above 0, but are {self.starts[1:]}.")
        if min(self.rows) < 1:
            raise UserError(f"batch_size is {min(self.rows)}, but it must be at least 1.")

    @cached_property
    def _before(self) -> list[int]:
        """Number of rows in all steps before each start."""
        stages = zip(pairwise(self.starts), self.rows, strict=False)
        return np.cumsum([0, *((end - start) * rows for (start, end), rows in stages)]).tolist()

    def at(self, step: int) -> int:
        """Return the number of rows of a step."""
        return self.rows[bisect_right(self.starts, step) - 1]

    def before(self, step: int) -> int:
        """Return the number of rows of all steps before this one."""
        check_step(step)
        stage = bisect_right(self.starts, step) - 1
        return self._before[stage] + (step - self.starts[stage]) * self.rows[stage]

    def numbers(self, step: int) -> np.ndarray:
        """Return the positions of a step's rows in the stream of all rows."""
        return self.before(step) + np.arange(self.at(step))

    @property
    def largest(self) -> int:
        """First step with the largest batch."""
        return self.starts[self.rows.index(max(self.rows))]

    def __str__(self) -> str:
        if len(self.rows) == 1:
            return str(self.rows[0])
        return ",".join(f"{rows}@{start}" for start, rows in zip(self.starts, self.rows, strict=True))


def batch_size_stages(smaller: Iterable[tuple[int, int]], last: int) -> BatchSizeSchedule:
    """Return batch sizes in stages. smaller: pairs (rows, last step with them); after these, `last` rows (PaLM, section
    5)."""
    pairs = list(smaller)
    return BatchSizeSchedule((0, *(until for _, until in pairs)), (*(rows for rows, _ in pairs), last))


def linear_batch_size(first: int, over: int, last: int) -> BatchSizeSchedule:
    """Return batch-size warm-up from `first` to `last` rows, linear over `over` rows (GPT-3, appendix B).

    A step has first + ⌊(last − first) · seen / over⌋ rows.
    """
    if not 1 <= first <= last:
        raise UserError(f"A batch that grows to {last} rows must start with 1 to {last} rows, not {first}.")
    starts, rows, seen = [0], [first], 0
    while rows[-1] < last:
        next_at = -(-(rows[-1] + 1 - first) * over // (last - first))  # rows after which the batch grows
        steps = max(1, -(-(next_at - seen) // rows[-1]))
        seen += steps * rows[-1]
        starts.append(starts[-1] + steps)
        rows.append(min(last, first + (last - first) * seen // max(1, over)))
    return BatchSizeSchedule(tuple(starts), tuple(rows))

"""Batches out of several texts by their weights, and what is measured of each text held out; knows no model.

Axes: row, place = tokens of a row.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from keifu.data.denoised_rows import Rows, Task
from keifu.data.growth import Growth, stages
from keifu.data.packed import PackedText
from keifu.data.shares import turns, which
from keifu.data.text import Shards
from keifu.errors import UserError

Batch = dict[str, Tensor]
VALIDATION = 20_220_510  # the seed of what is held out, so that runs of different seeds are compared on the same


@dataclass(frozen=True)
class Weighted:
    """A source's name, its share of all rows, and its ids."""

    name: str
    weight: float | int
    shards: Shards


@dataclass(frozen=True)
class Check:
    """Something that is measured of each source's held-out text: the loss of `task`, times `scale(shards)`."""

    task: Task
    scale: Callable[[Shards], float] = lambda shards: 1.0


class MixedText:
    """Training data out of several sources: after any number of rows each has its share of them (`keifu.data.shares`).

    Each source is cut into windows and read in epochs as by `PackedText`, a small one more often; a batch is a function
    of the seed and the step alone. `task` makes rows of the windows. `batch_size` may grow over the steps.

    `validation` gives batches for the loss of the task, of held-out windows by the same shares, and then for each check
    and each source some of its held-out windows. "figure" [row] is 0 for the former and else the place, counted from 1,
    in `figures`, the names `source/check`; "factor" [row] is what the batch's summed loss is multiplied with so that
    the sum of all, divided by the elements of the former, is that figure (see `keifu.training.denoising.measured`).
    Of each source `check_rows` windows are measured, spread evenly; `context_length` tokens are in each.
    """

    def __init__(
        self, sources: Sequence[Weighted], task: Task, context_length: int, batch_size: int | Growth, seed: int = 0,
        checks: Mapping[str, Check] | None = None, validation_rows: int = 256, check_rows: int = 32,
    ):  # fmt: skip
        self.growth = batch_size if isinstance(batch_size, Growth) else stages((), batch_size)
        self.sources, self.task, self.seed = sources, task, seed
        self.checks, self.context_length = checks or {}, context_length
        self.validation_rows, self.check_rows = validation_rows, check_rows
        self.weights = np.array([source.weight for source in sources])
        seeds = (seed * len(sources) + n for n in range(len(sources)))
        self._packed = [PackedText(s.shards, task.width - 1, 1, n) for s, n in zip(sources, seeds, strict=True)]
        self.figures = [f"{source.name}/{check}" for check in self.checks for source in sources]

    @property
    def fingerprint(self) -> str:
        """Of all texts, their weights, and what else the batches depend on."""
        facts = [f"{s.name} {s.weight} {s.shards.fingerprint}" for s in self.sources]
        facts += [self.task.name, f"{self.growth} {self.seed}"]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0: the same in every process, whatever came before."""
        if step < 0:
            raise UserError(f"The step is {step}, but steps are counted from 0.")
        taken = turns(self.weights, self.growth.before(step), self.growth.before(step + 1))
        windows = np.empty((len(taken.whose), self.task.width), np.int64)
        for place, packed in enumerate(self._packed):
            rows = np.flatnonzero(taken.whose == place)
            if len(rows):
                windows[rows] = packed.windows(taken.numbers[rows])
        return _tensors(self.task.rows(windows, taken.numbers, np.random.default_rng([self.seed, step])))

    def largest(self) -> Batch:
        """A batch of the most rows."""
        return self.batch(self.growth.largest)

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each source's windows come in so many steps; a whole number of times and a part."""
        whose = np.ceil(self.growth.before(steps) * self.weights)
        return {
            source.name: float(count) / packed.windows_per_epoch
            for source, count, packed in zip(self.sources, whose, self._packed, strict=True)
        }

    def validation(self) -> Iterator[Batch]:
        """See the class; always the same."""
        yield from self._own
        units = float(sum(elements(batch) for batch in self._own))
        for place, (check, source) in enumerate((c, s) for c in self.checks.values() for s in self.sources):
            windows = held_out(source.shards, self.context_length, self.check_rows)[:, : check.task.width]
            made = batches(check.task, windows, max(self.growth.rows))
            factor = check.scale(source.shards) * units / sum(elements(batch) for batch in made)
            for batch in made:
                yield batch | _marks(len(next(iter(batch.values()))), place + 1, factor)

    @cached_property
    def _own(self) -> list[Batch]:
        """Held-out windows of all sources by their weights, for the loss of the task itself."""
        numbers = np.arange(self.validation_rows)
        whose, windows = which(self.weights, numbers), np.empty((len(numbers), self.task.width), np.int64)
        for place, packed in enumerate(self._packed):
            rows = np.flatnonzero(whose == place)
            kept = packed.held_out
            windows[rows] = kept[np.arange(len(rows)) * max(1, len(kept) // max(1, len(rows))) % len(kept)]
        made = batches(self.task, windows, max(self.growth.rows))
        return [batch | _marks(len(next(iter(batch.values()))), 0, 1.0) for batch in made]


def held_out(shards: Shards, context_length: int, rows: int) -> np.ndarray:
    """At most so many windows of `context_length` tokens out of the held-out part, spread evenly, [row, place]."""
    return PackedText(shards, context_length - 1, 1, validation_tokens=rows * (context_length - 1)).held_out


def batches(task: Task, windows: np.ndarray, size: int) -> list[Batch]:
    """The windows as rows, always the same, `size` of them at a time."""
    random, numbers = np.random.default_rng(VALIDATION), np.arange(len(windows))
    whole = _tensors(task.rows(windows.astype(np.int64), numbers, random))
    starts = range(0, len(windows), size)
    return [{name: tensor[start : start + size] for name, tensor in whole.items()} for start in starts]


def elements(batch: Batch) -> int:
    """How many tokens of a batch are predicted."""
    mask = batch.get("mask", batch.get("target_mask"))
    return batch["tokens"][:, 1:].numel() if mask is None else int(mask[:, 1:].sum())


def _marks(rows: int, figure: int, factor: float) -> Batch:
    return {"figure": torch.full((rows,), figure), "factor": torch.full((rows,), factor)}


def _tensors(rows: Rows) -> Batch:
    return {name: torch.from_numpy(array) for name, array in rows.items()}

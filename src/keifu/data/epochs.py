"""Epochs: an endless stream of items with a new order in each epoch and random access by step. Batches of them, also of
a user's own examples (tensors or a data set).

A batch may grow during training: in stages (PaLM), or linearly in the sequences seen (GPT-3).
"""

import hashlib
import json
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from keifu.errors import UserError

Order = Callable[[int], Any]  # items, or whole batches, of an epoch in their order


def check_step(step: int) -> None:
    """Raise a `UserError` if the step is negative."""
    if step < 0:
        raise UserError(f"The step is {step}, but steps are counted from 0.")


class Epochs:
    """Endless stream of epochs over `n` items. Each epoch has a new order, and any step can be computed directly.

    The batch of step s has the items from s · batch_size on, so it may extend into the next epoch. An epoch's order is
    a random permutation of 0 to n - 1 that depends only on the seed and the epoch, or the n items of `order(epoch)`. So
    a resumed run gets the batches of an uninterrupted run. The orders of two epochs are cached.
    """

    def __init__(self, n: int, batch_size: int, seed: int, order: Order | None = None):
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._order = lru_cache(maxsize=2)(order or self._permutation)

    @property
    def steps(self) -> float:
        """Number of batches after which every item was used once."""
        return self.n / self.batch_size

    def batch(self, step: int) -> np.ndarray:
        """Return the items of a step's batch; steps count from 0."""
        check_step(step)
        return self.items(step * self.batch_size + np.arange(self.batch_size))

    def items(self, positions: np.ndarray) -> np.ndarray:
        """Return the items at these ascending positions of the stream, which count from 0."""
        epochs, inside = np.divmod(positions, self.n)
        return np.concatenate([self._order(int(epoch))[inside[epochs == epoch]] for epoch in np.unique(epochs)])

    def item(self, step: int) -> Any:
        """Return the item of a step, if `order` gives whole batches."""
        check_step(step)
        epoch, position = divmod(step, self.n)
        return self._order(epoch)[position]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.n)


class EpochBatches(ABC):
    """Base class of training data in batches of constant size, drawn in epochs (see `Epochs`).

    Held-out examples are not shuffled, and their last batch may be smaller.
    """

    def __init__(self, n_training: int, n_held: int, batch_size: int, seed: int, order: Order | None = None):
        self.batch_size, self.seed, self._n_held = batch_size, seed, n_held
        self._epochs = Epochs(n_training, batch_size, seed, order)
        self.steps_per_epoch = self._epochs.steps

    @abstractmethod
    def make_batch(self, validating: bool, items: np.ndarray) -> dict[str, Tensor]:
        """Return the batch of these items, of the held-out part if `validating`, else of the training part."""

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step, counted from 0. It is the same in every process and does not depend on earlier
        calls."""
        return self.make_batch(False, self.items(step))

    def items(self, step: int) -> np.ndarray:
        """Return the indices of the training examples in the batch of a step."""
        return self._epochs.batch(step)

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """Yield the held-out examples in batches, always the same."""
        for first in range(0, self._n_held, self.batch_size):
            yield self.make_batch(True, np.arange(first, min(first + self.batch_size, self._n_held)))


@runtime_checkable
class IndexedExamples(Protocol):
    """Sequence of examples with a length and access by index, such as a PyTorch data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class OwnBatches(EpochBatches):
    """Batches of a user's examples for the training loop, drawn without replacement in a new order in every epoch.

    source: tensors by name, whose first axis is examples, such as {"x": x, "y": y}; or a data set whose examples are
    dicts of tensors or numbers. held_out: share of the examples for validation, chosen by the seed; or their indices.
    fingerprint: string that identifies the data when a run is resumed; None: computed from the tensors, or for a data
    set from its length and 16 examples.

    Raises `UserError` for tensors of different lengths, no example, or a batch larger than the training part.

    >>> data = OwnBatches({"x": torch.arange(10.0)}, batch_size=4, held_out=0.2)
    >>> data.batch(0)["x"].shape, [len(batch["x"]) for batch in data.validation()]
    (torch.Size([4]), [2])
    """

    def __init__(
        self, source: Mapping[str, Tensor] | IndexedExamples, batch_size: int, seed: int = 0,
        held_out: float | Sequence[int] = 0.1, fingerprint: str | None = None,
    ):  # fmt: skip
        self.source = source
        count = _count(source)
        order = np.random.default_rng([seed, 1]).permutation(count)
        validation = held_out if isinstance(held_out, Sequence) else order[: round(held_out * count)]
        self.held_out, self.training = np.sort(np.array(validation, np.int64)), np.setdiff1d(order, validation)
        if not 1 <= batch_size <= len(self.training):
            few = f"{len(self.training)} examples for training ({len(validation)} are held out)"
            raise UserError(f"A batch of {batch_size} cannot be drawn from {few}: choose a smaller batch_size.")
        self.fingerprint = fingerprint or _fingerprint(source, count, held_out)
        super().__init__(len(self.training), len(validation), batch_size, seed, self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(self.training)

    def make_batch(self, validating: bool, items: np.ndarray) -> dict[str, Tensor]:
        """Return the training examples with these indices, or the held-out ones at these positions."""
        numbers = self.held_out[items] if validating else items
        if isinstance(self.source, Mapping):
            indices = torch.from_numpy(numbers)
            return {name: tensor[indices] for name, tensor in self.source.items()}
        rows = [self.source[int(number)] for number in numbers]
        if not isinstance(rows[0], Mapping):
            type_name = type(rows[0]).__name__
            raise UserError(
                f"An example of the data is a {type_name}; it must be a dict of tensors or numbers by name."
            )
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def _count(source: Mapping[str, Tensor] | IndexedExamples) -> int:
    if not isinstance(source, Mapping):
        return len(source)
    lengths = {name: len(tensor) for name, tensor in source.items()}
    if len({*lengths.values()}) != 1:
        raise UserError(f"The tensors must have as many examples each, and they have {lengths or 'none'}.")
    return next(iter(lengths.values()))


def _fingerprint(source: Mapping[str, Tensor] | IndexedExamples, count: int, held_out: float | Sequence[int]) -> str:
    """Return the SHA-256 of the tensors; for a data set, of its length and evenly spaced examples."""
    digest = hashlib.sha256(json.dumps([count, held_out]).encode())
    if isinstance(source, Mapping):
        rows: list[Any] = [source]
    else:
        rows = [source[number] for number in sorted({n * count // 16 for n in range(16)})] if count else []
    for row in rows:
        for name, value in row.items() if isinstance(row, Mapping) else ():
            tensor = torch.as_tensor(value).detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def sort_pools(rows: np.ndarray, keys: np.ndarray, pool: int) -> np.ndarray:
    """Sort each group of `pool` consecutive rows by their keys. The sort is stable."""
    return rows[np.lexsort([keys[rows], np.arange(len(rows)) // pool])]


@dataclass(frozen=True, eq=False)
class Batching:
    """Cut of an epoch into batches: batch i has rows bounds[i] to bounds[i + 1] - 1 of a random order.

    In that order each group of `pool` rows is sorted by `keys`. The bounds are the same in every epoch. name: a string
    that changes with everything that affects the batches.
    """

    name: str
    keys: np.ndarray
    pool: int
    bounds: list[int]

    def batches(self, random: np.random.Generator) -> list[np.ndarray]:
        """Return the rows of each batch of an epoch: a random order, sorted within each pool."""
        order = sort_pools(random.permutation(len(self.keys)), self.keys, self.pool)
        return np.split(order, self.bounds[1:-1])

    def epochs(self, seed: int, last: int = 0) -> Epochs:
        """Return epochs of whole batches in random order. The `last` batches of each epoch keep their order."""
        n = len(self.bounds) - 1

        def order(epoch: int) -> list[np.ndarray]:
            random = np.random.default_rng([seed, epoch])
            batches = self.batches(random)
            return [batches[index] for index in (*random.permutation(n - last), *range(n - last, n))]

        return Epochs(n, 1, seed, order)


def by_rows(sizes: np.ndarray, rows: int = 80, pool: int = 1600) -> Batching:
    """Return batches of `rows` rows. Each group of `pool` random rows is sorted by length and cut into batches.

    Bahdanau et al. (2014, appendix B.2) draw 1,600 pairs, sort them, and make 20 batches of 80.
    """
    return Batching(f"{rows} rows of {pool}", sizes.sum(1), pool, [*range(0, len(sizes), rows), len(sizes)])


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
    starts, rows, seen_rows = [0], [first], 0
    while rows[-1] < last:
        next_at = -(-(rows[-1] + 1 - first) * over // (last - first))  # rows after which the batch grows
        steps = max(1, -(-(next_at - seen_rows) // rows[-1]))
        seen_rows += steps * rows[-1]
        starts.append(starts[-1] + steps)
        rows.append(min(last, first + (last - first) * seen_rows // max(1, over)))
    return BatchSizeSchedule(tuple(starts), tuple(rows))

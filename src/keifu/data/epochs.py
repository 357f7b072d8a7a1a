"""Epochs: an endless stream of items with a new order in each epoch and random access by step; and batches of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from keifu.errors import UserError


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

    def __init__(self, n: int, batch_size: int, seed: int, order: Callable[[int], Any] | None = None):
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
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

    def __init__(
        self, n_training: int, n_held: int, batch_size: int, seed: int, order: Callable[[int], Any] | None = None
    ):
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

    def order(self, random: np.random.Generator) -> np.ndarray:
        """Return the indices of all rows in a random order, sorted within each pool."""
        return sort_pools(random.permutation(len(self.keys)), self.keys, self.pool)

    def batches(self, random: np.random.Generator) -> list[np.ndarray]:
        """Return the rows of each batch of an epoch."""
        return np.split(self.order(random), self.bounds[1:-1])

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

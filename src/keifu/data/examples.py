"""Examples with a class each, in batches that are a function of the seed and the step alone; knows no model.

Axes: rows, dim.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

Batch = dict[str, Tensor]
Augment = Callable[[Tensor, Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Split:
    """`inputs` [rows, dim] and `targets` [rows]."""

    inputs: Float[Tensor, "rows dim"]
    targets: Int[Tensor, "rows"]

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self) -> Batch:
        """All rows as one batch."""
        return {"inputs": self.inputs, "targets": self.targets}


class Examples:
    """The training loop's data: every epoch shows every training row once, in an order of its own.

    A batch may reach from one epoch into the next. `augment(inputs, generator)` changes a batch's inputs by random
    numbers that the seed and the step fix.
    """

    def __init__(self, training: Split, held: Split, batch_size: int, seed: int, augment: Augment | None = None):
        self.training, self.held = training, held
        self.batch_size, self.seed, self.augment = min(batch_size, len(training)), seed, augment
        self._order = lru_cache(2)(
            lambda epoch: torch.randperm(len(training), generator=self._generator("order", epoch))
        )

    @property
    def fingerprint(self) -> str:
        """A hash of all rows, the training ones and the held-out ones."""
        digest = hashlib.sha256()
        for split in (self.training, self.held):
            for tensor in (split.inputs, split.targets):
                digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def batch(self, step: int) -> Batch:
        """The rows of that step, counted from 0."""
        first, rows = step * self.batch_size, len(self.training)
        places = range(first, first + self.batch_size)
        epochs = range(places.start // rows, (places.stop - 1) // rows + 1)
        stream = torch.cat([self._order(epoch) for epoch in epochs])
        chosen = stream[first - epochs.start * rows :][: self.batch_size]
        inputs = self.training.inputs[chosen]
        if self.augment:
            inputs = self.augment(inputs, self._generator("augment", step))
        return {"inputs": inputs, "targets": self.training.targets[chosen]}

    def validation(self) -> Iterable[Batch]:
        """The held-out rows, always the same."""
        return [self.held.batch()]

    def _generator(self, use: str, number: int) -> Generator:
        """Random numbers for one use at one place of the run."""
        digest = hashlib.sha256(f"{self.seed} {use} {number}".encode()).digest()
        return Generator().manual_seed(int.from_bytes(digest[:7], "big"))

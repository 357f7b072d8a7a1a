"""Labelled rows of token ids in batches of similar length, a function of the seed and the step; knows no model.

Axes: batch, length.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from keifu.data.lengths import Rows, padded, passes
from keifu.data.pair_batches import ByRows

POOL = 32  # batches whose rows are drawn together and then sorted by length
VALIDATION_TOKENS = 8192  # in a batch of held-out rows


@dataclass(frozen=True, eq=False)
class Encoded:
    """The ids of each text, and the number of its label."""

    rows: Rows
    targets: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(row) for row in self.rows]

    def batch(self, places: Sequence[int], pad_id: int) -> dict[str, Tensor]:
        """Some of the rows: {"tokens": [batch, length], "mask": True on real tokens, "targets": [batch]}."""
        tokens, mask = padded([self.rows[place] for place in places], pad_id)
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        return {"tokens": tokens, "mask": mask, "targets": self.right(places)}

    def right(self, places: Sequence[int]) -> Int64[Tensor, " batch"]:
        """The targets of some rows."""
        return torch.tensor([self.targets[place] for place in places])

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all ids and targets."""
        digest = hashlib.sha256()
        for row, target in zip(self.rows, self.targets, strict=True):
            digest.update(np.array([len(row), target, *row]).tobytes())
        return digest.hexdigest()


class LabelledBatches:
    """The training loop's data: batches as the rows make them (see `Encoded.batch`).

    Every epoch shows every row once. Rows are drawn, those of `POOL` batches are sorted by length, and the batches come
    in a random order: that leaves little padding and little order. The last batch of an epoch may be smaller.
    """

    def __init__(self, training: Encoded, held: Encoded, batch_size: int, seed: int, pad_id: int):
        self.training, self.held, self.seed, self.pad_id = training, held, seed, pad_id
        self.batching = ByRows(np.array(training.lengths)[:, None], batch_size, POOL * batch_size)
        self.batch_size, self.whole = batch_size, len(training) // batch_size
        self._epoch = lru_cache(2)(self._draw)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that show every row once."""
        return len(self.batching.bounds) - 1

    @property
    def fingerprint(self) -> str:
        """Of the training rows and of the held-out ones."""
        return f"{self.training.fingerprint}|{self.held.fingerprint}"

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order, batches = self._epoch(epoch)
        bounds, number = self.batching.bounds, batches[place]
        return self.training.batch(order[bounds[number] : bounds[number + 1]].tolist(), self.pad_id)

    def largest(self) -> dict[str, Tensor]:
        """The batch that needs the most memory, whether or not it is drawn: that of the longest rows."""
        longest = np.argsort(self.batching.lengths)[-self.batch_size :]
        return self.training.batch(longest.tolist(), self.pad_id)

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """The held-out rows, always the same."""
        for places in passes(self.held.lengths, VALIDATION_TOKENS, rows=256):
            yield self.held.batch(places, self.pad_id)

    def _draw(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """An epoch's rows in its order, and its batches in theirs."""
        random = np.random.default_rng([self.seed, epoch])
        order = self.batching.order(random)
        return order, [*random.permutation(self.whole).tolist(), *range(self.whole, self.steps_per_epoch)]

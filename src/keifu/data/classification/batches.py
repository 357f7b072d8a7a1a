"""Batches of labelled examples: texts as token ids, examples of several token sequences, and tensors.

Each batch depends only on the seed and the step. Axes: batch = examples, sequences = of one example, length = tokens;
of tensors: rows, dim.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from keifu.data.classification.examples import Examples
from keifu.data.classification.input_formats import Delimiters, Form, Ids
from keifu.data.epochs import EpochBatches, by_rows
from keifu.data.padding import Rows, length_buckets, stack_rows, stack_sequences
from keifu.errors import UserError

POOL = 32  # batches whose rows are sorted by length together
VALIDATION_TOKENS = 8192  # in a batch of held-out rows


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """The ids of each text, and the number of its label."""

    rows: Rows
    targets: Sequence[int]
    stack = staticmethod(stack_rows)  # makes one tensor of rows, with a mask of real tokens

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(row) for row in self.rows]

    def batch(self, indices: Sequence[int], pad_id: int) -> dict[str, Tensor]:
        """Return a batch of some rows: {"tokens": [batch, length], "mask": True on real tokens, "targets": [batch]}."""
        tokens, mask = self.stack([self.rows[index] for index in indices], pad_id)
        return {"tokens": tokens, "mask": mask, "targets": torch.tensor([self.targets[index] for index in indices])}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all ids and targets."""
        digest = hashlib.sha256()
        for row, target in zip(self.rows, self.targets, strict=True):
            digest.update(np.array([len(row), target, *row]).tobytes())
        return digest.hexdigest()


class LabelledBatches:
    """The training loop's data: batches as the rows make them (see `EncodedTexts.batch`).

    Every epoch has every row once. Rows are shuffled, those of `POOL` batches are sorted by length, and the batches are
    shuffled: that leaves little padding and little order. The last batch of an epoch may be smaller.
    """

    def __init__(self, training: EncodedTexts, held: EncodedTexts, batch_size: int, seed: int, pad_id: int):
        self.training, self.held, self.batch_size, self.pad_id = training, held, batch_size, pad_id
        self.batching = by_rows(np.array(training.lengths)[:, None], batch_size, POOL * batch_size)
        self._epochs = self.batching.epochs(seed, last=int(len(training) % batch_size > 0))
        self.steps_per_epoch = self._epochs.n

    @property
    def fingerprint(self) -> str:
        """A hash of the training rows and of the held-out ones."""
        return f"{self.training.fingerprint}|{self.held.fingerprint}"

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step, counted from 0."""
        return self.training.batch(self._epochs.item(step).tolist(), self.pad_id)

    def largest(self) -> dict[str, Tensor]:
        """Return the batch that needs the most memory, whether or not any step has it: that of the longest rows."""
        longest = np.argsort(self.batching.keys)[-self.batch_size :]
        return self.training.batch(longest.tolist(), self.pad_id)

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """Yield the held-out rows, always the same."""
        for indices in length_buckets(self.held.lengths, VALIDATION_TOKENS, rows=256):
            yield self.held.batch(indices, self.pad_id)


Sequences = Sequence[list[Ids]]  # of each example


class Encoded(NamedTuple):
    """Texts or examples as ids, and how many of them were cut."""

    rows: list[Any]
    cut: int


def encode_form(
    tokenizer: Any, form: Form, marks: Delimiters, examples: Examples, limit: int, cut: bool = False
) -> Encoded:
    """Encode the examples of a form, with their marks, in sequences of at most `limit` tokens.

    cut: take tokens from the ends of the longest texts where needed. Without it a longer example is a `UserError` that
    says where it stands and both lengths.
    """
    texts = list(dict.fromkeys(chain.from_iterable(row.texts for row in examples.rows)))
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    rows, shortened = [], 0
    for row in examples.rows:
        parts = [ids[text] for text in row.texts]
        sequences = form.sequences(parts, marks)
        if (longest := max(map(len, sequences))) > limit:
            if not cut:
                ways = "shorten it, or keep the beginning of its texts with --cut"
                raise UserError(f"{row.where}: this example has {longest} tokens, and {limit} is the most: {ways}.")
            sequences, shortened = form.sequences(parts, marks, limit), shortened + 1
        rows.append(sequences)
    return Encoded(rows, shortened)


def row_size(row: list[Ids]) -> int:
    """Return the tokens of an example, when all its sequences are as long as the longest."""
    return len(row) * max(map(len, row))


@dataclass(frozen=True, eq=False)
class FormBatches(EncodedTexts):
    """`rows` are examples, each a list of sequences; `targets` the number of each one's label or right answer."""

    rows: Sequences
    stack = staticmethod(stack_sequences)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example, padding counted."""
        return [row_size(row) for row in self.rows]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all ids and targets."""
        return hashlib.sha256(repr((list(self.rows), list(self.targets))).encode()).hexdigest()


Batch = dict[str, Tensor]
Augment = Callable[[Tensor, Generator], Tensor]


@dataclass(frozen=True, eq=False)
class LabelledTensors:
    """`inputs` [rows, dim] and `targets` [rows]."""

    inputs: Float[Tensor, "rows dim"]
    targets: Int[Tensor, "rows"]

    def __len__(self) -> int:
        return len(self.targets)


class TensorBatches(EpochBatches):
    """The training loop's data: every epoch shows every training row once, in its own order.

    A batch may reach from one epoch into the next. `augment(inputs, generator)` changes a batch's inputs by random
    numbers that the seed and the step fix.
    """

    def __init__(
        self,
        training: LabelledTensors,
        held: LabelledTensors,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
    ):
        super().__init__(len(training), len(held), min(batch_size, len(training)), seed, self._order)
        self.training, self.held, self.augment = training, held, augment

    @property
    def fingerprint(self) -> str:
        """A hash of all rows, the training ones and the held-out ones."""
        digest = hashlib.sha256()
        for split in (self.training, self.held):
            for tensor in (split.inputs, split.targets):
                digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def make_batch(self, validating: bool, items: np.ndarray) -> Batch:
        """Return some of the rows as they are."""
        rows, chosen = self.held if validating else self.training, torch.from_numpy(items)
        return {"inputs": rows.inputs[chosen], "targets": rows.targets[chosen]}

    def batch(self, step: int) -> Batch:
        """Return the rows of that step, counted from 0, changed by `augment`."""
        batch = super().batch(step)
        if self.augment:
            batch["inputs"] = self.augment(batch["inputs"], self._generator("augment", step))
        return batch

    def validation(self) -> Iterator[Batch]:
        """Yield all held-out rows as one batch."""
        yield self.make_batch(True, np.arange(len(self.held)))

    def _order(self, epoch: int) -> np.ndarray:
        return torch.randperm(len(self.training), generator=self._generator("order", epoch)).numpy()

    def _generator(self, use: str, number: int) -> Generator:
        """Return a generator for one use and one epoch or step."""
        digest = hashlib.sha256(f"{self.seed} {use} {number}".encode()).digest()
        return Generator().manual_seed(int.from_bytes(digest[:7], "big"))

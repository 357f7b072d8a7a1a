"""Batches of labelled examples: texts as token ids, examples of several token sequences, and tensors.

Each batch depends only on the seed and the step. Axes: batch = examples, sequences = of one example, length = tokens;
for tensors: rows, dim.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from keifu.data.classification.examples import Examples
from keifu.data.classification.input_formats import Delimiters, Form, Ids
from keifu.data.classification.tables import LabelledTensors
from keifu.data.epochs import EpochBatches, by_rows
from keifu.data.padding import Rows, length_buckets, stack_rows, stack_sequences
from keifu.errors import UserError
from keifu.files import hash_of

POOL = 32  # number of batches whose rows are sorted by length together
VALIDATION_TOKENS = 8192  # tokens in a batch of held-out rows


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """Token ids of each text, and the index of its label."""

    rows: Rows
    targets: Sequence[int]
    stack = staticmethod(stack_rows)  # converts rows to one tensor with a mask of real tokens
    size = staticmethod(len)  # number of tokens of a row, with padding

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row, with padding."""
        return [self.size(row) for row in self.rows]

    def batch(self, indices: Sequence[int], pad_id: int) -> dict[str, Tensor]:
        """Return a batch of some rows: {"tokens": [batch, length], "mask": True on real tokens, "targets": [batch]}."""
        tokens, mask = self.stack([self.rows[index] for index in indices], pad_id)
        return {"tokens": tokens, "mask": mask, "targets": torch.tensor([self.targets[index] for index in indices])}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all ids and targets."""
        rows = zip(self.rows, self.targets, strict=True)
        return hash_of(np.array([len(row), target, *row]).tobytes() for row, target in rows)


class LabelledBatches:
    """Batches of labelled rows (see `EncodedTexts.batch`).

    Every epoch uses every row once. Rows are shuffled; then those of `POOL` batches are sorted by length; then the
    batches are shuffled. So there is little padding, and the order stays nearly random. The last batch of an epoch may
    be smaller.
    """

    def __init__(self, training: EncodedTexts, validation: EncodedTexts, batch_size: int, seed: int, pad_id: int):
        self.training, self.held_out, self.batch_size, self.pad_id = training, validation, batch_size, pad_id
        self.batching = by_rows(np.array(training.lengths)[:, None], batch_size, POOL * batch_size)
        self._epochs = self.batching.epochs(seed, last=int(len(training) % batch_size > 0))
        self.steps_per_epoch = self._epochs.n
        self.fingerprint = f"{training.fingerprint}|{validation.fingerprint}"

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step, counted from 0."""
        return self.training.batch(self._epochs.item(step).tolist(), self.pad_id)

    def largest(self) -> dict[str, Tensor]:
        """Return the batch of the longest rows, which needs the most memory, whether or not a step uses it."""
        return self.training.batch(np.argsort(self.batching.keys)[-self.batch_size :].tolist(), self.pad_id)

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """Yield the held-out rows in batches, always the same."""
        for indices in length_buckets(self.held_out.lengths, VALIDATION_TOKENS, rows=256):
            yield self.held_out.batch(indices, self.pad_id)


Sequences = Sequence[list[Ids]]  # the token sequences of each example


class Encoded(NamedTuple):
    """Texts or examples as ids, and the number of those that were cut."""

    rows: list[Any]
    cut: int


def encode_form(
    tokenizer: Any, form: Form, marks: Delimiters, examples: Examples, limit: int, cut: bool = False
) -> Encoded:
    """Encode examples with delimiter tokens into sequences of at most `limit` tokens.

    cut: whether the longest texts of a longer example lose tokens at their ends. Otherwise it raises a `UserError` with
    its position and both lengths.
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
    """Return the padded size of an example: the length of its longest sequence times the number of sequences."""
    return len(row) * max(map(len, row))


@dataclass(frozen=True, eq=False)
class FormBatches(EncodedTexts):
    """Batches of examples with several sequences. targets: index of each example's label or right answer."""

    rows: Sequences
    stack = staticmethod(stack_sequences)
    size = staticmethod(row_size)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all ids and targets."""
        return hash_of([repr((list(self.rows), list(self.targets)))])


Batch = dict[str, Tensor]
Augment = Callable[[Tensor, Generator], Tensor] | None


class TensorBatches(EpochBatches):
    """Batches of tensors. Every epoch uses every training row once, in a new order.

    A batch may extend into the next epoch. `augment(inputs, generator)` changes a batch's inputs with random numbers
    that depend on the seed and the step.
    """

    def __init__(
        self,
        training: LabelledTensors,
        validation: LabelledTensors,
        batch_size: int,
        seed: int,
        augment: Augment = None,
    ):
        super().__init__(len(training), len(validation), min(batch_size, len(training)), seed, self._order)
        self.training, self.held_out, self.augment = training, validation, augment

    @property
    def fingerprint(self) -> str:
        """Hash of the training and the held-out rows."""
        tensors = self.training.inputs, self.training.targets, self.held_out.inputs, self.held_out.targets
        facts = ((f"{tuple(tensor.shape)}{tensor.dtype}", tensor.contiguous().numpy().tobytes()) for tensor in tensors)
        return hash_of(chain.from_iterable(facts))

    def make_batch(self, validating: bool, items: np.ndarray) -> Batch:
        """Return these rows without augmentation."""
        rows, indices = self.held_out if validating else self.training, torch.from_numpy(items)
        return {"inputs": rows.inputs[indices], "targets": rows.targets[indices]}

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0, changed by `augment`."""
        batch = super().batch(step)
        if self.augment:
            batch["inputs"] = self.augment(batch["inputs"], self._generator("augment", step))
        return batch

    def validation(self) -> Iterator[Batch]:
        """Yield all held-out rows as one batch."""
        yield self.make_batch(True, np.arange(len(self.held_out)))

    def _order(self, epoch: int) -> np.ndarray:
        return torch.randperm(len(self.training), generator=self._generator("order", epoch)).numpy()

    def _generator(self, use: str, number: int) -> Generator:
        """Return a random generator that depends on the seed, a purpose (`use`), and an epoch or step."""
        digest = hashlib.sha256(f"{self.seed} {use} {number}".encode()).digest()
        return Generator().manual_seed(int.from_bytes(digest[:7], "big"))

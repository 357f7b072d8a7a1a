"""Examples as rows of sequences of token ids, and those in batches; it knows no model.

Axes: batch = examples, sequences = of one example, length = tokens.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from keifu.data.form_tables import Examples
from keifu.data.forms import Ids, Marks
from keifu.data.labelled_batches import Encoded
from keifu.data.lengths import padded
from keifu.errors import UserError

Sequences = Sequence[list[Ids]]  # of each example


@runtime_checkable
class TextEncoder(Protocol):
    """What is needed of a tokenizer."""

    def encode_batch(self, texts: Sequence[str], special: bool = False, allow_special: bool = False) -> list[Ids]: ...


class Laid(NamedTuple):
    """The sequences of each example, and how many examples were cut."""

    rows: list[list[Ids]]
    cut: int


def lay_out(tokenizer: TextEncoder, examples: Examples, marks: Marks, limit: int, cut: bool = False) -> Laid:
    """The ids of examples, their marks among them, in sequences of at most `limit` tokens.

    cut: take tokens from the ends of the longest texts where needed. Without it a longer example is a `UserError` that
    says where it stands and both lengths.
    """
    texts = list(dict.fromkeys(chain.from_iterable(row.texts for row in examples.rows)))
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    rows, shortened = [], 0
    for row in examples.rows:
        parts = [ids[text] for text in row.texts]
        found = examples.form.sequences(parts, marks)
        if (longest := max(map(len, found))) > limit:
            if not cut:
                raise UserError(
                    f"{row.where}: this example has {longest} tokens, and {limit} is the most: shorten it, or keep the "
                    "beginning of its texts with --cut."
                )
            found, shortened = examples.form.sequences(parts, marks, limit), shortened + 1
        rows.append(found)
    return Laid(rows, shortened)


def stacked(
    rows: Sequences, pad_id: int
) -> tuple[Int64[Tensor, "batch sequences length"], Bool[Tensor, "batch sequences length"]]:
    """The examples as one tensor, padded on the right, and what is real in it; an example with fewer sequences than
    another has empty ones at its end."""
    most = max(map(len, rows))
    flat = [sequence for row in rows for sequence in (*row, *([[]] * (most - len(row))))]
    tokens, mask = padded(flat, pad_id)
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    return tokens.unflatten(0, (-1, most)), mask.unflatten(0, (-1, most))


def row_size(row: list[Ids]) -> int:
    """Tokens of an example, when all its sequences are as long as the longest."""
    return len(row) * max(map(len, row))


@dataclass(frozen=True, eq=False)
class FormRows(Encoded):
    """`rows` are examples, each a list of sequences; `targets` the number of each one's label or right answer."""

    rows: Sequences

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example, padding counted."""
        return [row_size(row) for row in self.rows]

    def batch(self, places: Sequence[int], pad_id: int) -> dict[str, Tensor]:
        """Some of the examples: {"tokens" and "mask": [batch, sequences, length], "targets": [batch]}."""
        tokens, mask = stacked([self.rows[place] for place in places], pad_id)
        return {"tokens": tokens, "mask": mask, "targets": self.right(places)}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all ids and targets."""
        return hashlib.sha256(repr((list(self.rows), list(self.targets))).encode()).hexdigest()

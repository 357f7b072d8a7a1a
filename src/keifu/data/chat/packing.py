"""Batches of conversations as token ids, several packed into a row; each batch depends only on the seed and the step.

Axes: row (of a batch), position.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from keifu.data.epochs import Epochs
from keifu.errors import UserError

TooLong = Literal["error", "drop", "truncate"]
NO_DOCUMENT = -1


class TurnMasks(NamedTuple):
    """The token ids of a conversation, and its loss mask: which tokens are trained on."""

    ids: list[int]
    learned: list[bool]


def hash_turns(facts: str, conversations: Iterable[TurnMasks]) -> str:
    """SHA-256 of all ids and masks, and of what else batches depend on."""
    digest = hashlib.sha256(facts.encode())
    for each in conversations:
        digest.update(np.array([len(each.ids), *each.ids, *each.learned], dtype=np.int64).tobytes())
    return digest.hexdigest()


class FittedConversations(NamedTuple):
    """Conversations that fit, and how many were left out or shortened to get them."""

    kept: list[TurnMasks]
    dropped: int
    shortened: int

    def sentence(self, context_length: int) -> str:
        """Return a sentence about the conversations that were too long; "" if there were none."""
        counts = [(self.dropped, "left out"), (self.shortened, f"cut to their first {context_length} tokens")]
        parts = [f"{count:,} were {what}" for count, what in counts if count]
        total = len(self.kept) + self.dropped
        return f"Of {total:,} conversations {' and '.join(parts)}, being longer." if parts else ""


def fit_conversations(
    conversations: Sequence[TurnMasks], context_length: int, too_long: TooLong
) -> FittedConversations:
    """Those of at most context_length tokens; longer ones are a `UserError`, left out, or cut at their end.

    A conversation without a token to train on is left out too.
    """
    long = [len(each.ids) for each in conversations if len(each.ids) > context_length]
    if long and too_long == "error":
        raise UserError(
            f"{len(long):,} of {len(conversations):,} conversations are longer than the {context_length} tokens of a "
            f"row, the longest has {max(long)}: choose --too-long drop or truncate, or a longer --context-length."
        )
    kept, dropped, shortened = [], 0, 0
    for each in conversations:
        cut = TurnMasks(each.ids[:context_length], each.learned[:context_length])
        over = len(each.ids) > context_length
        if (over and too_long == "drop") or not any(cut.learned[1:]):
            dropped += 1
        else:
            kept.append(cut)
            shortened += over
    return FittedConversations(kept, dropped, shortened)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing into rows of at most `capacity` tokens: the places of each row."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of each row that has any, sorted
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        at = bisect_left(room, (lengths[place], -1))  # the smallest room that is large enough
        left, row = room.pop(at) if at < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(place)
        if left > lengths[place]:
            insort(room, (left - lengths[place], row))
    return rows


class PackedConversations:
    """Training data: {"tokens", "mask": True on tokens that are trained on, "documents"}, [row, position] each.

    A row holds several conversations, which `documents` numbers; the padding at its end is a document of its own. The
    packing is fixed; every epoch takes every row once, in an order of its own, and a batch may reach into the next
    epoch. With `packed` False each row is one conversation.
    """

    def __init__(
        self, training: Sequence[TurnMasks], held: Sequence[TurnMasks], context_length: int, batch_size: int, seed: int,
        pad_id: int, packed: bool = True,
    ):  # fmt: skip
        if not training:
            raise UserError("There is no conversation to train on.")
        self.seed, self.pad_id, self.context_length = seed, pad_id, context_length
        self.training, self.held = list(training), list(held)
        self.rows, self.held_rows = (self._rows(part, packed) for part in (training, held))
        self.batch_size = min(batch_size, len(self.rows))
        self._epochs = Epochs(len(self.rows), self.batch_size, seed)
        self.steps_per_epoch = self._epochs.steps
        facts = f"{self.rows} {self.held_rows} {seed} {pad_id}"
        self.fingerprint = hash_turns(facts, (*self.training, *self.held))

    def _rows(self, part: Sequence[TurnMasks], packed: bool) -> list[list[int]]:
        lengths = [len(each.ids) for each in part]
        return pack(lengths, self.context_length) if packed else [[place] for place in range(len(part))]

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step, counted from 0."""
        return self._make_batch(self.training, [self.rows[row] for row in self._epochs.batch(step)])

    def largest(self) -> dict[str, Tensor]:
        """Return the batch that needs the most memory, whether or not any step has it."""
        size = {id(row): sum(len(self.training[place].ids) for place in row) for row in self.rows}
        return self._make_batch(self.training, sorted(self.rows, key=lambda row: -size[id(row)])[: self.batch_size])

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """Yield the held-out conversations, always the same."""
        for first in range(0, len(self.held_rows), self.batch_size):
            yield self._make_batch(self.held, self.held_rows[first : first + self.batch_size])

    def _make_batch(self, part: Sequence[TurnMasks], rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        length = max(sum(len(part[place].ids) for place in row) for row in rows)
        tokens = np.full((len(rows), length), self.pad_id, np.int64)
        mask, documents = np.zeros((len(rows), length), bool), np.full((len(rows), length), NO_DOCUMENT, np.int64)
        for number, row in enumerate(rows):
            at = 0
            for document, place in enumerate(row):
                ids, learned = part[place]
                here = slice(at, at + len(ids))
                tokens[number, here], mask[number, here], documents[number, here] = ids, learned, document
                mask[number, at] = False  # nothing of its own stands before a first token
                at += len(ids)
        made = {"tokens": tokens, "mask": mask, "documents": documents}
        return {name: torch.from_numpy(array) for name, array in made.items()}

"""Batches of conversations as token ids, with several packed into a row. Each batch depends only on the seed and the
step.

Axes: row (of a batch), position.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from keifu.data.epochs import EpochBatches
from keifu.data.padding import pad
from keifu.errors import UserError
from keifu.files import hash_of

TooLong = Literal["error", "drop", "truncate"]
NO_DOCUMENT = -1


class TurnMasks(NamedTuple):
    """The token ids of a conversation, and its loss mask: which tokens are trained on."""

    ids: list[int]
    learned: list[bool]

    @property
    def last_answer(self) -> int:
        """Position at which the last answer begins; 0 if there is none."""
        starts = [i for i, (before, after) in enumerate(pairwise(self.learned), 1) if after and not before]
        return max(starts, default=0)


def hash_turns(facts: str, conversations: Iterable[TurnMasks]) -> str:
    """Return the SHA-256 of all ids and masks, and of `facts`, the settings on which batches depend."""
    rows = (np.array([len(turns.ids), *turns.ids, *turns.learned], dtype=np.int64) for turns in conversations)
    return hash_of(chain([facts], (row.tobytes() for row in rows)))


class FittedConversations(NamedTuple):
    """Conversations that fit the context, with the numbers of those left out and of those shortened."""

    fitting: list[TurnMasks]
    dropped: int
    shortened: int

    def sentence(self, context_length: int) -> str:
        """Return a sentence about the conversations that were too long; "" if there were none."""
        counts = [(self.dropped, "left out"), (self.shortened, f"cut to their first {context_length} tokens")]
        parts = [f"{count:,} were {what}" for count, what in counts if count]
        total = len(self.fitting) + self.dropped
        return f"{total:,} conversations: {' and '.join(parts)}, because they are longer." if parts else ""


def fit_conversations(
    conversations: Sequence[TurnMasks], context_length: int, too_long: TooLong
) -> FittedConversations:
    """Keep conversations of at most context_length tokens. By `too_long`, longer ones raise `UserError`, are left out,
    or are cut at the end.

    A conversation without a trained token is left out too.
    """
    long = [len(turns.ids) for turns in conversations if len(turns.ids) > context_length]
    if long and too_long == "error":
        count = f"{len(long):,} of {len(conversations):,} conversations are longer than the {context_length} tokens"
        ways = "choose --too-long drop or truncate, or a longer --context-length"
        raise UserError(f"{count} of a row, the longest has {max(long)}: {ways}.")
    fitting, dropped, shortened = [], 0, 0
    for turns in conversations:
        cut = TurnMasks(turns.ids[:context_length], turns.learned[:context_length])
        over = len(turns.ids) > context_length
        if (over and too_long == "drop") or not any(cut.learned[1:]):
            dropped += 1
        else:
            fitting.append(cut)
            shortened += over
    return FittedConversations(fitting, dropped, shortened)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack sequences into rows of at most `capacity` tokens by best fit, the longest first. Return the indices in each
    row."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens of each row that has some, sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect_left(room, (lengths[index], -1))  # the smallest free space that is large enough
        free_tokens, row = room.pop(at) if at < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if free_tokens > lengths[index]:
            insort(room, (free_tokens - lengths[index], row))
    return rows


class PackedConversations(EpochBatches):
    """Training data: {"tokens", "mask": True on trained tokens, "documents"}, [row, position] each.

    A row has several conversations, numbered in `documents`; the padding at its end has another number. The packing is
    fixed. Every epoch uses every row once in a new order, and a batch may extend into the next epoch. With packed=False
    each row is one conversation.
    """

    def __init__(
        self, training: Sequence[TurnMasks], validation: Sequence[TurnMasks], context_length: int, batch_size: int,
        seed: int, pad_id: int, packed: bool = True,
    ):  # fmt: skip
        if not training:
            raise UserError("There is no conversation to train on.")
        self.pad_id, self.context_length = pad_id, context_length
        self.training, self.held_out = list(training), list(validation)
        self.rows, self.held_rows = (self._rows(part, packed) for part in (training, validation))
        super().__init__(len(self.rows), len(self.held_rows), min(batch_size, len(self.rows)), seed)
        facts = f"{self.rows} {self.held_rows} {seed} {pad_id}"
        self.fingerprint = hash_turns(facts, (*self.training, *self.held_out))

    def _rows(self, part: Sequence[TurnMasks], packed: bool) -> list[list[int]]:
        lengths = [len(turns.ids) for turns in part]
        return pack(lengths, self.context_length) if packed else [[index] for index in range(len(part))]

    def largest(self) -> dict[str, Tensor]:
        """Return the batch that needs the most memory, whether or not a step uses it."""
        sizes = np.array([sum(len(self.training[index].ids) for index in row) for row in self.rows])
        return self.make_batch(False, np.argsort(-sizes, kind="stable")[: self.batch_size])

    def make_batch(self, validating: bool, items: np.ndarray) -> dict[str, Tensor]:
        """Return the batch of these packed rows. The first token of each conversation is not trained, because nothing
        precedes it."""
        part, rows = (self.held_out, self.held_rows) if validating else (self.training, self.rows)
        packed = [[part[index] for index in rows[item]] for item in items]
        tokens = [[*chain.from_iterable(turns.ids for turns in row)] for row in packed]
        learned = [[*chain.from_iterable((False, *turns.learned[1:]) for turns in row)] for row in packed]
        documents = [[number for number, turns in enumerate(row) for _ in turns.ids] for row in packed]
        return {
            "tokens": pad(tokens, self.pad_id)[0],
            "mask": pad(learned, 0)[0].bool(),
            "documents": pad(documents, NO_DOCUMENT)[0],
        }

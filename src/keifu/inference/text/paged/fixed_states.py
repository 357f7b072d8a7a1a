"""States of fixed size of the sequences of an engine, and their bookkeeping.

A sequence in a model with recurrent layers has, besides keys and values, one state per layer, which each token changes.
A state cannot go back to fewer tokens, so the states at some numbers of tokens are stored: where a sequence may have
to go back because guessed tokens are wrong, and at some borders of blocks, where other sequences may begin
(`KeptStates`). Axes: slots, numbers = of the states of all layers.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, count
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.native.model import Span

NEAREST = 4  # minimal blocks between two borders


def is_border(blocks: int) -> bool:
    """Return whether the state after this number of full blocks is kept for other sequences.

    The distance between borders grows with the number of blocks, so that a sequence that shares a beginning computes at
    most an eighth of it again, or three blocks.
    """
    return blocks % max(NEAREST, (1 << blocks.bit_length()) >> 4) == 0


class KeptStates:
    """Names of the kept states in `count` slots. If all slots are taken, the least recently used state is dropped.

    The state in a slot is known by the hash of all tokens before it, as a block is. A slot is first reserved for a
    state that a step will compute, and then has its name. A state that a sequence will begin from is not dropped.
    """

    def __init__(self, count: int):
        self._never_used = iter(range(count))
        self._empty: list[int] = []
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # the least recently used first
        self._users: Counter[int] = Counter()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._slot_of

    def reserve(self) -> int | None:
        """Return a slot for a new state; None if none is free."""
        if not self._empty:
            if (slot := next(self._never_used, None)) is not None:
                return slot
            unused = (digest for digest, slot in self._slot_of.items() if not self._users[slot])
            self.forget(next(unused, b""))
        return self._empty.pop() if self._empty else None

    def cancel(self, slot: int) -> None:
        """Return a reserved slot."""
        self._empty.append(slot)

    def remember(self, slot: int, digest: bytes) -> None:
        """Name the state that was computed in a reserved slot. If there is an equal state, the slot is free again."""
        if digest in self._slot_of:
            self.cancel(slot)
        else:
            self._slot_of[digest] = slot

    def use(self, digest: bytes) -> int:
        """Return the slot of a state, and add a user of it."""
        self._slot_of.move_to_end(digest)
        slot = self._slot_of[digest]
        self._users[slot] += 1
        return slot

    def release(self, slot: int) -> None:
        """Remove a user of a state."""
        self._users[slot] -= 1

    def forget(self, digest: bytes) -> None:
        """Drop a state if it is there, because its slot or its last block is needed. It has no users."""
        if (slot := self._slot_of.pop(digest, None)) is not None:
            self._empty.append(slot)


class Stop(NamedTuple):
    """Token of a span after which the state is stored. tokens: number of the span's tokens up to it. slot: of the
    sequence; None if it cannot go back to this token. kept: slot for other sequences; None if it is not kept for
    them."""

    tokens: int
    slot: int | None
    kept: int | None

    @property
    def kind(self) -> tuple[int, bool, bool]:
        """Spans that are computed together have stops of the same kind."""
        return self.tokens, self.slot is not None, self.kept is not None


class SpanStates(NamedTuple):
    """Slot of the state before a span, and the stops in it. The last stop is the span's last token."""

    before: int
    stops: list[Stop]


class FixedStates:
    """States of running sequences in `numbers`, and of shared beginnings in `kept`. Slot 0 of `numbers` is the initial
    state.

    A running sequence has the state before its last step, from which an interrupted step is repeated, the state after
    it, and those after tokens to which it may go back. limit: number of kept states. make: allocates their
    memory; on a CPU at once for all, because the system provides it at the first write.
    """

    def __init__(
        self, widths: Sequence[int], device: torch.device, make: Callable[[Tensor, tuple[int, ...]], Tensor],
        limit: int,
    ):  # fmt: skip
        self.ends = list(accumulate(widths))
        self.row_bytes = 8 * self.ends[-1]
        self.numbers = torch.zeros(1, self.ends[-1], device=device)
        self.kept, self._make, self._limit = self.numbers[:0], make, limit
        self._slots: dict[int, dict[int, int]] = {}  # of each sequence, by its number of tokens

    def kinds(self, span: Span) -> list[tuple[int, bool, bool]]:
        """Return the kinds of the stops of a span."""
        return [stop.kind for stop in self._stops(span, iter(range(len(span.tokens))))] if self.row_bytes else []

    def begin(self, spans: Sequence[Span]) -> list[SpanStates]:
        """Return the slots of the states before and after the spans of a step; an empty list without states."""
        if not self.row_bytes:
            return []
        used = {slot for slots in self._slots.values() for slot in slots.values()}
        free = (slot for slot in count(1) if slot not in used)
        begun = [(self._before(span, free), self._stops(span, free)) for span in spans]
        largest = max(slot for before, stops in begun for slot in (before, *(stop.slot or 0 for stop in stops)))
        if (lacking := largest + 1 - len(self.numbers)) > 0:
            more = self.numbers.new_zeros(max(lacking, len(self.numbers)), self.ends[-1])
            self.numbers = torch.cat([self.numbers, more])
        kept = [-1 if stop.kept is None else stop.kept for _, stops in begun for stop in stops]
        if (needed := max(kept) + 1) > (old := len(self.kept)):
            lazy = self.numbers.device.type == "cpu"
            grown = self._make(
                self.numbers, (self._limit if lazy else min(self._limit, max(needed, 2 * old)), self.ends[-1])
            )
            grown[:old] = self.kept
            self.kept = grown
        for span, (before, _) in zip(spans, begun, strict=True):
            if span.start and span.start not in self._slots.get(span.sequence, {}):
                self.numbers[before] = self.kept[span.origin]
                self._slots[span.sequence] = {span.start: before}
        return [SpanStates(*slots) for slots in begun]

    def _before(self, span: Span, free: Iterator[int]) -> int:
        if not span.start:
            return 0
        slot = self._slots.get(span.sequence, {}).get(span.start)
        return next(free) if slot is None else slot

    def _stops(self, span: Span, free: Iterator[int]) -> list[Stop]:
        """Return the stops of a span, with free slots for the sequence."""
        end = span.start + len(span.tokens)
        own = {*range(max(span.start + 1, end - span.guesses), end + 1)}
        positions = sorted(own | span.borders.keys())
        return [Stop(at - span.start, next(free) if at in own else None, span.borders.get(at)) for at in positions]

    def advance(self, spans: Sequence[Span], states: Sequence[SpanStates]) -> None:
        """Record the states of a step as the present ones."""
        for span, (before, stops) in zip(spans, states, strict=False):
            last = span.start + len(span.tokens) - span.guesses  # the sequence does not go back further
            slots = {at: slot for at, slot in self._slots.get(span.sequence, {}).items() if last <= at < span.start}
            new = {span.start + stop.tokens: stop.slot for stop in stops if stop.slot is not None}
            self._slots[span.sequence] = slots | {span.start: before} | new

    def latest(self, sequence: int, most: int) -> int:
        """Return the largest number of tokens, at most `most`, after which the state of a sequence is stored."""
        return max((at for at in self._slots.get(sequence, {}) if at <= most), default=0)

    def forget(self, sequence: int) -> None:
        """Free the states of a sequence, except kept ones."""
        self._slots.pop(sequence, None)

    def layer(self, index: int) -> tuple[Float[Tensor, "slots numbers"], Float[Tensor, "kept numbers"]]:
        """Return the numbers of one layer: of running sequences, and of kept states."""
        part = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return self.numbers[:, part], self.kept[:, part]

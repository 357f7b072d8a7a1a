"""Scheduler: selects the sequences of the next step, and the number of tokens of each.

First come, first served. Generating sequences go first, one token each. The remaining tokens of the step go to prompts,
in chunks, so that a long prompt does not delay the others (Sarathi, Agrawal et al., 2023). A request waits until there
are blocks for its whole prompt. If blocks run out, the newest sequence loses its blocks and is recomputed later
(preemption by recomputation; vLLM, Kwon et al., 2023, section 4.5). If every layer has a sliding window, a sequence
frees blocks that no later token attends to.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence as Tokens
from dataclasses import dataclass, field, replace
from itertools import takewhile

from keifu.inference.text.paged.blocks import BlockManager
from keifu.inference.text.paged.fixed_states import is_border
from keifu.inference.text.paged.stored import StoredPrefixes
from keifu.inference.text.request import Piece, Request
from keifu.native.model import Span

NGRAM = 3  # number of last tokens that are searched for a guess
LEAST_ROOM = 512  # minimal tokens of a sequence's room, if its blocks are to be consecutive


@dataclass(eq=False)
class Sequence:
    """Waiting or running request: its tokens so far, and the number of those whose keys and values are in its blocks.

    guesses: possible next tokens; they are computed with the last one, and kept while they are right. admitted: whether
    it has run before; blocks that a preempted sequence finds again were computed for it. passed: number of its first
    blocks that are before the window and not its own any more. sources: blocks that its next span copies into its first
    blocks. origin: slot of the kept state of fixed size that its next span begins from. borders: numbers of blocks
    after which its state is kept for other sequences, besides those of `is_border`. slots: reserved slots of states
    that are not computed yet, by number of tokens.
    """

    number: int
    request: Request
    tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    admitted: bool = False
    passed: int = 0
    sources: list[int] = field(default_factory=list)
    origin: int | None = None
    borders: set[int] = field(default_factory=set)
    slots: dict[int, int] = field(default_factory=dict)
    hashes: list[bytes] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)
    stored: int = 0
    began: int = field(default_factory=time.time_ns)
    _after: dict[tuple[int, ...], int] = field(default_factory=dict)  # position after three tokens,
    _known: int = NGRAM  # number of tokens in `_after`

    @property
    def left(self) -> int:
        """Number of tokens that are not computed yet: one during generation, more while the prompt is read."""
        return len(self.tokens) - self.computed

    @property
    def room(self) -> int:
        """Number of tokens that may follow after the next one."""
        return self.request.limit - len(self.request.tokens) - 1

    def span(self, count: int, borders: Mapping[int, int]) -> Span:
        """Return the next `count` tokens for the runner. Logits are wanted after the last one and after each guess.
        borders: slots of states to keep."""
        tokens = self.tokens[self.computed : self.computed + count] + self.guesses
        guesses = len(self.guesses)
        wanted = 1 + guesses if count == self.left else 0
        prompt = len(self.request.prompt)
        states = guesses, borders, self.origin
        images = self.request.images
        return Span(self.number, tokens, self.computed, self.blocks, wanted, self.sources, images, prompt, *states)

    def take(self, figures: Iterable[float]) -> Piece:
        """Append the sampled token, and return its piece of text."""
        piece = self.request.take(*figures)
        self.tokens.append(piece.token)
        return piece

    def guess(self, most: int) -> None:
        """Guess that the tokens after the last occurrence of the last three tokens follow again."""
        for end in range(self._known, len(self.tokens)):
            self._after[tuple(self.tokens[end - NGRAM : end])] = end
        self._known = max(self._known, len(self.tokens))
        start = self._after.get(tuple(self.tokens[-NGRAM:]), len(self.tokens))
        self.guesses = self.tokens[start : start + min(most, self.room)]


class Scheduler:
    """Scheduler of waiting and running sequences. step_tokens, max_running: maximal tokens and sequences of a step.

    contiguous: whether the runner is fastest if a sequence's blocks are consecutive. stored: beginnings of texts in a
    cache folder; None: there is none.
    """

    def __init__(
        self, blocks: BlockManager, max_running: int, step_tokens: int, contiguous: bool,
        stored: StoredPrefixes | None = None,
    ):  # fmt: skip
        self.stored = stored
        self.contiguous = contiguous
        self.blocks, self.max_running, self.step_tokens = blocks, max_running, max(step_tokens, max_running)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of admission
        self.preempted: list[Sequence] = []  # in the last `schedule`

    def add(self, sequence: Sequence) -> None:
        """Add a request at the end of the queue."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended or was aborted."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Span]:
        """Return the spans of the next step. After computing, call `done` for each of them."""
        self.preempted = []
        budget = self.step_tokens
        chosen: list[tuple[Sequence, int]] = []
        for sequence in list(self.running):
            count = min(sequence.left, budget)
            if sequence not in self.running or not count:
                continue  # preempted for an earlier one, or waits for the next step
            sequence.guesses = sequence.guesses[: max(0, budget - count)] if sequence.left == 1 else []
            if self._extend(sequence, sequence.computed + count + len(sequence.guesses)):
                chosen.append((sequence, count))
                budget -= count + len(sequence.guesses)
        if self.waiting and not self.preempted:
            chosen += self._admit(budget)
        if self.blocks.states is None:
            return [sequence.span(count, {}) for sequence, count in chosen]
        return [
            sequence.span(count, self._slots(sequence, count + len(sequence.guesses))) for sequence, count in chosen
        ]

    def following(self, spans: list[Span]) -> list[Span]:
        """Return the spans of the step after one whose tokens are not known yet; an empty list if it depends on them.

        It does not if the same sequences continue: all running ones generate in both steps, no waiting one can be
        admitted, and there are enough blocks. A span then has, instead of its token, the token's row in the running
        step. `done` is called for both steps, in order.
        """
        pairs = list(zip(self.running, spans, strict=False))
        same = len(spans) == len(self.running) and all(s.number == span.sequence for s, span in pairs)
        writes = all(span.wanted == 1 and sequence.room > 0 for sequence, span in pairs)
        admits = self.waiting and len(self.running) < self.max_running
        ends = [span.start + len(span.tokens) for span in spans]
        lacking = [self._blocks_for(end + 1) - len(s.blocks) for end, (s, _) in zip(ends, pairs, strict=False)]
        if not (same and writes) or admits or sum(max(0, count) for count in lacking) > self.blocks.free:
            return []
        for s, count in zip(self.running, lacking, strict=True):
            if count > 0:
                s.blocks = s.blocks + self.blocks.allocate(count, s.blocks[-1], self._room(s))
        new = enumerate(zip(ends, pairs, strict=True))
        return [
            replace(x, tokens=[row], start=end, blocks=s.blocks, sources=(), borders=self._slots(s, 1, end))
            for row, (end, (s, x)) in new
        ]

    def restart(self) -> list[Sequence]:
        """Preempt all running sequences, and return them. They are recomputed from their first tokens."""
        running = [*self.running]
        for sequence in reversed(running):
            self._preempt(sequence)
        return running

    def done(self, sequence: Sequence, count: int) -> None:
        """Record that `count` more tokens of a sequence are computed. Its full blocks may be shared from now on."""
        if sequence.sources or sequence.origin is not None:
            self._forget_origin(sequence)
        size = self.blocks.block_size
        before, sequence.computed = sequence.computed // size, sequence.computed + count
        if sequence.computed // size > before:
            self._hash(sequence)
            full = slice(before, sequence.computed // size)
            for block, digest in zip(sequence.blocks[full], sequence.hashes[full], strict=False):
                self.blocks.remember(block, digest)
        if sequence.slots:
            for tokens in [tokens for tokens in sequence.slots if tokens <= sequence.computed]:
                self.blocks.remember_state(sequence.slots.pop(tokens), sequence.hashes[tokens // size - 1])
        if self.stored is not None:
            self._store(sequence, self.stored)
        if self.blocks.window is not None:
            passed = self.blocks.passed(sequence.computed)
            self.blocks.release(sequence.blocks[sequence.passed : passed])
            sequence.passed = passed

    def _admit(self, budget: int) -> Iterator[tuple[Sequence, int]]:
        """Admit waiting sequences while there are tokens and blocks for them. Yield each with its number of tokens."""
        filling = {digest: sequence for sequence in self.running for digest in self._unfilled(sequence)}
        for sequence in list(self.waiting):
            if not budget or len(self.running) >= self.max_running:
                return
            self._hash(sequence)
            wanted = sequence.hashes[: (len(sequence.tokens) - 1) // self.blocks.block_size]  # without the last
            if self.stored is not None and not sequence.admitted:
                self._restore(sequence, wanted, self.stored)
            prefix = self.blocks.prefix(wanted)
            if (writer := next((filling.get(digest) for digest in wanted[prefix.known :][:1]), None)) is not None:
                pairs = zip(wanted, writer.hashes, strict=False)
                writer.borders.add(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
                continue  # a running sequence computes the same block: wait for it
            known = prefix.known * self.blocks.block_size  # with windows, reading a prompt frees blocks again
            reach = min(len(sequence.tokens), known + self.step_tokens + (self.blocks.window or len(sequence.tokens)))
            start = self.blocks.begin(wanted, self._blocks_for(reach), self._room(sequence))
            if start is None:
                return
            self.waiting.remove(sequence)
            sequence.blocks, sequence.sources, sequence.origin = start.blocks, start.sources, start.origin
            sequence.computed, sequence.passed = start.known * self.blocks.block_size, start.passed
            sequence.borders |= {prefix.cached, len(wanted)}  # where it leaves another sequence, and its last one
            if not sequence.admitted:
                sequence.admitted, sequence.request.cached = True, sequence.computed
            self.running.append(sequence)
            filling.update(dict.fromkeys(self._unfilled(sequence), sequence))
            count = min(sequence.left, budget)
            budget -= count
            yield sequence, count

    def _slots(self, sequence: Sequence, count: int, start: int | None = None) -> dict[int, int]:
        """Reserve slots for the states to keep of the next `count` tokens. Return them by number of tokens before each
        border. start: number of tokens before these, if the sequence is further than `computed`."""
        states, size, slots = self.blocks.states, self.blocks.block_size, sequence.slots
        if states is None:
            return {}
        first = sequence.computed if start is None else start
        blocks = range(first // size + 1, (first + count) // size + 1)
        for number in (number for number in blocks if is_border(number) or number in sequence.borders):
            known = number <= len(sequence.hashes) and sequence.hashes[number - 1] in states
            if number * size not in slots and not known and (slot := states.reserve()) is not None:
                slots[number * size] = slot
        return {number * size: slots[number * size] for number in blocks if number * size in slots}

    def _restore(self, sequence: Sequence, hashes: list[bytes], stored: StoredPrefixes) -> None:
        """Read blocks of a sequence's beginning from the cache folder if they fit the memory. They are then cached
        blocks that no sequence uses yet."""
        known = self.blocks.shared(hashes)
        reach = stored.reach(hashes, len(known))
        lacking = reach - len(known) if reach > self.blocks.prefix(hashes).known else 0
        needed = self._blocks_for(len(sequence.tokens)) - len(known) + self.blocks.unused(known)
        if lacking <= 0 or needed > self.blocks.free:
            return
        self.blocks.share(known)
        blocks = self.blocks.allocate(lacking, known[-1] if known else None, self._room(sequence))
        try:
            count = stored.restore(self._identity(sequence), hashes, len(known), blocks)
            for block, digest in zip(blocks[:count], hashes[len(known) :], strict=False):
                self.blocks.remember(block, digest)
        finally:
            self.blocks.release(known + blocks)

    def _store(self, sequence: Sequence, stored: StoredPrefixes) -> None:
        """Give the full groups of a sequence's blocks to the cache folder, except those that are not its own any
        more."""
        full = sequence.computed // self.blocks.block_size // stored.count
        groups = range(sequence.stored, full)
        if groups and groups[0] * stored.count >= sequence.passed:
            stored.save(self._identity(sequence), sequence.hashes, sequence.blocks, groups, sequence.began)
            sequence.stored = full

    def _extend(self, sequence: Sequence, length: int) -> bool:
        """Allocate blocks up to `length` tokens of a running sequence. Return False if it was preempted instead."""
        lacking = self._blocks_for(length) - len(sequence.blocks)
        while lacking > self.blocks.free:
            last = self.running[-1]
            self._preempt(last)
            if last is sequence:
                return False
        if lacking > 0:
            self._grow(sequence, lacking)
        return True

    def _grow(self, sequence: Sequence, lacking: int) -> None:
        """Add `lacking` blocks to a sequence. Move it if its blocks are to be consecutive and cannot be otherwise."""
        total, room = len(sequence.blocks) + lacking, self._room(sequence)
        moves = room and not sequence.passed and not sequence.sources and not self.blocks.can_follow(sequence.blocks)
        if moves and self.blocks.has_run(total) and total <= self.blocks.free:
            sequence.sources = sequence.blocks
            sequence.blocks = self.blocks.allocate(total, room=room)
        else:
            sequence.blocks = sequence.blocks + self.blocks.allocate(lacking, sequence.blocks[-1], room)

    def _room(self, sequence: Sequence) -> int:
        """Return the number of blocks that a sequence will probably need, as a power of two. Equal numbers put
        sequences at equal distances, so that the runner attends to them together. 0 if blocks need not be
        consecutive."""
        if not self.contiguous:
            return 0
        left = sequence.request.limit - len(sequence.request.tokens)
        tokens = max(LEAST_ROOM, len(sequence.tokens) + min(left, LEAST_ROOM // 2))
        return 1 << (self._blocks_for(tokens) - 1).bit_length()

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preempted.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks[sequence.passed :])
        self._forget_origin(sequence)
        while sequence.slots and self.blocks.states is not None:
            self.blocks.states.cancel(sequence.slots.popitem()[1])
        sequence.blocks, sequence.guesses = [], []
        sequence.passed = sequence.computed = 0

    def _forget_origin(self, sequence: Sequence) -> None:
        """Release the blocks that a sequence copies and the state that it begins from."""
        self.blocks.release(sequence.sources)
        if sequence.origin is not None and self.blocks.states is not None:
            self.blocks.states.release(sequence.origin)
        sequence.sources, sequence.origin = [], None

    def _hash(self, sequence: Sequence) -> None:
        start = len(sequence.hashes) * self.blocks.block_size
        sequence.hashes = self.blocks.digests(self._identity(sequence, start), sequence.hashes)

    def _identity(self, sequence: Sequence, start: int = 0) -> Tokens[int]:
        """Return the tokens of a sequence, correct from index `start` on, with pictures identified by their content."""
        images = sequence.request.images
        return sequence.tokens if images is None else images.identity(sequence.tokens, start)

    def _unfilled(self, sequence: Sequence) -> list[bytes]:
        """Return the hashes of the blocks that a sequence will fill while its prompt is read."""
        return sequence.hashes[sequence.computed // self.blocks.block_size :]

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.blocks.block_size)

"""The scheduler: which sequences take part in the next step, and with how many tokens each.

First come, first served. Sequences that write go first, one token each; what is left of the step's tokens goes to
prompts, in chunks, so that a long prompt does not stall the others (Sarathi, Agrawal et al., 2023). A request waits
until there are blocks for its whole prompt. Where blocks run out, the sequence that came last loses its own, and is
computed again later (preemption by recomputation; vLLM, Kwon et al., 2023, section 4.5). Where every layer has a
sliding window, a sequence gives up the blocks that no later token sees.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from keifu.generation.text.blocks import BlockManager
from keifu.generation.text.request import Piece, Request
from keifu.native.model import Span

NGRAM = 3  # tokens by which a guess is found
LEAST_ROOM = 512  # tokens for which a sequence gets room, where its blocks are to be consecutive


@dataclass(eq=False)
class Sequence:
    """A request that waits or runs: its tokens so far, and how many of them have their keys and values in its blocks.

    guesses: tokens that may come next; they are computed with the last one, and kept as far as they are right.
    admitted: whether it has run before, since what a preempted sequence finds again was its own.
    passed: how many of its first blocks lie before the window, and are its own no longer.
    sources: blocks that its next span copies into its first blocks.
    """

    number: int
    request: Request
    tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    admitted: bool = False
    passed: int = 0
    sources: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)
    _after: dict[tuple[int, ...], int] = field(default_factory=dict)  # where three tokens stood last, and how many of
    _known: int = NGRAM  # the tokens it was made from

    @property
    def left(self) -> int:
        """Tokens that are not computed yet: one while it writes, more while its prompt is read."""
        return len(self.tokens) - self.computed

    @property
    def room(self) -> int:
        """Tokens that may follow after the next one."""
        return self.request.limit - len(self.request.tokens) - 1

    def span(self, count: int) -> Span:
        """Return its next `count` tokens for the runner, with logits wanted after the last one and after each guess."""
        tokens = self.tokens[self.computed : self.computed + count] + self.guesses
        wanted = 1 + len(self.guesses) if count == self.left else 0
        prompt = len(self.request.prompt)
        return Span(self.number, tokens, self.computed, self.blocks, wanted, self.sources, self.request.images, prompt)

    def take(self, figures: Iterable[float]) -> Piece:
        """Append the token that the sampler chose, and return its piece of text."""
        piece = self.request.take(*figures)
        self.tokens.append(piece.token)
        return piece

    def guess(self, most: int) -> None:
        """Guess that what followed the last three tokens when they came before follows again."""
        for end in range(self._known, len(self.tokens)):
            self._after[tuple(self.tokens[end - NGRAM : end])] = end
        self._known = max(self._known, len(self.tokens))
        start = self._after.get(tuple(self.tokens[-NGRAM:]), len(self.tokens))
        self.guesses = self.tokens[start : start + min(most, self.room)]


class Scheduler:
    """Waiting and running sequences. `step_tokens`: the most tokens of a step, and `max_running`: of sequences.

    window: the last tokens that a token sees in any layer, itself included; None: all of them. contiguous: whether the
    runner reads consecutive blocks fastest.
    """

    def __init__(
        self, blocks: BlockManager, max_running: int, step_tokens: int, window: int | None = None,
        contiguous: bool = False,
    ):  # fmt: skip
        self.window = window or 1 << 62
        self.contiguous = contiguous
        self.blocks, self.max_running, self.step_tokens = blocks, max_running, max(step_tokens, max_running)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by the order in which they were admitted
        self.preempted: list[Sequence] = []  # by the last `schedule`

    def add(self, sequence: Sequence) -> None:
        """Add a request: it waits behind the others."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that has ended or is given up."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Span]:
        """Choose the spans of the next step; `done` follows for each of them when it has been computed."""
        self.preempted = []
        budget = self.step_tokens
        spans: list[Span] = []
        for sequence in list(self.running):
            count = min(sequence.left, budget)
            if sequence not in self.running or not count:
                continue  # it was preempted for an earlier one, or waits for the next step
            sequence.guesses = sequence.guesses[: max(0, budget - count)] if sequence.left == 1 else []
            if self._extend(sequence, sequence.computed + count + len(sequence.guesses)):
                spans.append(sequence.span(count))
                budget -= count + len(sequence.guesses)
        if self.waiting and not self.preempted:
            spans += self._admit(budget)
        return spans

    def following(self, spans: list[Span]) -> list[Span]:
        """Return the spans of the step after one that runs, whose tokens are not known yet; none if it needs them.

        It does not if the same sequences go on: all that run write in both steps, nobody who waits could be admitted,
        and there are blocks for all. Instead of its token, a span has the row of the token among those of the step
        that runs. `done` is called for each of both steps, in their order.
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
        return [replace(x, tokens=[row], start=end, blocks=s.blocks, sources=()) for row, (end, (s, x)) in new]

    def restart(self) -> list[Sequence]:
        """Preempt all running sequences, and return them: they are computed again from their first tokens."""
        running = [*self.running]
        for sequence in reversed(running):
            self._preempt(sequence)
        return running

    def done(self, sequence: Sequence, count: int) -> None:
        """Note that more of a sequence's tokens were computed: its full blocks may be shared from now on."""
        self.blocks.release(sequence.sources)
        sequence.sources = []
        size = self.blocks.block_size
        before, sequence.computed = sequence.computed // size, sequence.computed + count
        if sequence.computed // size > before:
            self._hash(sequence)
            full = slice(before, sequence.computed // size)
            for block, digest in zip(sequence.blocks[full], sequence.hashes[full], strict=False):
                self.blocks.remember(block, digest)
        passed = max(0, sequence.computed - self.window + 1) // size
        self.blocks.release(sequence.blocks[sequence.passed : passed])
        sequence.passed = passed

    def _admit(self, budget: int) -> Iterator[Span]:
        """Admit waiting sequences while there are tokens and blocks for them."""
        filling = {digest for sequence in self.running for digest in self._unfilled(sequence)}
        for sequence in list(self.waiting):
            if not budget or len(self.running) >= self.max_running:
                return
            self._hash(sequence)
            wanted = sequence.hashes[: (len(sequence.tokens) - 1) // self.blocks.block_size]  # the last one is computed
            shared = self.blocks.shared(wanted)
            if any(digest in filling for digest in wanted[len(shared) :][:1]):
                continue  # a sequence that runs computes what this one needs: it waits for that
            known = len(shared) * self.blocks.block_size  # with windows, blocks are free again while the prompt is read
            reach = min(len(sequence.tokens), known + self.step_tokens + self.window)
            start = self.blocks.begin(wanted, self._blocks_for(reach), self._room(sequence))
            if start is None:
                return
            self.waiting.remove(sequence)
            sequence.blocks, sequence.sources = start.blocks, start.sources
            sequence.computed = start.known * self.blocks.block_size
            if not sequence.admitted:
                sequence.admitted, sequence.request.cached = True, sequence.computed
            self.running.append(sequence)
            filling.update(self._unfilled(sequence))
            count = min(sequence.left, budget)
            budget -= count
            yield sequence.span(count)

    def _extend(self, sequence: Sequence, length: int) -> bool:
        """Allocate blocks for the tokens of a running sequence; return False if it had to give up its own instead."""
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
        """Add blocks to a sequence, and move it if they are to be consecutive and cannot be otherwise."""
        total, room = len(sequence.blocks) + lacking, self._room(sequence)
        moves = room and not sequence.passed and not sequence.sources and not self.blocks.can_follow(sequence.blocks)
        if moves and self.blocks.has_run(total) and total <= self.blocks.free:
            sequence.sources = sequence.blocks
            sequence.blocks = self.blocks.allocate(total, room=room)
        else:
            sequence.blocks = sequence.blocks + self.blocks.allocate(lacking, sequence.blocks[-1], room)

    def _room(self, sequence: Sequence) -> int:
        """Return blocks that a sequence will probably have, a power of two and often the same: then sequences are at
        equal distances, and the runner attends to them together. 0 where their places do not matter."""
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
        self.blocks.release(sequence.sources)
        sequence.blocks, sequence.sources, sequence.guesses = [], [], []
        sequence.passed = sequence.computed = 0

    def _hash(self, sequence: Sequence) -> None:
        images, start = sequence.request.images, len(sequence.hashes) * self.blocks.block_size
        known = sequence.tokens if images is None else images.identity(sequence.tokens, start)
        sequence.hashes = self.blocks.digests(known, sequence.hashes)

    def _unfilled(self, sequence: Sequence) -> list[bytes]:
        """Return the hashes of the blocks that a sequence has still to fill, while its prompt is read."""
        return sequence.hashes[sequence.computed // self.blocks.block_size :]

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.blocks.block_size)

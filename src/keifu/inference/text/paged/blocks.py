"""Block manager: assigns blocks of the key-value memory to sequences, and shares blocks between them.

A full block is identified by a hash of all tokens before and in it, so sequences with the same beginning share blocks
(PagedAttention, Kwon et al., 2023; automatic prefix caching of vLLM). An unused block keeps its content until its
memory is needed. The least recently used is freed first; of one sequence, the last block before the first.

Some runners read keys and values fastest if the blocks of a sequence are consecutive. For them a sequence gets free
room after its last block, and blocks that would be shared with a running sequence are copied instead.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import takewhile
from typing import NamedTuple

from keifu.inference.text.paged.fixed_states import KeptStates


def digests(tokens: Sequence[int], block_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """Return the hash of every full block: of its tokens and all tokens before it. known: hashes of the first
    blocks."""
    hashes = list(known)
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        block = array("q", tokens[start : start + block_size]).tobytes()
        hashes.append(blake2b((hashes[-1] if hashes else b"") + block, digest_size=16).digest())
    return hashes


class Prefix(NamedTuple):
    """Cached beginning of a sequence.

    known: number of its blocks. passed: number of the first of them that no later token attends to. blocks: the others.
    cached: number of blocks whose keys and values are cached; more than `known` if the state after them is not kept.
    """

    known: int
    passed: int
    blocks: list[int]
    cached: int


class Start(NamedTuple):
    """Blocks of a new sequence.

    blocks: its block table. sources: blocks to copy into the first of these before the first step; the sequence uses
    them until then. known: number of its first blocks that are already computed. passed: number of the first of these
    that no token will attend to, so that they are not its own. origin: slot of the kept state after the known blocks.
    """

    blocks: list[int]
    sources: list[int]
    known: int
    passed: int
    origin: int | None


class Gaps:
    """Runs of empty blocks. Adjacent runs are joined."""

    def __init__(self, n_blocks: int):
        self.stops = {0: n_blocks} if n_blocks else {}  # by start
        self._starts = {n_blocks: 0} if n_blocks else {}  # by stop

    def add(self, block: int) -> int:
        """Add an empty block and return the start of its run."""
        start = self._starts.pop(block, block)
        stop = self.stops.pop(block + 1, block + 1)
        self.stops[start] = stop
        self._starts[stop] = start
        return start

    def take(self, start: int, first: int, count: int) -> None:
        """Remove `count` blocks, from `first` on, from the run that begins at `start`."""
        stop = self.stops.pop(start)
        del self._starts[stop]
        for begin, end in ((start, first), (first + count, stop)):
            if begin < end:
                self.stops[begin] = end
                self._starts[end] = begin


class BlockManager:
    """Manager of `n_blocks` blocks of `block_size` tokens: their users and contents. sharing: whether sequences may
    share blocks.

    states: the kept states of fixed size, without which a sequence cannot begin after shared blocks; None for a model
    without such states. window: the number of last tokens that a token attends to, including itself; None: all.
    """

    def __init__(
        self, n_blocks: int, block_size: int, sharing: bool = True, states: KeptStates | None = None,
        window: int | None = None,
    ):  # fmt: skip
        self.n_blocks, self.block_size, self.sharing = n_blocks, block_size, sharing
        self.states, self.window = states, window
        self._users: dict[int, int] = {}  # number of users of each block in use
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # cached contents; the least recently used first
        self._gaps = Gaps(n_blocks)
        self._reach: dict[int, int] = {}  # by last block of a sequence: the end of the room after it

    def digests(self, tokens: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """Return the hashes for sharing full blocks; an empty list if blocks are not shared."""
        return digests(tokens, self.block_size, known) if self.sharing else []

    @property
    def free(self) -> int:
        """Number of blocks that no sequence uses."""
        return self.n_blocks - len(self._users)

    def passed(self, tokens: int) -> int:
        """Return how many blocks no token after the first `tokens` attends to."""
        return 0 if self.window is None else max(0, tokens - self.window + 1) // self.block_size

    def shared(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the cached blocks of the longest beginning of which all are cached."""
        return [self._block_of[digest] for digest in takewhile(self._block_of.__contains__, hashes)]

    def prefix(self, hashes: Sequence[bytes]) -> Prefix:
        """Return the longest known beginning: with the blocks that later tokens attend to, and the state."""
        known = cached = run = 0  # all blocks from `run` on are cached
        for number, digest in enumerate(hashes, 1):
            if digest not in self._block_of:
                if self.window is None:
                    break
                run = number
            elif self.passed(number * self.block_size) >= run:
                cached = number
                known = number if self.states is None or digest in self.states else known
        passed = self.passed(known * self.block_size)
        return Prefix(known, passed, [self._block_of[digest] for digest in hashes[passed:known]], cached)

    def unused(self, blocks: Sequence[int]) -> int:
        """Return how many of these blocks are unused: sharing them reduces the number of free blocks."""
        return sum(block not in self._users for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Add a user to these blocks."""
        for block in blocks:
            self._users[block] = self._users.get(block, 0) + 1
            self._unused.pop(block, None)

    def begin(self, hashes: Sequence[bytes], total: int, room: int = 0) -> Start | None:
        """Allocate `total` blocks for a sequence; cached blocks with `hashes` may be its first. Return None if too few
        are free.

        room: number of further blocks that the sequence may need; above 0, all are to be consecutive. Then cached
        blocks are copied if the block after them is taken. If there is no memory for a copy, they are shared.
        """
        known, passed, shared, _ = self.prefix(hashes)
        kept = self.unused(shared)
        copied = bool(room and shared) and not self.can_follow(shared) and total + kept <= self.free and not passed
        needed = total if copied else total - known
        if needed + kept > self.free:
            return None
        self.share(shared)
        origin = self.states.use(hashes[known - 1]) if self.states is not None and known else None
        if copied:
            return Start(self.allocate(total, room=room), shared, known, 0, origin)
        after = shared[-1] if shared and room else None
        # the first entries are not read; consecutive ones let the runner read the others without a copy
        unread = [max(0, shared[0] - passed + number) for number in range(passed)] if shared else [0] * passed
        return Start(unread + shared + self.allocate(needed, after, room), [], known, passed, origin)

    def can_follow(self, blocks: Sequence[int]) -> bool:
        """Return whether these blocks are consecutive and the block after them is free."""
        first, behind = blocks[0], blocks[0] + len(blocks)
        return blocks == list(range(first, behind)) and (behind in self._gaps.stops or behind in self._unused)

    def has_run(self, count: int) -> bool:
        """Return whether there are `count` consecutive empty blocks outside the room of other sequences."""
        return any(stop - first >= count for _, first, stop in self._runs())

    def allocate(self, count: int, after: int | None = None, room: int = 0) -> list[int]:
        """Allocate `count` blocks for one sequence. At least as many must be free.

        after: the last block of the sequence; new blocks follow it if possible. room: number of blocks that the
        sequence will probably have; 0 if they need not be consecutive: then no cached block is emptied to follow it.
        """
        blocks: list[int] = []
        if not room:
            after = None
        last = after
        reach = 0 if after is None else self._reach.pop(after, after + room)
        while len(blocks) < count:
            wanted = count - len(blocks)
            if last is not None and self._empty(last + 1):
                start = first = last + 1
            else:
                start, first = self._place(wanted, room)
                reach = first + room
            taken = min(wanted, self._gaps.stops[start] - first)
            self._gaps.take(start, first, taken)
            blocks += range(first, first + taken)
            last = first + taken - 1
        if last is not None and reach > last + 1:
            self._reach[last] = reach
        self._users |= dict.fromkeys(blocks, 1)
        return blocks

    def _empty(self, block: int) -> bool:
        """Return whether a run of empty blocks begins here. Cached unused blocks are emptied first."""
        if block in self._unused:
            del self._unused[block]
            self._forget(block)
        return block in self._gaps.stops

    def _runs(self) -> list[tuple[int, int, int]]:
        """Return (start, first block outside other sequences' room, stop) of each run of empty blocks."""
        runs = sorted(self._gaps.stops.items())
        return [(start, max(start, self._reach.get(start - 1, start)), stop) for start, stop in runs]

    def _place(self, wanted: int, room: int) -> tuple[int, int]:
        """Choose a run of empty blocks and the first block to take. Cached blocks are emptied if that helps."""
        if not room:
            if not self._gaps.stops:
                self._forget(self._unused.popitem(last=False)[0])
            start = next(iter(self._gaps.stops))
            return start, start
        runs = self._runs()
        for start, first, stop in runs:
            if stop - first >= max(wanted, room):
                return start, first
        if runs:
            start, first, stop = max(runs, key=lambda run: run[2] - run[1])
            if stop - first >= wanted:
                return start, first
        for _ in range(4 * wanted):
            if not self._unused:
                break
            block, _ = self._unused.popitem(last=False)
            start = self._forget(block)
            first = max(start, self._reach.get(start - 1, start))
            if self._gaps.stops[start] - first >= wanted:
                return start, first
        start, stop = max(self._gaps.stops.items(), key=lambda run: run[1] - run[0])
        first = start + (stop - start) // 2 if stop - start >= 2 * wanted else start
        if start - 1 in self._reach:
            self._reach[start - 1] = first
        return start, first

    def _forget(self, block: int) -> int:
        """Empty a cached block, and drop the state after it. Return the start of its run."""
        digest = self._digest_of.pop(block)
        del self._block_of[digest]
        if self.states is not None:
            self.states.forget(digest)
        return self._gaps.add(block)

    def remember(self, block: int, digest: bytes) -> None:
        """Record the hash of a full block. Of blocks with equal hashes, the first is recorded."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest], self._digest_of[block] = block, digest

    def remember_state(self, slot: int, digest: bytes) -> None:
        """Record the hash of all tokens before the state that was computed in a reserved slot. It is kept as long as
        the last block of these tokens."""
        assert self.states is not None, "slots are reserved for a model with states"
        if digest in self._block_of:
            self.states.remember(slot, digest)
        else:
            self.states.cancel(slot)

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a user from these blocks."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            self._reach.pop(block, None)
            if block in self._digest_of:
                self._unused[block] = None
            else:
                self._gaps.add(block)

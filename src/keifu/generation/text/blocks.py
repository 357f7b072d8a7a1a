"""The block manager: which blocks of the key-value memory belong to which sequence, and which hold what can be shared.

A full block is known by a hash of all tokens before it and in it, so that sequences that begin alike share their
blocks (PagedAttention, Kwon et al., 2023; automatic prefix caching of vLLM). A block that no sequence uses stays known
until its memory is needed: the least recently used is freed first, and of one sequence the last block before the first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


def digests(tokens: Sequence[int], block_size: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """The hash of every full block: of its tokens and all before it. `known`: those of the first blocks."""
    found = list(known)
    for start in range(len(found) * block_size, len(tokens) - block_size + 1, block_size):
        block = array("q", tokens[start : start + block_size]).tobytes()
        found.append(blake2b((found[-1] if found else b"") + block, digest_size=16).digest())
    return found


class BlockManager:
    """Counts the users of `n_blocks` blocks of `block_size` tokens."""

    def __init__(self, n_blocks: int, block_size: int):
        self.n_blocks, self.block_size = n_blocks, block_size
        self._users: dict[int, int] = {}  # of the blocks in use
        self._block_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._empty: list[int] = []  # used before, and hold nothing that is known
        self._unused: OrderedDict[int, None] = OrderedDict()  # hold what is known; the least recently used first
        self._fresh = iter(range(n_blocks))  # were never used

    @property
    def free(self) -> int:
        """Blocks that no sequence uses."""
        return self.n_blocks - len(self._users)

    def shared(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest beginning that is known."""
        found = []
        for each in hashes:
            if (block := self._block_of.get(each)) is None:
                break
            found.append(block)
        return found

    def unused(self, blocks: Sequence[int]) -> int:
        """How many of these blocks no sequence uses: sharing them takes them out of the free ones."""
        return sum(block not in self._users for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """One more sequence uses these blocks."""
        for block in blocks:
            self._users[block] = self._users.get(block, 0) + 1
            self._unused.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """So many blocks for one sequence alone; there must be as many free ones."""
        found = [self._take() for _ in range(count)]
        self._users |= dict.fromkeys(found, 1)
        return found

    def _take(self) -> int:
        if self._empty:
            return self._empty.pop()
        if (fresh := next(self._fresh, None)) is not None:
            return fresh
        block, _ = self._unused.popitem(last=False)
        del self._block_of[self._digest_of.pop(block)]
        return block

    def remember(self, block: int, digest: bytes) -> None:
        """The block is full, and holds what this hash stands for; the first of equal blocks is remembered."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest], self._digest_of[block] = block, digest

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence uses these blocks no longer."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            if block in self._digest_of:
                self._unused[block] = None
            else:
                self._empty.append(block)

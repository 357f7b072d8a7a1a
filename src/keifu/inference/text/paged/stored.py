"""Beginnings of texts in a cache folder: an engine stores its full blocks there and reads them instead of computing
them.

A file has a group of consecutive blocks of a text, `TOKENS` tokens in all, and all tokens of the text up to their end.
Its name is a hash of these tokens and of everything that the keys and values depend on. Both are compared again after
reading.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import takewhile
from threading import Lock

import torch
from jaxtyping import Int
from torch import Tensor

from keifu import __version__
from keifu.files import hash_of
from keifu.inference.text.paged.blocks import BlockManager
from keifu.inference.text.paged.folder import ENDING, LOG, CacheFolder
from keifu.inference.text.runner import Runner
from keifu.native.model import NativeRunner

TOKENS = 32
READERS = 4  # threads that read files
LAYOUT = 1  # version of the files' content
IDENTITY, TEXT = "identity", "tokens"  # names of tensors that are not of the runner
MILLISECOND = 10**6  # nanoseconds


class StoredPrefixes:
    """Beginnings of the texts of one engine in a cache folder. count: number of blocks of a file."""

    def __init__(self, folder: CacheFolder, runner: Runner):
        self.folder, self.runner = folder, runner
        self.count = max(1, TOKENS // runner.block_size)
        example = runner.read_blocks([0] * self.count)
        self._layout = {name: (x.dtype, x.shape) for name, x in example.items()}
        self._bytes = sum(x.nbytes for x in example.values())
        about = LAYOUT, __version__, runner.block_size, self._layout
        self._lock = nullcontext() if isinstance(runner, NativeRunner) else Lock()  # PyTorch's pool may grow
        self._key = bytes.fromhex(hash_of([repr(about), runner.fingerprint()]))
        self._identity = torch.tensor([*self._key], dtype=torch.uint8, device="cpu")

    def reach(self, hashes: Sequence[bytes], start: int) -> int:
        """Return the number of blocks of a text that are known if the first `start` ones are, and files are read.
        hashes: of its full blocks."""
        group = start // self.count
        while (group + 1) * self.count <= len(hashes) and self.folder.has(self._name(hashes, group)):
            group += 1
        return max(start, group * self.count)

    def restore(self, tokens: Sequence[int], hashes: Sequence[bytes], start: int, blocks: Sequence[int]) -> int:
        """Read blocks of a text, from its block `start` on, into these blocks of the runner. Return how many were
        read. tokens: of the text; they must be those of the files."""
        text = torch.tensor(tokens, device="cpu")
        groups = range(start // self.count, (start + len(blocks)) // self.count)

        def read(group: int) -> bool:
            end = (group + 1) * self.count
            own = blocks[max(0, group * self.count - start) : end - start]
            return self._read(self._name(hashes, group), text[: end * self.runner.block_size], own)

        with ThreadPoolExecutor(READERS) as threads:  # new memory for the blocks takes longer than reading the files
            count = sum(1 for _ in takewhile(bool, threads.map(read, groups)))
        return max(0, (groups[0] + count) * self.count - start)

    @torch.inference_mode()
    def _read(self, name: str, text: Int[Tensor, " tokens"], blocks: Sequence[int]) -> bool:
        """Read the last blocks of a file into these blocks. Return whether the file is usable for this text."""
        tensors = self.folder.read(name, self._bytes + text.nbytes)
        if tensors is None:
            return False
        if problem := self._problem(tensors, text):
            self.folder.ignore(name, f"{name} {problem}.")
            return False
        with self._lock:
            skipped = self.count - len(blocks)
            self.runner.write_blocks(blocks, {each: tensors[each][skipped:] for each in self._layout})
        return True

    def save(
        self, tokens: Sequence[int], hashes: Sequence[bytes], blocks: Sequence[int], groups: range, used: int
    ) -> None:
        """Store these groups of blocks of a text, unless they are stored already. used: time of use in nanoseconds.

        The end of a text counts as older than its beginning, without which it is of no use.
        """
        text = torch.tensor(tokens, device="cpu")
        names = [self._name(hashes, group) for group in groups]
        times = [used - group * MILLISECOND for group in groups]
        known = [self.folder.has(name) for name in names]
        for group, name, time, exists in zip(groups, names, times, known, strict=True):
            if exists or not self.folder.accepts(self._bytes):
                continue
            start, end = group * self.count, (group + 1) * self.count
            about = {IDENTITY: self._identity, TEXT: text[: end * self.runner.block_size]}
            self.folder.write(name, {**self.runner.read_blocks(blocks[start:end]), **about}, time)
        if any(known):
            pairs = [pair for pair, exists in zip(zip(names, times, strict=True), known, strict=True) if exists]
            self.folder.mark_used(pairs)

    def _problem(self, tensors: Mapping[str, Tensor], text: Int[Tensor, " tokens"]) -> str | None:
        """Return why a file cannot be used for this text: the end of a sentence that begins with the file's name."""
        if not _equal(tensors.get(IDENTITY), self._identity):
            return "was made by another model, or on another machine"
        if not _equal(tensors.get(TEXT), text):
            return "has the tokens of another text"
        layout = {name: (x.dtype, x.shape) for name, x in tensors.items() if name not in (IDENTITY, TEXT)}
        return None if layout == self._layout else "has other tensors than this model"

    def _name(self, hashes: Sequence[bytes], group: int) -> str:
        """Return the name of the file of a group of blocks."""
        return hash_of([self._key, hashes[(group + 1) * self.count - 1]]) + ENDING


def _equal(x: Tensor | None, expected: Tensor) -> bool:
    return x is not None and x.dtype == expected.dtype and torch.equal(x, expected)


def stored_prefixes(folder: CacheFolder | None, runner: Runner, blocks: BlockManager) -> StoredPrefixes | None:
    """Return the beginnings of texts that the folder has for this runner. Return None, and log why, if its blocks
    cannot be used by another text."""
    if folder is None:
        return None
    if runner.state_bytes or not blocks.sharing:
        reason = "layers have states of fixed size" if runner.state_bytes else "keys depend on the prompt's length"
        LOG.warning("The cache folder is not used for this model, because its %s.", reason)
        return None
    return StoredPrefixes(folder, runner)

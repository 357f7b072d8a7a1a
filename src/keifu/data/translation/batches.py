"""Batches of sentence pairs by their number of tokens, as padded tensors.

Axes: row (of a batch), position (source or target), both padded on the right.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from keifu.data.epochs import Batching
from keifu.data.padding import offsets
from keifu.errors import UserError
from keifu.files import hash_of

Batch = dict[str, Tensor]
CHUNK = 20_000  # sentences that are encoded at once


class SpecialIds(NamedTuple):
    """Token ids around a sentence: the start of a target, the end of both sides, and padding."""

    start: int
    end: int
    pad: int


@dataclass(frozen=True)
class EncodedSide:
    """Token ids of many sentences, concatenated in `ids`. Sentence i begins at starts[i]."""

    ids: np.ndarray
    starts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sentence."""
        return np.diff(self.starts)

    def keep(self, rows: np.ndarray) -> "EncodedSide":
        """Return these sentences, in the given order."""
        lengths, starts = self.lengths[rows], self.starts[rows]
        positions = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        return EncodedSide(self.ids[positions], offsets(lengths))

    def padded(self, rows: np.ndarray, special: SpecialIds, begins: bool) -> tuple[Tensor, Tensor]:
        """Stack sentences, with their end token, and with the start token if `begins`. Return ids and mask, both [row,
        position]."""
        lengths = self.lengths[rows] + 1 + begins
        columns = np.arange(lengths.max())
        mask = columns < lengths[:, None]
        table = np.where(mask, special.end, special.pad).astype(np.int64)
        inside = (columns >= begins) & (columns < lengths[:, None] - 1)
        table[inside] = self.keep(rows).ids
        table[:, : int(begins)] = special.start
        return torch.from_numpy(table), torch.from_numpy(mask)


def encode(encode_batch: Callable[[list[str]], list[list[int]]], sentences: Sequence[str]) -> EncodedSide:
    """Encode all sentences without start and end tokens, in chunks by `encode_batch`."""
    parts, lengths = [np.zeros(0, np.int32)], []
    for first in range(0, len(sentences), CHUNK):
        encoded = encode_batch([*sentences[first : first + CHUNK]])
        lengths += map(len, encoded)
        parts.append(np.fromiter(chain.from_iterable(encoded), np.int32))
    return EncodedSide(np.concatenate(parts), offsets(np.array(lengths, np.int64)))


@dataclass(frozen=True)
class EncodedPairs:
    """Both sides of sentence pairs. indices: those of the pairs that were not too long for a model."""

    source: EncodedSide
    target: EncodedSide
    indices: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.source.lengths)

    def fitting(self, context_length: int) -> "EncodedPairs":
        """Remove pairs with a side of more than `context_length` tokens, including start and end."""
        sizes = np.maximum(self.source.lengths + 1, self.target.lengths + 1)
        rows = np.flatnonzero(sizes <= context_length)
        if not len(rows):
            longer = f"All {len(self):,} pairs have a side longer than {context_length} tokens"
            least = f"the shortest needs {sizes.min() if len(sizes) else 0}: raise the context length"
            raise UserError(f"{longer}, which is all that the model takes; {least}.")
        return EncodedPairs(self.source.keep(rows), self.target.keep(rows), rows.tolist())

    def sizes(self) -> np.ndarray:
        """Return the size of each row in a batch, [row, 2]: the source with its end, the target with start and end."""
        return np.stack([self.source.lengths + 1, self.target.lengths + 2], axis=1)

    def batch(self, rows: np.ndarray, special: SpecialIds, source_special: SpecialIds) -> Batch:
        """Return the batch {"source", "source_mask", "target", "target_mask"} of these rows. The target has start and
        end."""
        source, source_mask = self.source.padded(rows, source_special, begins=False)
        target, target_mask = self.target.padded(rows, special, begins=True)
        return {"source": source, "source_mask": source_mask, "target": target, "target_mask": target_mask}

    @property
    def fingerprint(self) -> str:
        """Hash of all ids."""
        arrays = (side for language in (self.source, self.target) for side in (language.ids, language.starts))
        return hash_of(np.ascontiguousarray(array).tobytes() for array in arrays)


def by_tokens(sizes: np.ndarray, tokens: int) -> Batching:
    """Return batches of rows of similar length, with at most `tokens` source and target tokens, padding included.

    Rows are sorted by the target's length, then by the source's (Vaswani et al., 2017, section 5.1); rows of equal
    lengths are shuffled in each epoch. So the lengths at each position, and the cuts between batches, never change:
    every epoch has the same number of batches, and the largest is known.
    """
    source, target = sizes.T.astype(np.int64)
    if (most := int(sizes.sum(1).max())) > tokens:
        raise UserError(f"A batch of {tokens} tokens cannot hold the longest pair, which has {most}: allow more.")
    keys = target * (2 * source.max() + 1) + np.where(target % 2, source, 2 * source.max() - source)
    bounds = _cuts(sizes[np.argsort(keys, kind="stable")].tolist(), tokens)
    return Batching(f"{tokens} tokens", keys, len(sizes), bounds)


def _cuts(sizes: list[list[int]], tokens: int) -> list[int]:
    """Return the boundaries of batches so that each has at most `tokens` tokens when padded."""
    bounds, source, target = [0], 0, 0
    for row, (s, t) in enumerate(sizes):
        source, target = max(source, s), max(target, t)
        if (row + 1 - bounds[-1]) * (source + target) > tokens:
            bounds.append(row)
            source, target = s, t
    return [*bounds, len(sizes)]


class PairData:
    """Training batches of sentence pairs, in the format of `training.objectives.translation`.

    A batch depends only on the seed and the step. Every pair is used once in an epoch, and the batches of an epoch are
    shuffled. An epoch depends on the seed and its number, so a late step costs no more than the first. special: token
    ids around both sides, unless the source's are given separately. `validation` yields batches of at most
    `tokens_at_once` tokens, always the same.
    """

    def __init__(
        self, train: EncodedPairs, validation: EncodedPairs, special: SpecialIds, batching: Batching, seed: int = 0,
        tokens_at_once: int = 8192, source_special: SpecialIds | None = None,
    ):  # fmt: skip
        self.source_special = source_special or special
        self.train, self.held_out, self.special, self.batching, self.seed = train, validation, special, batching, seed
        longest = int(validation.sizes().sum(1).max())
        self._validation = by_tokens(validation.sizes(), max(tokens_at_once, longest))
        self._epochs = batching.epochs(seed)
        self.steps_per_epoch = self._epochs.n
        around = (special,) if self.source_special == special else (special, self.source_special)
        parts = train.fingerprint, validation.fingerprint, hash_of([repr((batching.bounds, *around))])
        self.fingerprint = f"{'-'.join(part[:16] for part in parts)}, {batching.name}, seed {seed}"

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0. It is the same in every process and does not depend on earlier
        calls."""
        return self._batch(self._epochs.item(step))

    def largest(self) -> Batch:
        """Return the batch of the first epoch with the most tokens, padding included. It needs the most memory."""
        sizes = self.train.sizes()
        batches = self.batching.batches(np.random.default_rng([self.seed, 0]))
        return self._batch(max(batches, key=lambda rows: len(rows) * sizes[rows].max(0).sum()))

    def validation(self) -> Iterator[Batch]:
        """Yield the held-out pairs in batches, always the same."""
        rows = np.argsort(self._validation.keys, kind="stable")
        for batch in np.split(rows, self._validation.bounds[1:-1]):
            yield self.held_out.batch(batch, self.special, self.source_special)

    def _batch(self, rows: np.ndarray) -> Batch:
        return self.train.batch(rows, self.special, self.source_special)

"""Batches of sentence pairs by their number of tokens, as padded tensors.

Axes: row (of a batch), position (source or target), both padded on the right.
"""

import hashlib
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

Batch = dict[str, Tensor]
CHUNK = 20_000  # sentences encoded at a time


class SpecialIds(NamedTuple):
    """The ids around the tokens of a sentence: what a target begins with, what ends both sides, and the padding."""

    start: int
    end: int
    pad: int


@dataclass(frozen=True)
class EncodedSide:
    """The ids of many sentences, one after the other in `ids`; sentence i begins at starts[i]."""

    ids: np.ndarray
    starts: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sentence."""
        return np.diff(self.starts)

    def keep(self, rows: np.ndarray) -> "EncodedSide":
        """Return some of the sentences, in the given order."""
        lengths, starts = self.lengths[rows], self.starts[rows]
        positions = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        return EncodedSide(self.ids[positions], offsets(lengths))

    def padded(self, rows: np.ndarray, special: SpecialIds, begins: bool) -> tuple[Tensor, Tensor]:
        """Stack the sentences of some rows with their end, and with the start if `begins`: ids, mask [row,
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
    """Encode all sentences, without start and end, in a few bytes each; `encode_batch` encodes some."""
    parts, lengths = [np.zeros(0, np.int32)], []
    for first in range(0, len(sentences), CHUNK):
        encoded = encode_batch([*sentences[first : first + CHUNK]])
        lengths += map(len, encoded)
        parts.append(np.fromiter(chain.from_iterable(encoded), np.int32))
    return EncodedSide(np.concatenate(parts), offsets(np.array(lengths, np.int64)))


@dataclass(frozen=True)
class EncodedPairs:
    """Both sides of pairs; `kept` are the indices of those that were not too long for a model."""

    source: EncodedSide
    target: EncodedSide
    kept: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.source.lengths)

    def fitting(self, context_length: int) -> "EncodedPairs":
        """Remove the pairs of which a side has more than `context_length` tokens, its start and end counted."""
        sizes = np.maximum(self.source.lengths + 1, self.target.lengths + 1)
        rows = np.flatnonzero(sizes <= context_length)
        if not len(rows):
            raise UserError(
                f"All {len(self):,} pairs have a side longer than {context_length} tokens, which is all that the model "
                f"takes; the shortest needs {sizes.min() if len(sizes) else 0}: raise the context length."
            )
        return EncodedPairs(self.source.keep(rows), self.target.keep(rows), rows.tolist())

    def sizes(self) -> np.ndarray:
        """Return the size of each row in a batch, [row, 2]: the source with its end, the target with its start and
        end."""
        return np.stack([self.source.lengths + 1, self.target.lengths + 2], axis=1)

    def batch(self, rows: np.ndarray, special: SpecialIds, source_special: SpecialIds) -> Batch:
        """Return {"source", "source_mask", "target", "target_mask"} of some rows; the target has start and end."""
        source, source_mask = self.source.padded(rows, source_special, begins=False)
        target, target_mask = self.target.padded(rows, special, begins=True)
        return {"source": source, "source_mask": source_mask, "target": target, "target_mask": target_mask}

    @property
    def fingerprint(self) -> str:
        """A hash of all ids."""
        arrays = (side for language in (self.source, self.target) for side in (language.ids, language.starts))
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def by_tokens(sizes: np.ndarray, tokens: int) -> Batching:
    """Return the batches of at most `tokens` source and target tokens, padding counted, of rows of nearly equal length.

    Rows are sorted by their target's length, then by their source's (Vaswani et al., 2017, section 5.1, batch by
    approximate length), those of equal lengths in an order of the epoch's own. So the lengths at each place never
    change, nor where the batches are cut: every epoch has the same number of batches, and the largest is known.
    """
    source, target = sizes.T.astype(np.int64)
    if (most := int(sizes.sum(1).max())) > tokens:
        raise UserError(f"A batch of {tokens} tokens cannot hold the longest pair, which has {most}: allow more.")
    keys = target * (2 * source.max() + 1) + np.where(target % 2, source, 2 * source.max() - source)
    bounds = _cuts(sizes[np.argsort(keys, kind="stable")].tolist(), tokens)
    return Batching(f"{tokens} tokens", keys, len(sizes), bounds)


def _cuts(sizes: list[list[int]], tokens: int) -> list[int]:
    """Cut rows in a fixed order so that no batch has more than `tokens` tokens when padded."""
    bounds, source, target = [0], 0, 0
    for row, (s, t) in enumerate(sizes):
        source, target = max(source, s), max(target, t)
        if (row + 1 - bounds[-1]) * (source + target) > tokens:
            bounds.append(row)
            source, target = s, t
    return [*bounds, len(sizes)]


class PairData:
    """Training data for translation: batches of pairs, in the form that `training.objectives.translation` takes.

    A batch is a function of the seed and the step alone. Every pair comes once an epoch; the epoch's batches come in an
    order of its own. What an epoch needs is drawn from the seed and its number, so that going on at a late step costs
    no more than beginning. special: the ids around both sides, unless those of the source are given too. validation:
    batches of at most `tokens_at_once` tokens, always the same.
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

    @property
    def fingerprint(self) -> str:
        """Hash of all ids and of whatever else the batches depend on."""
        around = (self.special,) if self.source_special == self.special else (self.special, self.source_special)
        bounds = hashlib.sha256(repr((self.batching.bounds, *around)).encode()).hexdigest()
        parts = self.train.fingerprint, self.held_out.fingerprint, bounds
        return f"{'-'.join(part[:16] for part in parts)}, {self.batching.name}, seed {self.seed}"

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, counted from 0: the same in every process, whatever came before."""
        return self._batch(self._epochs.item(step))

    def largest(self) -> Batch:
        """Return the batch of the first epoch with the most tokens, padding included: it needs the most memory."""
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

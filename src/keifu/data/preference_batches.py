"""Pairs and rankings of answers as ids, in batches that are a function of the seed and the step; it knows no text and
no model.

Axes: row = pairs or prompts, 2 = the better answer and the worse, K = ranked answers, each with its prompt, position.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from keifu.data.conversation_batches import Turns
from keifu.errors import UserError


class Pair(NamedTuple):
    """Two answers with their prompt; of each, what is learned is the answer alone."""

    better: Turns
    worse: Turns


class Ranking(NamedTuple):
    """Answers to one prompt, each with it, and how good each is: of two, the one with the higher level is better."""

    answers: list[Turns]
    levels: list[float]


class PreferencePairs:
    """The training loop's data: {"tokens", "mask": True on the answers [row, 2, position], "reference" [row, 2]}.

    `references` [pairs, 2], of the training pairs and of those held out, are handed on with the pairs.
    """

    def __init__(
        self,
        training: Sequence[Sequence[Turns]],
        held: Sequence[Sequence[Turns]],
        batch_size: int,
        seed: int,
        pad_id: int,
        references: tuple[Float[Tensor, "n k"], Float[Tensor, "m k"]],
    ):
        if not training:
            raise UserError("There is no preference to learn from.")
        self.parts, self.references = (list(training), list(held)), references
        self.batch_size, self.pad_id, self.seed = min(batch_size, len(training)), pad_id, seed
        self._order = lru_cache(2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(training)))

    @property
    def steps_per_epoch(self) -> float:
        """Batches after which every pair was seen once."""
        return len(self.parts[0]) / self.batch_size

    @property
    def fingerprint(self) -> str:
        """A hash of all ids and masks."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        digest = hashlib.sha256(f"{self.seed} {self.pad_id}".encode())
        for pair in (pair for part in self.parts for pair in part):
            for each in pair:
                digest.update(np.array([len(each.ids), *each.ids, *each.learned], dtype=np.int64).tobytes())
        return digest.hexdigest()

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step, counted from 0."""
        places = step * self.batch_size + np.arange(self.batch_size)
        epochs, inside = np.divmod(places, len(self.parts[0]))
        rows = [int(self._order(int(epoch))[place]) for epoch, place in zip(epochs, inside, strict=True)]
        return self._made(0, rows)

    def largest(self) -> dict[str, Tensor]:
        """The batch that needs the most memory, whether or not it is drawn: that of the longest pairs."""
        lengths = [max(len(each.ids) for each in pair) for pair in self.parts[0]]
        return self._made(0, np.argsort(lengths)[-self.batch_size :].tolist())

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """The held-out pairs, always the same."""
        rows = range(len(self.parts[1]))
        yield from (self._made(1, rows[at : at + self.batch_size]) for at in rows[:: self.batch_size])

    def _made(self, part: int, rows: Sequence[int]) -> dict[str, Tensor]:
        made = together([self.parts[part][row] for row in rows], self.pad_id)
        return made | {"reference": self.references[part][list(rows)]}


class RankedAnswers(PreferencePairs):
    """The training loop's data: {"tokens", "mask": True on real tokens [row, K, position], "levels" [row, K]}.

    All answers of a prompt are one row (InstructGPT, section 3.5); the level of one that is not there is no number.
    """

    def __init__(self, training: Sequence[Ranking], held: Sequence[Ranking], batch_size: int, seed: int, pad_id: int):
        most = max((len(each.answers) for each in (*training, *held)), default=2)
        levels = [
            torch.tensor([[*each.levels, *[torch.nan] * (most - len(each.levels))] for each in part]).view(-1, most)
            for part in (training, held)
        ]
        pairs = [[each.answers for each in part] for part in (training, held)]
        super().__init__(pairs[0], pairs[1], batch_size, seed, pad_id, (levels[0], levels[1]))

    @property
    def fingerprint(self) -> str:
        """A hash of all ids and of what is better than what."""
        levels = b"".join(part.numpy().tobytes() for part in self.references)
        return hashlib.sha256(self._hash.encode() + levels).hexdigest()

    def _made(self, part: int, rows: Sequence[int]) -> dict[str, Tensor]:
        made = together([self.parts[part][row] for row in rows], self.pad_id)
        return made | {"levels": self.references[part][list(rows), : made["tokens"].shape[1]]}


def together(pairs: Sequence[Sequence[Turns]], pad_id: int) -> dict[str, Tensor]:
    """Pairs, or more answers of each, as tensors, padded on the right."""
    length, most = max(len(each.ids) for pair in pairs for each in pair), max(map(len, pairs))
    tokens, mask = np.full((len(pairs), most, length), pad_id, np.int64), np.zeros((len(pairs), most, length), bool)
    for row, pair in enumerate(pairs):
        for side, (ids, learned) in enumerate(pair):
            tokens[row, side, : len(ids)], mask[row, side, : len(ids)] = ids, learned
    return {"tokens": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}

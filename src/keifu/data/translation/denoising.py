"""Batches of a text without labels for an encoder-decoder: hidden spans, or the end of a window.

Raffel et al. (2020), "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
sections 3.1.4 and 3.3.1.

Axes: row, position (window: of the text; source, target: of the two sides).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from keifu.data.text.span_corruption import REGULAR, SpanCorruption, corrupt, random_spans
from keifu.data.translation.batches import SpecialIds, encode
from keifu.errors import UserError
from keifu.files import hash_of

Windows = np.ndarray
Sides = tuple[np.ndarray, np.ndarray]
VALIDATION_ROWS = 256


@dataclass(frozen=True)
class HiddenSpans:
    """Objective of T5: the source has a sentinel instead of each hidden span, and the target has each sentinel followed
    by its span. rate: share of hidden tokens. span: mean length of a hidden span. sentinels: in the order of the spans.
    """

    rate: float
    span: float
    sentinels: Sequence[int]

    def sides(self, windows: Windows, random: np.random.Generator) -> Sides:
        """Return sources and targets, without start and end tokens."""
        rows, length = windows.shape
        hidden, spans = SpanCorruption(REGULAR, self.rate, self.span).counts(length)
        if spans > len(self.sentinels):
            raise UserError(
                f"A window of {length} tokens has {spans} hidden spans, and there are {len(self.sentinels)} sentinels: "
                "shorten the window, or lengthen the spans."
            )
        mask = random_spans(rows, length, hidden, spans, random)
        return corrupt(windows, mask, np.array(self.sentinels))


@dataclass(frozen=True)
class HiddenEnd:
    """Left to right (the paper's prefix language model): the source is the beginning of a window, and the target is the
    rest. The cut is uniform, and the same in all rows of a batch."""

    def sides(self, windows: Windows, random: np.random.Generator) -> Sides:
        """Return sources and targets, without start and end tokens."""
        cut = int(random.integers(1, windows.shape[1]))
        return windows[:, :cut], windows[:, cut:]


def token_stream(encode_batch: Callable[[list[str]], list[list[int]]], texts: Sequence[str], end: int) -> np.ndarray:
    """Return the tokens of texts in one row, with the end token after each text."""
    side = encode(encode_batch, texts)
    return np.insert(side.ids, side.starts[1:], end)


class DenoisedText:
    """Training batches in the form of sentence pairs: a batch is a function of the seed and the step.

    A batch has `rows` windows of `length` tokens from random positions of `training`; `task` makes both sides of each.
    Neither side has padding. `validation` yields evenly spaced windows of `held_out`, always the same.
    """

    def __init__(
        self, training: np.ndarray, held_out: np.ndarray, task: HiddenSpans | HiddenEnd, special: SpecialIds, *,
        length: int, rows: int, seed: int = 0,
    ):  # fmt: skip
        if (shorter := min(len(training), len(held_out))) < length:
            raise UserError(f"A part of the text has {shorter} tokens, and a window {length}: give more text.")
        self.training, self.held_out, self.task, self.special = training, held_out, task, special
        self.length, self.rows, self.seed = length, rows, seed
        settings = repr((task, special, length, rows, seed))
        self.fingerprint = hash_of([settings.encode(), training.tobytes(), held_out.tobytes()])

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step, counted from 0, in the format of `training.objectives.translation`."""
        random = np.random.default_rng([self.seed, step])
        starts = random.integers(len(self.training) - self.length + 1, size=self.rows)
        return self._batch(self.training, starts, random)

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """Yield the held-out windows in batches."""
        count = min(VALIDATION_ROWS, len(self.held_out) // self.length)
        starts = np.linspace(0, len(self.held_out) - self.length, count).astype(np.int64)
        for number, first in enumerate(range(0, count, self.rows)):
            random = np.random.default_rng([0, number])
            yield self._batch(self.held_out, starts[first : first + self.rows], random)

    def _batch(self, ids: np.ndarray, starts: np.ndarray, random: np.random.Generator) -> dict[str, Tensor]:
        windows = ids[starts[:, None] + np.arange(self.length)].astype(np.int64)
        source, target = self.task.sides(windows, random)
        start, end = (np.full((len(windows), 1), token) for token in (self.special.start, self.special.end))
        sides = {"source": np.hstack([source, end]), "target": np.hstack([start, target, end])}
        batch = {name: torch.from_numpy(side) for name, side in sides.items()}
        return batch | {f"{name}_mask": torch.ones_like(side, dtype=torch.bool) for name, side in batch.items()}

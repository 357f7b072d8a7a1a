"""Batches of windows of equal length from one long row of token ids, for next-token prediction.

Axes: row (of a batch), position.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from keifu.data.batch_sizes import BatchSizeSchedule, batch_size_stages
from keifu.data.epochs import Epochs
from keifu.data.text.token_shards import Shards
from keifu.errors import UserError

SHORT = 8  # a shorter context is of little use: a larger held-out share is advised instead


class PackedText:
    """Training data for next-token prediction: {"tokens": [row, context_length + 1]}, ids as int64.

    The text is cut into windows that overlap by one token, since a window's last token is only predicted. An epoch
    takes every window once, in an order of its own, and begins cutting at an offset of its own. Drawing offsets with
    replacement, as nanoGPT does, leaves 1 / e = 37% of the text unseen after one epoch's worth of steps; an offset that
    changes lets every token stand at every place of a window in time, as drawing does.

    A batch is a function of the seed and the step alone, also where `batch_size` grows over the steps: windows are
    counted through, and each batch takes those that follow the last one's. What an epoch needs is drawn from the seed
    and the epoch's number, so that going on at a late step costs no more than beginning.

    validation_tokens: at most about so many held-out tokens are used, in windows spread evenly; all when None.
    A text, or a held-out part, shorter than one window is a `UserError`. `held_out` are those windows, [row, position].
    """

    def __init__(
        self, shards: Shards, context_length: int, batch_size: int | BatchSizeSchedule, seed: int = 0,
        validation_tokens: int | None = None,
    ):  # fmt: skip
        self.growth = batch_size if isinstance(batch_size, BatchSizeSchedule) else batch_size_stages((), batch_size)
        self.batch_size = max(self.growth.rows)
        for name, value in (("context_length", context_length), ("batch_size", self.batch_size)):
            if value < 1:
                raise UserError(f"{name} is {value}, but it must be at least 1.")
        self.shards, self.context_length, self.seed = shards, context_length, seed
        _check_lengths(shards, context_length)
        self._windows, validation = (  # views that copy nothing
            sliding_window_view(np.asarray(ids), context_length + 1) for ids in (shards.tokens, shards.validation)
        )
        self.held_out = _spread(validation[::context_length], context_length, validation_tokens)
        self._slack = min(context_length - 1, len(self._windows) - 1)  # offsets go from 0 to this
        self.windows_per_epoch = (len(self._windows) - 1 - self._slack) // context_length + 1
        self._epochs = Epochs(self.windows_per_epoch, self.batch_size, seed, self._order)
        self.steps_per_epoch = self._epochs.steps

    @property
    def fingerprint(self) -> str:
        """The text's fingerprint and what else the batches depend on."""
        return f"{self.shards.fingerprint}-context{self.context_length}-batch{self.growth}-seed{self.seed}"

    def batch(self, step: int) -> dict[str, Int64[Tensor, "row position"]]:
        """Return the batch of a step, counted from 0: the same in every process, whatever came before."""
        return self.part(step, lambda rows: (0, rows))[0]

    def part(self, step: int, bounds: Callable[[int], tuple[int, int]]) -> tuple[dict[str, Tensor], int, int]:
        """Return some rows of that batch, the index of the first one, and the size of the whole batch.

        bounds: returns the first row and the row after the last one, from the size of the batch.
        """
        numbers = self.growth.numbers(step)
        first, end = bounds(len(numbers))
        return _tensors(self.windows(numbers[first:end])), first, len(numbers)

    def largest(self) -> dict[str, Int64[Tensor, "row position"]]:
        """Return the batch that needs the most memory."""
        return self.batch(self.growth.largest)

    def windows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the windows with these ascending numbers, [row, position], counted over all epochs."""
        return self._windows[self._epochs.items(numbers)]

    def validation(self) -> Iterator[dict[str, Int64[Tensor, "row position"]]]:
        """Yield the held-out windows in batches, always the same. No token is predicted twice; the last batch may be
        smaller."""
        for first in range(0, len(self.held_out), self.batch_size):
            yield _tensors(self.held_out[first : first + self.batch_size])

    def _order(self, epoch: int) -> np.ndarray:
        """Return the start of each window of an epoch, in the epoch's order."""
        random = np.random.default_rng([self.seed, epoch])
        offset = random.integers(self._slack + 1)
        return offset + self.context_length * random.permutation(self.windows_per_epoch)


def _check_lengths(shards: Shards, context_length: int) -> None:
    """Raise a `UserError` that says what helps if a part is shorter than a window."""
    training, validation, needed = len(shards.tokens), len(shards.validation), context_length + 1
    if min(training, validation) >= needed:
        return
    total = training + validation
    ways = ["give more text"]
    if total >= 2 * needed:
        ways.append(f"hold out a share of {math.ceil(100 * needed / total) / 100:g}")
    longest, longest_with_half = min(training, validation) - 1, total // 2 - 1
    if longest >= min(SHORT, longest_with_half) > 0:
        ways.append(f"lower the context length to {longest} or less")
    elif longest_with_half > 0:
        ways.append(f"lower the context length to {longest_with_half} or less and hold out a share of 0.5")
    raise UserError(
        f"{shards.index['source']} has {training:,} tokens to train on and {validation:,} held out, but a context of "
        f"{context_length} needs at least {needed} of each: {', or '.join(ways)}."
    )


def _spread(windows: np.ndarray, context_length: int, tokens: int | None) -> np.ndarray:
    """Choose windows of at most `tokens` tokens, at least one, at even distances."""
    count = len(windows) if tokens is None else min(len(windows), max(1, tokens // context_length))
    return windows if count == len(windows) else windows[np.arange(count) * len(windows) // count]


def _tensors(rows: Any) -> dict[str, Int64[Tensor, "row position"]]:
    return {"tokens": torch.from_numpy(rows.astype(np.int64))}

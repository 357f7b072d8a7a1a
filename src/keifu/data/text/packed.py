"""Batches of windows of equal length from one long row of token ids, for next-token prediction.

Axes: row (of a batch), position.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int64
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from keifu.data.epochs import BatchSizeSchedule, EpochBatches, batch_size_stages
from keifu.data.text.token_shards import Shards
from keifu.errors import UserError

SHORT = 8  # tokens: for a shorter context, the error advises a larger held-out share instead


class PackedText(EpochBatches):
    """Training data for next-token prediction: {"tokens": [row, context_length + 1]}, ids as int64.

    The text is cut into windows that overlap by one token, since a window's last token is only predicted. An epoch uses
    every window once, in a new order, and begins cutting at a new offset. Drawing offsets with replacement, as in
    nanoGPT, leaves 1 / e = 37% of the text unseen after one epoch's worth of steps. As with drawing, a changing offset
    moves every token through all positions of a window over time.

    A batch depends only on the seed and the step, also if `batch_size` grows over the steps: windows are numbered, and
    each batch continues after the previous one. An epoch depends on the seed and its number, so a late step costs no
    more than the first.

    validation_tokens: approximate maximum of held-out tokens, in evenly spaced windows; None: all. `held_out` are these
    windows, [row, position]. Raises `UserError` if the text or the held-out part is shorter than one window.
    """

    def __init__(
        self, shards: Shards, context_length: int, batch_size: int | BatchSizeSchedule, seed: int = 0,
        validation_tokens: int | None = None,
    ):  # fmt: skip
        self.growth = batch_size if isinstance(batch_size, BatchSizeSchedule) else batch_size_stages((), batch_size)
        largest = max(self.growth.rows)
        for name, value in (("context_length", context_length), ("batch_size", largest)):
            if value < 1:
                raise UserError(f"{name} is {value}, but it must be at least 1.")
        self.shards, self.context_length = shards, context_length
        _check_lengths(shards, context_length)
        self._windows, validation = (  # views without a copy
            sliding_window_view(np.asarray(ids), context_length + 1) for ids in (shards.tokens, shards.validation)
        )
        held_out = validation[::context_length]
        most = len(held_out) if validation_tokens is None else max(1, validation_tokens // context_length)
        self.held_out = held_out if most >= len(held_out) else held_out[np.arange(most) * len(held_out) // most]
        self._slack = min(context_length - 1, len(self._windows) - 1)  # the largest offset
        self.windows_per_epoch = (len(self._windows) - 1 - self._slack) // context_length + 1
        super().__init__(self.windows_per_epoch, len(self.held_out), largest, seed, self._order)
        self.fingerprint = f"{shards.fingerprint}-context{context_length}-batch{self.growth}-seed{seed}"

    def items(self, step: int) -> np.ndarray:
        """Return the starts of the windows in the batch of a step."""
        return self._epochs.items(self.growth.numbers(step))

    def part(self, step: int, bounds: Callable[[int], tuple[int, int]]) -> tuple[dict[str, Tensor], int, int]:
        """Return a slice of that batch, the index of its first row, and the number of rows of the whole batch.

        bounds: function from the number of rows to start and end (exclusive) of the slice.
        """
        items = self.items(step)
        first, end = bounds(len(items))
        return self.make_batch(False, items[first:end]), first, len(items)

    def largest(self) -> dict[str, Int64[Tensor, "row position"]]:
        """Return the batch that needs the most memory."""
        return self.batch(self.growth.largest)

    def windows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the windows with these ascending numbers, [row, position]. Numbers continue from epoch to epoch."""
        return self._windows[self._epochs.items(numbers)]

    def make_batch(self, validating: bool, items: np.ndarray) -> dict[str, Int64[Tensor, "row position"]]:
        """Return the held-out windows with these indices, or the training windows that start at these tokens. No
        held-out token is predicted twice."""
        windows = self.held_out if validating else self._windows
        return {"tokens": torch.from_numpy(windows[items].astype(np.int64))}

    def _order(self, epoch: int) -> np.ndarray:
        """Return the start of each window of an epoch, in the epoch's order."""
        random = np.random.default_rng([self.seed, epoch])
        offset = random.integers(self._slack + 1)
        return offset + self.context_length * random.permutation(self.windows_per_epoch)


def _check_lengths(shards: Shards, context_length: int) -> None:
    """Raise a `UserError`, with remedies, if a part is shorter than a window."""
    training, validation, least_tokens = len(shards.tokens), len(shards.validation), context_length + 1
    if min(training, validation) >= least_tokens:
        return
    total = training + validation
    ways = ["give more text"]
    if total >= 2 * least_tokens:
        ways.append(f"hold out a share of {math.ceil(100 * least_tokens / total) / 100:g}")
    longest, longest_with_half = min(training, validation) - 1, total // 2 - 1
    if longest >= min(SHORT, longest_with_half) > 0:
        ways.append(f"lower the context length to {longest} or less")
    elif longest_with_half > 0:
        ways.append(f"lower the context length to {longest_with_half} or less and hold out a share of 0.5")
    lengths = f"{shards.index['source']} has {training:,} tokens to train on and {validation:,} held out"
    least = f"a context of {context_length} needs at least {least_tokens} of each"
    raise UserError(f"{lengths}, but {least}: {', or '.join(ways)}.")

"""Sequences of different lengths as one padded tensor, and batches of sequences of similar length.

Axes: batch = examples, sequences = of one example, length = tokens.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

Rows = Sequence[Sequence[int]]


def pad(rows: Rows, pad_id: int) -> tuple[Int64[Tensor, "batch length"], Bool[Tensor, "batch length"] | None]:
    """Stack rows as one tensor, padded on the right, with a mask that is True on real tokens.

    The mask is None if all rows have the same length, because attention without a mask is faster.
    """
    lengths = torch.tensor([len(row) for row in rows], device="cpu")
    ids = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64, device="cpu")
    longest = int(lengths.max())
    if longest == int(lengths.min()):
        return ids.view(len(rows), longest), None
    mask = torch.arange(longest, device="cpu") < lengths[:, None]
    tokens = torch.full(mask.shape, pad_id, device="cpu")
    tokens[mask] = ids
    return tokens, mask


def stack_rows(rows: Rows, pad_id: int) -> tuple[Int64[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """Stack rows as one tensor, padded on the right. Return it with a mask of real tokens, also if all have the same
    length."""
    tokens, mask = pad(rows, pad_id)
    return tokens, torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask


def stack_sequences(
    rows: Sequence[Rows], pad_id: int
) -> tuple[Int64[Tensor, "batch sequences length"], Bool[Tensor, "batch sequences length"]]:
    """Stack examples of several sequences as one tensor, padded on the right, with a mask of real tokens. Missing
    sequences are empty."""
    most = max(map(len, rows))
    flat = [sequence for row in rows for sequence in (*row, *([[]] * (most - len(row))))]
    tokens, mask = stack_rows(flat, pad_id)
    return tokens.unflatten(0, (-1, most)), mask.unflatten(0, (-1, most))


def length_buckets(lengths: Sequence[int], tokens: int, rows: int) -> Iterator[list[int]]:
    """Yield the indices of rows that are computed in one pass: neighbours in length, the longest first.

    A pass has at most `rows` rows and, with padding, `tokens` tokens; a longer row is alone. From a quarter of `tokens`
    on, a pass also ends before a shorter row, which would need padding. With the longest first, a pass that does not
    fit in memory fails at once.
    """
    together: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if together:
            longest, shortest, count = lengths[together[0]], lengths[together[-1]], len(together)
            full = count == rows or longest * (count + 1) > tokens
            if full or (lengths[index] < shortest and longest * count >= tokens // 4):
                yield together
                together = []
        together.append(index)
    if together:
        yield together


def offsets(lengths: np.ndarray) -> np.ndarray:
    """Return the start of each of several concatenated sequences, and the end of the last one."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])

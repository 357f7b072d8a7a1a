"""Rows of token ids of unequal length: which go together in a pass, and how they are padded; knows no model.

Axes: batch = rows, length = tokens.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

Rows = Sequence[Sequence[int]]


def padded(rows: Rows, pad_id: int) -> tuple[Int64[Tensor, "batch length"], Bool[Tensor, "batch length"] | None]:
    """The rows as one tensor, padded on the right, and a mask that is True on real tokens.

    The mask is None where all are equally long: attention without one is faster.
    """
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
    longest = int(lengths.max())
    if longest == int(lengths.min()):
        return ids.view(len(rows), longest), None
    mask = torch.arange(longest) < lengths[:, None]
    tokens = torch.full(mask.shape, pad_id)
    tokens[mask] = ids
    return tokens, mask


def passes(lengths: Sequence[int], tokens: int, rows: int) -> Iterator[list[int]]:
    """The places of rows that go through a model together, the longest first: neighbours in length.

    A pass has at most `rows` rows and, with its padding, `tokens` tokens; a longer row is alone. Where it has a quarter
    of them, it also ends before a shorter row, which would be padded. The longest come first, so that a pass that does
    not fit in memory fails at once.
    """
    together: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if together:
            longest, shortest, count = lengths[together[0]], lengths[together[-1]], len(together)
            full = count == rows or longest * (count + 1) > tokens
            if full or (lengths[place] < shortest and longest * count >= tokens // 4):
                yield together
                together = []
        together.append(place)
    if together:
        yield together

"""The part of a whole tensor that each process holds: rows or columns by tensor parallelism, some of those by FSDP.

Axes: rows = the first axis of a tensor, columns = the second one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keifu.processes import of_all


class ShardPiece(NamedTuple):
    """Rows of a process's shard, the number of their matrix, and their position in the whole tensor."""

    start: int
    stop: int
    part: int
    row: int
    column: int


@dataclass(frozen=True)
class Layout:
    """How one tensor lies on the processes of a pod, of which `shards` share it by FSDP.

    rows: for each process along the axis `tensor` of the mesh, the ranges of whole rows that it holds, one below the
    other. columns: the range of columns of each; None: all.
    """

    shape: tuple[int, ...]
    rows: Sequence[Sequence[range]]
    columns: Sequence[range] | None = None
    shards: int = 1

    @classmethod
    def whole(cls, tensor: Tensor, processes: int, parts: Sequence[int] = ()) -> "Layout":
        """Return the layout of a tensor that is not split along the axis `tensor` of the mesh; parts: the rows of its
        matrices."""
        shape = tuple(tensor.shape)
        ends = [*accumulate(parts or (shape[:1] or (1,)))]
        return cls(shape, [[range(end - size, end) for end, size in zip(ends, parts or ends, strict=True)]] * processes)

    @property
    def parts(self) -> tuple[int, ...]:
        """The rows of each of its matrices."""
        return tuple(max(r.stop for r in same) - min(r.start for r in same) for same in zip(*self.rows, strict=True))

    @property
    def is_split(self) -> bool:
        """Whether processes along the axis `tensor` hold different parts."""
        return self.columns is not None or len({*map(str, self.rows)}) > 1

    def pieces(self, shard: int, tensor: int) -> list[ShardPiece]:
        """Return the slices of a tensor that the rank (shard, tensor) of the mesh stores."""
        total = sum(map(len, self.rows[tensor]))
        size = ceil(total / self.shards)  # as FSDP splits
        shard %= self.shards  # of what is not shared, each process has all
        first, end = min(shard * size, total), min((shard + 1) * size, total)
        column, shards, below = self.columns[tensor].start if self.columns else 0, [], 0
        for number, part in enumerate(self.rows[tensor]):
            start, stop = max(first, below), min(end, below + len(part))
            if start < stop:
                shards.append(ShardPiece(start - first, stop - first, number, part.start + start - below, column))
            below += len(part)
        return shards

    def take(self, whole: Tensor, shard: int, tensor: int) -> Tensor:
        """Return the part of a whole tensor that a process has."""
        if not self.shape:
            return whole
        parts = [self._part(whole, piece, tensor) for piece in self.pieces(shard, tensor)]
        return torch.cat(parts) if parts else whole[:0]

    def join(self, local: Tensor, ranks: Sequence[tuple[int, int]], group: Any) -> Tensor:
        """Gather the whole tensor on every process of a pod from the processes' parts; their places in the mesh are
        given.
        """
        if self.shards == 1 and not self.is_split:
            return local
        sizes = [[sum(p.stop - p.start for p in self.pieces(*rank)), *self._width(rank[1])] for rank in ranks]
        longest = max(torch.Size(size).numel() for size in sizes)
        padded = local.new_zeros(longest)
        padded[: local.numel()] = local.reshape(-1)
        whole = local.new_zeros(self.shape)
        for rank, size, flat in zip(ranks, sizes, of_all(padded, len(ranks), group), strict=True):
            part = flat[: torch.Size(size).numel()].view(size)
            for piece in self.pieces(*rank):
                self._part(whole, piece, rank[1]).copy_(part[piece.start : piece.stop])
        return whole

    def _width(self, tensor: int) -> tuple[int, ...]:
        return (len(self.columns[tensor]), *self.shape[2:]) if self.columns else self.shape[1:]

    def _part(self, whole: Tensor, piece: ShardPiece, tensor: int) -> Tensor:
        rows = whole[piece.row : piece.row + piece.stop - piece.start]
        return rows[:, piece.column : piece.column + len(self.columns[tensor])] if self.columns else rows

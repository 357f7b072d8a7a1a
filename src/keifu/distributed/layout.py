"""The shard of a tensor that each rank stores: rows or columns by tensor parallelism, and a range of these rows by
FSDP.

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
    """A range of a rank's local rows, the index of their matrix (`part`), and the offset of the range in the whole
    tensor.
    """

    start: int
    stop: int
    part: int
    row: int
    column: int


@dataclass(frozen=True)
class Layout:
    """Distribution of one tensor over the ranks of a pod. `shards`: the number of ranks that share it by FSDP.

    rows: for each rank along the mesh axis `tensor`, its ranges of rows of the whole tensor, in the order of its local
    rows. columns: the column range of each of these ranks; None: all columns.
    """

    shape: tuple[int, ...]
    rows: Sequence[Sequence[range]]
    columns: Sequence[range] | None = None
    shards: int = 1

    @classmethod
    def unsplit(cls, tensor: Tensor, processes: int, parts: Sequence[int] = ()) -> "Layout":
        """Return the layout of a tensor that is not split along the mesh axis `tensor`. parts: row counts of its joined
        matrices.
        """
        shape = tuple(tensor.shape)
        ends = [*accumulate(parts or (shape[:1] or (1,)))]
        return cls(shape, [[range(end - size, end) for end, size in zip(ends, parts or ends, strict=True)]] * processes)

    @property
    def parts(self) -> tuple[int, ...]:
        """The row count of each joined matrix."""
        return tuple(max(r.stop for r in same) - min(r.start for r in same) for same in zip(*self.rows, strict=True))

    @property
    def is_split(self) -> bool:
        """Whether ranks along the mesh axis `tensor` have different shards."""
        return self.columns is not None or len({*map(str, self.rows)}) > 1

    def pieces(self, shard: int, tensor: int) -> list[ShardPiece]:
        """Return the slices of a tensor that the rank (shard, tensor) of the mesh stores."""
        total = sum(map(len, self.rows[tensor]))
        size = ceil(total / self.shards)  # FSDP splits in this way
        shard %= self.shards  # an unsharded tensor: each rank has all rows
        first, end = min(shard * size, total), min((shard + 1) * size, total)
        column, shards, below = self.columns[tensor].start if self.columns else 0, [], 0
        for number, part in enumerate(self.rows[tensor]):
            start, stop = max(first, below), min(end, below + len(part))
            if start < stop:
                shards.append(ShardPiece(start - first, stop - first, number, part.start + start - below, column))
            below += len(part)
        return shards

    def take(self, full_tensor: Tensor, shard: int, tensor: int) -> Tensor:
        """Return the shard of a whole tensor that belongs to the rank (shard, tensor)."""
        if not self.shape:
            return full_tensor
        parts = [self._part(full_tensor, piece, tensor) for piece in self.pieces(shard, tensor)]
        return torch.cat(parts) if parts else full_tensor[:0]

    def join(self, local: Tensor, ranks: Sequence[tuple[int, int]], group: Any) -> Tensor:
        """Gather the whole tensor on every rank of a pod. ranks: the mesh coordinates (shard, tensor) of each rank."""
        if self.shards == 1 and not self.is_split:
            return local
        sizes = [[sum(p.stop - p.start for p in self.pieces(*rank)), *self._width(rank[1])] for rank in ranks]
        longest = max(torch.Size(size).numel() for size in sizes)
        padded = local.new_zeros(longest)
        padded[: local.numel()] = local.reshape(-1)
        full_tensor = local.new_zeros(self.shape)
        for rank, size, flat in zip(ranks, sizes, of_all(padded, len(ranks), group), strict=True):
            part = flat[: torch.Size(size).numel()].view(size)
            for piece in self.pieces(*rank):
                self._part(full_tensor, piece, rank[1]).copy_(part[piece.start : piece.stop])
        return full_tensor

    def _width(self, tensor: int) -> tuple[int, ...]:
        return (len(self.columns[tensor]), *self.shape[2:]) if self.columns else self.shape[1:]

    def _part(self, full_tensor: Tensor, piece: ShardPiece, tensor: int) -> Tensor:
        rows = full_tensor[piece.row : piece.row + piece.stop - piece.start]
        return rows[:, piece.column : piece.column + len(self.columns[tensor])] if self.columns else rows

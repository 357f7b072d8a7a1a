"""How a batch is split: over the ranks that share it, each of which computes some rows, and into micro-batches.

A batch is the same on every rank, since it is a function of the seed and the step. Loss and gradient are sums over its
rows, and are divided by the sum of the weights of all ranks: the split changes neither, up to rounding.

Axes: row = of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import ceil
from operator import add
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, distributed
from torch.nn.utils import get_total_norm

from keifu.training.protocols import Batch


class MicroBatch(NamedTuple):
    """Consecutive rows of a batch; `first` is the number of their first row in it."""

    first: int
    batch: Batch


@dataclass(frozen=True)
class Ranks:
    """The processes that share each batch: this one is number `rank` of `world_size`, counted from 0.

    group: the processes that share the batch; None: all. pods: the number of processes that hold the same part of the
    model, `pods_group`. pod: where the model is split over the processes of a pod, a `keifu.distributed.pod.Pod`, by
    which gradients are completed there.
    """

    rank: int = 0
    world_size: int = 1
    group: Any = None
    pods: int = 1
    pods_group: Any = None
    pod: Any = None

    def bounds(self, rows: int, rank: int) -> tuple[int, int]:
        """Return the first row of a rank's slice of `rows` rows, and the one behind its last; sizes differ by one at
        most."""
        return rows * rank // self.world_size, rows * (rank + 1) // self.world_size

    def micro_batches(self, batch: Batch, rows: int) -> list[MicroBatch]:
        """Return this rank's slice of a batch in parts of at most `rows` rows, as many parts on every rank.

        Where the slices differ by a row, a part may have one row more. A batch with fewer rows than there are ranks is
        whole on every rank.
        """
        total = rows_of(batch)
        if 0 < total < self.world_size:
            return [MicroBatch(0, batch)]
        first, end = self.bounds(total, self.rank)
        largest = ceil(total / self.world_size)
        count = min(ceil(largest / rows), total // self.world_size)
        starts = [*range(first, end, rows)]
        if len(starts) != count:
            starts = [first + (end - first) * part // count for part in range(count)]
        ends = [*starts[1:], end]
        return [
            MicroBatch(start, {name: tensor[start:stop] for name, tensor in batch.items()})
            for start, stop in zip(starts, ends, strict=True)
        ]

    def sum_counts(self, counts: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the sum of whole numbers over all ranks."""
        return counts if self.world_size == 1 else torch.stack(of_all(counts, self.world_size, self.group)).sum(0)

    def sum(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over all ranks of numbers without axes, each in its own type, in the order of the ranks."""
        if self.world_size == 1:
            return tensors
        numbers = torch.stack([tensor.double() for tensor in tensors.values()])
        columns = zip(tensors.items(), torch.stack(of_all(numbers, self.world_size, self.group), 1), strict=True)
        return {name: reduce(add, column.to(tensor.dtype)) for (name, tensor), column in columns}

    def sum_gradients(self, parameters: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Sum the gradients of parameters over all ranks, in place; return this rank's part of each, and the norm of
        all.

        A parameter that no rank has a gradient of has none afterwards; where only some ranks have one, the others add
        zeros. FSDP has already added up those that it has sharded (DTensors) over the processes of a pod.
        """
        from torch.distributed.tensor import DTensor  # takes a second to import

        used = torch.tensor([p.grad is not None for p in parameters.values()], dtype=torch.int32)
        if self.world_size > 1:
            used = used.to(next(iter(parameters.values())).device)
            distributed.all_reduce(used, distributed.ReduceOp.MAX, group=self.group)
        chosen = {n: p for (n, p), wanted in zip(parameters.items(), used.tolist(), strict=True) if wanted}
        for p in chosen.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        sharded = {name: p.grad.to_local() for name, p in chosen.items() if isinstance(p.grad, DTensor)}
        whole = {name: p.grad for name, p in chosen.items() if p.grad is not None and name not in sharded}
        if self.pod:
            self.pod.complete(whole | sharded)
        sum_in_order([*whole.values()], self.world_size, self.group)
        sum_in_order([*sharded.values()], self.pods, self.pods_group)
        gradients = whole | sharded
        norm = self.pod.norm(gradients) if self.pod else get_total_norm([*gradients.values()])
        return [*gradients.values()], norm

    def counts(self, rows: Tensor) -> list[int]:
        """Return the number of rows of such a tensor on every rank."""
        if self.world_size == 1:
            return [len(rows)]
        return [*map(int, of_all(torch.full((1,), len(rows), device=rows.device), self.world_size, self.group))]

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, one rank's after the other's."""
        if self.world_size == 1:
            return rows
        counts = self.counts(rows)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = zip(of_all(padded, self.world_size, self.group), counts, strict=True)
        return torch.cat([part[:count] for part, count in parts])

    def gather_batch(self, batch: Batch, padding: Mapping[str, int]) -> Batch:
        """Return the rows of all ranks of a batch whose tensors have one axis, or a second one of positions, which
        differ in number and are padded on the right, with 0 where nothing is said."""
        if self.world_size == 1:
            return batch
        found = {}
        for name, tensor in batch.items():
            longest = max(self.counts(tensor.mT)) if tensor.dim() == 2 else 0
            more = (0, longest - tensor.shape[1]) if tensor.dim() == 2 else (0, 0)
            padded = F.pad(tensor, more, value=padding.get(name, 0))
            found[name] = self.gather(padded.byte()).bool() if tensor.dtype == torch.bool else self.gather(padded)
        return found


def of_all(tensor: Tensor, world: int, group: Any = None) -> list[Tensor]:
    """Return the same tensor of every rank of a group, in their order; all have one shape."""
    found = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world)]
    distributed.all_gather(found, tensor.contiguous(), group=group)
    return found


BUCKET = 2**24  # elements that are exchanged at a time


def sum_in_order(tensors: Sequence[Tensor], world: int, group: Any = None) -> None:
    """Sum tensors over the ranks of a group, in place: ((rank 0 + rank 1) + rank 2) + ..., the same on every rank.

    So one process that adds up as many micro-batches has these bits too. Each rank adds up its part of all elements,
    and sends as many bytes as in an all-reduce: 2 (world - 1) / world of the tensors.
    """
    if world == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        padded = F.pad(flat, (0, -len(flat) % world))
        received = torch.empty_like(padded)
        distributed.all_to_all_single(received, padded, group=group)
        total = reduce(add, received.view(world, -1))
        distributed.all_gather([*padded.view(world, -1).unbind()], total, group=group)
        for tensor, part in zip(bucket, padded[: len(flat)].split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type, together about `BUCKET` elements."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket, filled = [], 0
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            bucket.append(tensor)
            filled += tensor.numel()
            if filled >= BUCKET:
                yield bucket
                bucket, filled = [], 0
        if bucket:
            yield bucket


def local(tensor: Any) -> Tensor:
    """Return this process's shard of a tensor, or all of it if FSDP has not sharded it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor.detach()
    from torch.distributed.tensor import DTensor

    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def rows_of(batch: Batch) -> int:
    """Return the number of rows of a batch."""
    return len(next(iter(batch.values())))


def row_elements(batch: Batch) -> int:
    """Return the number of elements in a row of a batch, over all its tensors."""
    return sum(tensor.numel() for tensor in batch.values()) // max(1, rows_of(batch))

"""The processes that train one model together: how they split a batch, share values and add up gradients.

Every process has the same batch, because the batch depends only on the seed and the step. Each process computes some of
its rows, in micro-batches. Loss and gradient are sums over rows, divided by the sum of weights over all processes. So
the number of processes changes neither, up to rounding. Only rank 0 writes into the run's directory and prints.
`keifu.distributed` starts and connects processes, and splits a model over them.

Axes: row = row of a batch.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from math import ceil
from operator import add
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.nn.utils import get_total_norm

Batch = dict[str, Tensor]


class OwnRows(Batch):
    """Rows of a batch that this process computes. `first` is the index of the first one, among `total` rows of the
    batch."""

    def __init__(self, batch: Batch, first: int, total: int):
        super().__init__(batch)
        self.first, self.total = first, total


class MicroBatch(NamedTuple):
    """Consecutive rows of a batch; `first` is the index of their first row in the batch."""

    first: int
    rows: int
    batch: Batch


class Processes:
    """Single process that trains alone. The subclass `keifu.distributed.group.Group` is for several.

    rank: index of this process, from 0. data_rank, data_size: index of this process among those that share each batch,
    and their number. data_group: group of these processes; None: all. is_replicated: whether each process has the whole
    model. pod: the shards of this process (`keifu.distributed.pod.Pod`) if the model is split. pods: number of
    processes with the same shards, in `pods_group`. overlaps: whether gradients are summed over the processes during
    the last backward pass of a step. filled: ids of parameters whose gradient that pass has set to zeros.
    """

    rank = 0
    world_size = 1
    data_group: Any = None
    is_replicated = True
    pod: Any = None
    pods = 1
    pods_group: Any = None
    overlaps = False
    filled: Collection[int] = ()

    def __init__(self, data_rank: int = 0, data_size: int = 1):
        self.data_rank, self.data_size = data_rank, data_size

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has reached this line."""

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0 on every process. It must be JSON-serialisable."""
        return value

    def gather(self, text: str) -> list[str]:
        """Return the strings of all processes in rank order on rank 0; on other ranks only the rank's string."""
        return [text]

    def begin_step(self, step: int) -> None:
        """Report to the other processes that this one begins a step."""

    def split(self, module: Any, dtype: Any = None) -> Any:
        """Split a module over the processes without changing its code. dtype: of its weights during a pass; None:
        unchanged."""
        return module

    @contextmanager
    def backward(self, module: Any, last: bool) -> Iterator[None]:
        """Context of a module's backward pass. last: whether it is the last backward pass of the step. Gradients of
        earlier passes are not exchanged."""
        yield

    def discard_gradients(self, module: Any) -> None:
        """Free the gradients of a step that is given up."""

    def full_tensor(self, name: str, tensor: Any) -> Any:
        """Gather a tensor that belongs to the parameter `name` from the shards of all processes."""
        return tensor if self.pod is None else self.pod.full_tensor(name, tensor)

    def save(self, *state: Any) -> None:
        """Save the state of a split model (see `keifu.training.run.checkpoint.save`)."""

    def flush(self) -> None:
        """Wait until the state written by `save` is on disk."""

    def load(self, path: Any, tensors: Any) -> dict[str, Any]:
        """Fill the tensors of a split model from a saved state. Return the state's other tensors."""
        return {}

    def layout(self, name: str) -> Any:
        """Return the `keifu.distributed.layout.Layout` of a parameter; None if each process has all of it."""
        return None if self.pod is None else self.pod.layouts.get(name)

    def bounds(self, rows: int) -> tuple[int, int]:
        """Return start and end (exclusive) of this rank's slice of `rows` rows. Sizes of the slices differ by at most
        one row."""
        return rows * self.data_rank // self.data_size, rows * (self.data_rank + 1) // self.data_size

    def own_bounds(self, rows: int) -> tuple[int, int]:
        """Return `bounds(rows)`, or all rows if the batch has fewer rows than ranks: then every rank computes the whole
        batch."""
        return (0, rows) if rows < self.data_size else self.bounds(rows)

    def micro_batches(self, batch: Batch, rows: int) -> list[MicroBatch]:
        """Split this rank's slice of a batch into micro-batches of at most `rows` rows. Every rank gets the same number
        of them.

        If slices differ by a row, a micro-batch may have one row more. A batch with fewer rows than ranks is whole on
        every rank.
        """
        total, before = rows_of(batch), batch.first if isinstance(batch, OwnRows) else 0
        if 0 < total < self.data_size:
            return [MicroBatch(0, total, batch)]
        first, end = self.bounds(total)
        largest = ceil(total / self.data_size)
        count = min(ceil(largest / rows), total // self.data_size)
        starts = [*range(first, end, rows)]
        if len(starts) != count:
            starts = [first + (end - first) * part // count for part in range(count)]
        ends = [*starts[1:], end]
        return [
            MicroBatch(start, stop - start, {name: x[start - before : stop - before] for name, x in batch.items()})
            for start, stop in zip(starts, ends, strict=True)
        ]

    def sum_counts(self, counts: Tensor) -> Tensor:
        """Return the sum of integers over all ranks, in the shape of `counts`."""
        return counts if self.data_size == 1 else torch.stack(of_all(counts, self.data_size, self.data_group)).sum(0)

    def sum(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sum of each 0-dimensional tensor over all ranks, in its dtype. The order of addition is that of
        the ranks."""
        if self.data_size == 1:
            return tensors
        numbers = torch.stack([tensor.double() for tensor in tensors.values()])
        columns = zip(tensors.items(), torch.stack(of_all(numbers, self.data_size, self.data_group), 1), strict=True)
        return {name: reduce(add, column.to(tensor.dtype)) for (name, tensor), column in columns}

    def sum_gradients(self, parameters: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Sum the gradients of parameters over all ranks, in place. Return this rank's part of each gradient, and the
        norm of all.

        A parameter without a gradient on every rank stays without one. If only some ranks have one, the others add
        zeros. FSDP has already summed the gradients of its parameters (DTensors) over the processes of a pod. Gradients
        of overlapped processes (`overlaps`) are summed over all ranks.
        """
        from torch.distributed.tensor import DTensor  # importing it takes a second

        computed = [p.grad is not None and id(p) not in self.filled for p in parameters.values()]
        used_flags = torch.tensor(computed, dtype=torch.int32)
        if self.data_size > 1:
            used_flags = used_flags.to(next(iter(parameters.values())).device)
            distributed.all_reduce(used_flags, distributed.ReduceOp.MAX, group=self.data_group)
        for p, is_used in zip(parameters.values(), used_flags.tolist(), strict=True):
            p.grad = None if not is_used else torch.zeros_like(p) if p.grad is None else p.grad
        sharded = {name: p.grad.to_local() for name, p in parameters.items() if isinstance(p.grad, DTensor)}
        unsharded = {name: p.grad for name, p in parameters.items() if p.grad is not None and name not in sharded}
        if self.pod:
            self.pod.sum_partial(unsharded | sharded)
        if not self.overlaps:
            sum_in_order([*unsharded.values()], self.data_size, self.data_group)
            sum_in_order([*sharded.values()], self.pods, self.pods_group)
        gradients = unsharded | sharded
        norm = self.pod.norm(gradients) if self.pod else get_total_norm([*gradients.values()])
        return [*gradients.values()], norm

    def counts(self, rows: Tensor) -> list[int]:
        """Return the number of rows of `rows` on every rank."""
        if self.data_size == 1:
            return [len(rows)]
        return [*map(int, of_all(torch.full((1,), len(rows), device=rows.device), self.data_size, self.data_group))]

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all ranks, in rank order."""
        if self.data_size == 1:
            return rows
        counts = self.counts(rows)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = zip(of_all(padded, self.data_size, self.data_group), counts, strict=True)
        return torch.cat([part[:count] for part, count in parts])

    def gather_batch(self, batch: Batch, padding: Mapping[str, int]) -> Batch:
        """Concatenate the batches of all ranks along the rows.

        Tensors have one axis (rows), or two (rows, positions). If ranks differ in the number of positions, tensors are
        padded on the right with their value in `padding`, or 0.
        """
        if self.data_size == 1:
            return batch
        gathered = {}
        for name, tensor in batch.items():
            longest = max(self.counts(tensor.mT)) if tensor.dim() == 2 else 0
            pad_sizes = (0, longest - tensor.shape[1]) if tensor.dim() == 2 else (0, 0)
            padded = F.pad(tensor, pad_sizes, value=padding.get(name, 0))
            rows = self.gather_rows(padded.byte() if tensor.dtype == torch.bool else padded)
            gathered[name] = rows.to(tensor.dtype)
        return gathered


_processes = Processes()


def current() -> Processes:
    """Return the processes of the current run."""
    return _processes


@contextmanager
def use(processes: Processes) -> Iterator[None]:
    """Make `processes` the current group inside a block."""
    global _processes
    before = _processes
    _processes = processes
    try:
        yield
    finally:
        _processes = before


def of_all(tensor: Tensor, world: int, group: Any = None) -> list[Tensor]:
    """Return the ranks' versions of a tensor, in rank order. All have one shape."""
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world)]
    distributed.all_gather(gathered, tensor.contiguous(), group=group)
    return gathered


BUCKET = 2**24  # number of elements that are exchanged at once


def sum_in_order(tensors: Sequence[Tensor], world: int, group: Any = None) -> None:
    """Sum tensors over the ranks of a group, in place. The order is ((rank 0 + rank 1) + rank 2) + ... on every rank.

    So the result has the same bits as one process that adds up as many micro-batches. Each rank adds up one slice of
    all elements. It sends as many bytes as in an all-reduce: 2 (world - 1) / world of the tensors.
    """
    if world == 1:
        return
    for bucket in buckets(tensors, BUCKET):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        padded = F.pad(flat, (0, -len(flat) % world))
        received = torch.empty_like(padded)
        distributed.all_to_all_single(received, padded, group=group)
        total = reduce(add, received.view(world, -1))
        distributed.all_gather([*padded.view(world, -1).unbind()], total, group=group)
        for tensor, part in zip(bucket, padded[: len(flat)].split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def buckets(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Group tensors of one dtype into lists of about `size` elements, and yield each list."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket, filled = [], 0
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            bucket.append(tensor)
            filled += tensor.numel()
            if filled >= size:
                yield bucket
                bucket, filled = [], 0
        if bucket:
            yield bucket


def local(tensor: Any) -> Tensor:
    """Return this process's shard of a tensor, or the whole tensor if FSDP has not sharded it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor.detach()
    from torch.distributed.tensor import DTensor

    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def rows_of(batch: Batch) -> int:
    """Return the number of rows of a batch."""
    return batch.total if isinstance(batch, OwnRows) else len(next(iter(batch.values())))


def row_elements(batch: Batch) -> int:
    """Return the number of elements in one row of a batch, over all its tensors."""
    return sum(tensor.numel() for tensor in batch.values()) // max(1, len(next(iter(batch.values()))))

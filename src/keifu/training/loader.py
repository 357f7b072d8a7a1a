"""Prefetching of batches: a thread makes the next batch and copies it to the GPU during the current step.

On a CPU a batch is made when it is needed: a thread would only slow down the computation.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch

from keifu.processes import OwnRows, current, rows_of
from keifu.training.protocols import Batch, Bounds, Data, DividedData


def prefetches(device: torch.device) -> bool:
    """Return whether batches for this device are prefetched: not for a CPU."""
    return device.type != "cpu"


def own_rows(data: Data, step: int) -> Batch:
    """Return this process's rows of the batch of a step. `DividedData` makes only those."""
    if current().data_size == 1:
        return data.batch(step)
    return OwnRows(*part_of(data, step, current().own_bounds))


def part_of(data: Data, step: int, bounds: Bounds) -> tuple[Batch, int, int]:
    """Return the rows of a step's batch within `bounds`, their first index and the batch's total rows, for any data."""
    if isinstance(data, DividedData):
        return data.part(step, bounds)
    batch = data.batch(step)
    first, end = bounds(rows_of(batch))
    return {name: tensor[first:end] for name, tensor in batch.items()}, first, rows_of(batch)


class Loader:
    """Source of batches by their number. ahead: whether a thread makes the next one.

    On CUDA the copy uses pinned memory and a separate stream, so that neither the host nor the computation waits for
    it. A batch depends only on its number, so prefetching does not change it.
    """

    def __init__(self, make: Callable[[int], Batch], device: torch.device, ahead: bool):
        self.make, self.device = make, device
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="batches") if ahead else None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.number: int | None = None
        self.next: Future[Batch] | None = None

    def get(self, number: int, following: int | None = None) -> Batch:
        """Return the batch `number`, and start to prefetch the batch `following` unless it is None."""
        self.wait()
        batch = self.next.result() if self.next and self.number == number else self._load(number)
        if self.stream:
            current = torch.cuda.current_stream(self.device)
            # the batch's copy is the stream's only work: the next copy is requested below
            current.wait_stream(self.stream)
            for tensor in batch.values():
                tensor.record_stream(current)  # do not reuse its memory before the computation has read it
        self.number = self.next = None
        if self.worker and following is not None:
            self.number, self.next = following, self.worker.submit(self._load, following)
        return batch

    def wait(self) -> None:
        """Wait until the thread is idle, so that the data can be used for something else."""
        if self.next:
            self.next.exception()

    def close(self) -> None:
        """End the thread after its current batch."""
        if self.worker:
            self.worker.shutdown()

    def _load(self, number: int) -> Batch:
        batch = self.make(number)
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            return on_device(batch, self.device)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device; to CUDA without waiting for the copy."""
    cuda = device.type == "cuda"
    source = {name: x.pin_memory() if cuda and x.device.type == "cpu" else x for name, x in batch.items()}
    copied = {name: tensor.to(device, non_blocking=cuda) for name, tensor in source.items()}
    return OwnRows(copied, batch.first, batch.total) if isinstance(batch, OwnRows) else copied

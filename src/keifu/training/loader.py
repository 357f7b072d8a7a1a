"""Prefetching of batches: a thread makes the next batch and copies it to the GPU while the current one is computed.

For training on a CPU, a batch is made when it is needed: a thread would only take time from the computation.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import torch

from keifu.processes import OwnRows, current, rows_of
from keifu.training.protocols import Batch, Bounds, Data, DividedData


def prefetches(device: torch.device) -> bool:
    """Return whether batches for this device are made ahead: not for a CPU."""
    return device.type != "cpu"


def own_rows(data: Data, step: int) -> Batch:
    """Return the rows that this process computes of the batch of a step; data that can makes only those."""
    if current().data_size == 1:
        return data.batch(step)
    return OwnRows(*part_of(data, step, current().own_bounds))


def part_of(data: Data, step: int, bounds: Bounds) -> tuple[Batch, int, int]:
    """Return rows of the batch of a step as `DividedData` gives them, of any data."""
    if isinstance(data, DividedData):
        return data.part(step, bounds)
    batch = data.batch(step)
    first, end = bounds(rows_of(batch))
    return {name: tensor[first:end] for name, tensor in batch.items()}, first, rows_of(batch)


class Loader:
    """Source of batches by their number; with `ahead`, a thread makes the next one.

    On CUDA the copy starts in pinned memory and has its own stream, so that neither the host nor the computation waits
    for it. A batch depends on its number alone, so prefetching does not change it.
    """

    def __init__(self, make: Callable[[int], Batch], device: torch.device, ahead: bool):
        self.make, self.device = make, device
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="batches") if ahead else None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.number: int | None = None
        self.next: Future[Batch] | None = None

    def get(self, number: int, following: int | None = None) -> Batch:
        """Return the batch of this number; then starts to make the one of number `following`, if there is one."""
        self.wait()
        batch = self.next.result() if self.next and self.number == number else self._load(number)
        if self.stream:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)  # for this copy: the next one has not been asked for
            for tensor in batch.values():
                tensor.record_stream(current)  # its memory is not reused before the computation has read it
        self.number = self.next = None
        if self.worker and following is not None:
            self.number, self.next = following, self.worker.submit(self._load, following)
        return batch

    def wait(self) -> None:
        """Wait until the thread is idle, so that the data may be used for something else."""
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
    """Return a batch copied to a device; to CUDA without waiting for the copy."""
    made = {
        name: (tensor.pin_memory() if tensor.device.type == "cpu" else tensor).to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
        for name, tensor in batch.items()
    }
    return OwnRows(made, batch.first, batch.total) if isinstance(batch, OwnRows) else made

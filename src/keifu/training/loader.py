"""Batches on their way to a device: the next one is made and copied while this one is computed; knows no loop.

On a CPU there is nothing beside which to make it, so a batch is made when it is asked for.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from keifu.training.protocols import Batch


def beside(device: torch.device) -> bool:
    """Whether the device computes while the CPU makes the next batch."""
    return device.type != "cpu"


class Loaded(NamedTuple):
    """A batch on its device, and on CUDA the event after which it is there."""

    batch: Batch
    there: Any = None


class Loader:
    """Makes the batches of numbers that are asked for; `ahead` makes the next one in a thread of its own.

    On CUDA the copy starts in pinned memory and goes through a stream of its own, so that neither the host nor the
    computation waits for it. A batch depends on its number alone, so making it ahead changes nothing.
    """

    def __init__(self, make: Callable[[int], Batch], device: torch.device, ahead: bool):
        self.make, self.device = make, device
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="batches") if ahead else None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.number: int | None = None
        self.next: Future[Loaded] | None = None

    def get(self, number: int, following: int | None = None) -> Batch:
        """The batch of that number; meanwhile the one of `following` is begun, where there will be one."""
        self.wait()
        loaded = self.next.result() if self.next and self.number == number else self._load(number)
        self.number = self.next = None
        if self.worker and following is not None:
            self.number, self.next = following, self.worker.submit(self._load, following)
        return self._taken(loaded)

    def wait(self) -> None:
        """Waits until nothing is being made, so that the data may be used for something else."""
        if self.next:
            self.next.exception()

    def close(self) -> None:
        """Ends the thread, once it has made what it is making."""
        if self.worker:
            self.worker.shutdown()

    def _load(self, number: int) -> Loaded:
        batch = self.make(number)
        if self.stream is None:
            return Loaded(on_device(batch, self.device))
        with torch.cuda.stream(self.stream):
            moved = on_device(batch, self.device)
            return Loaded(moved, self.stream.record_event())

    def _taken(self, loaded: Loaded) -> Batch:
        if loaded.there is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(loaded.there)
            for tensor in loaded.batch.values():
                tensor.record_stream(current)  # its memory is not used again before the computation is done with it
        return loaded.batch


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch moved to a device; to a GPU without waiting for the copy."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return {
        name: (tensor.pin_memory() if tensor.device.type == "cpu" else tensor).to(device, non_blocking=True)
        for name, tensor in batch.items()
    }

"""The processes that train one model together: the rank of this one, and the values they share.

Rank 0 alone writes into the run's directory and prints. `keifu.distributed` starts and connects processes, and splits a
model over them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Processes:
    """A process that trains alone. `keifu.distributed.group.Group` is the class for several.

    rank: the number of this process, from 0. is_replicated: whether each process has the whole model. pod: the shards
    of this process (`keifu.distributed.pod.Pod`) if the model is split.
    """

    rank = 0
    world_size = 1
    is_replicated = True
    pod: Any = None

    @property
    def is_main(self) -> bool:
        """Return whether this process writes and prints."""
        return self.rank == 0

    @property
    def ranks(self) -> Any:
        """Return how a batch is split over the processes, a `keifu.training.ranks.Ranks`; None: it is not split."""
        return None

    def barrier(self) -> None:
        """Wait until every process has reached this line."""

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0 on every process. It must be JSON-serialisable."""
        return value

    def gather(self, text: str) -> list[str]:
        """Return the strings of all processes, in rank order, on rank 0; on other ranks only their own."""
        return [text]

    def begin_step(self, step: int) -> None:
        """Report to the other processes that this one begins a step."""

    def split(self, module: Any, dtype: Any = None) -> Any:
        """Split a module over the processes from outside. dtype: of its weights during a pass; None: as they are."""
        return module

    def set_last_backward(self, module: Any, last: bool) -> None:
        """Set whether the next backward pass of a split module is the last of its step.

        Gradients of earlier passes stay on their process.
        """

    def discard_gradients(self, module: Any) -> None:
        """Free the gradients of a step that is given up."""

    def full_tensor(self, name: str, tensor: Any) -> Any:
        """Gather a tensor that belongs to the parameter `name` from the shards of all processes."""
        return tensor if self.pod is None else self.pod.full_tensor(name, tensor)

    def save(self, *state: Any) -> None:
        """Save the state of a split model (see `keifu.training.run.checkpoint.save`)."""

    def flush(self) -> None:
        """Wait until the state that `save` writes is on disk."""

    def load(self, path: Any, tensors: Any) -> dict[str, Any]:
        """Fill the tensors of a split model from a state, and return the state's other tensors."""
        return {}

    def layout(self, name: str) -> Any:
        """Return the `keifu.distributed.layout.Layout` of a parameter; None: each process has all of it."""
        return None if self.pod is None else self.pod.layouts.get(name)


_processes = Processes()


def current() -> Processes:
    """Return the processes that this one belongs to."""
    return _processes


@contextmanager
def use(processes: Processes) -> Iterator[None]:
    """Make this process one of several in this block."""
    global _processes
    before = _processes
    _processes = processes
    try:
        yield
    finally:
        _processes = before

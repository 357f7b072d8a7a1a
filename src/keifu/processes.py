"""The processes that train one model together: which one this is, and what they agree on; one alone without any other.

The first process alone writes into the run's directory and prints. `keifu.distributed` starts and joins processes, and
says how a model is split over them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Processes:
    """This process alone. What several do otherwise, `keifu.distributed.group.Group` says.

    number: of this process, from 0. whole: whether each process holds the whole model. pod: what it holds of one that
    is split, a `keifu.distributed.pod.Pod`.
    """

    number = 0
    count = 1
    whole = True
    pod: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.number == 0

    @property
    def ranks(self) -> Any:
        """Which rows of a batch this process computes, a `keifu.training.ranks.Ranks`; None: all."""
        return None

    def wait(self) -> None:
        """Waits until every process has come here."""

    def same(self, value: Any) -> Any:
        """The first process's value, which JSON can hold, on every process."""
        return value

    def texts(self, text: str) -> list[str]:
        """The texts of all processes, in their order, on the first one; on others their own."""
        return [text]

    def begin(self, step: int) -> None:
        """Tells the others that this process begins a step."""

    def split(self, module: Any) -> Any:
        """A module, split over the processes from outside."""
        return module

    def accumulate(self, module: Any, last: bool) -> None:
        """Says before a backward pass of a split module whether it is the last one of a step: gradients of the others
        stay with their process."""

    def drop(self, module: Any) -> None:
        """Frees such gradients of a step that is given up."""

    def join(self, name: str, tensor: Any) -> Any:
        """The whole of a tensor that belongs to the parameter of that name, from what each process holds of it."""
        return tensor if self.pod is None else self.pod.join(name, tensor)

    def save(self, *state: Any) -> None:
        """Saves the state of a split model (see `keifu.training.run.checkpoint.save`)."""

    def flush(self) -> None:
        """Waits until what `save` saves is on disk."""

    def load(self, path: Any, tensors: Any) -> dict[str, Any]:
        """Fills the tensors of a split model from a state; gives the state's other tensors."""
        return {}

    def layout(self, name: str) -> Any:
        """Which part of a parameter each process holds, a `keifu.distributed.layout.Layout`; None: all of it."""
        return None if self.pod is None else self.pod.layouts.get(name)


_processes = Processes()


def current() -> Processes:
    """The processes that this one belongs to."""
    return _processes


@contextmanager
def use(processes: Processes) -> Iterator[None]:
    """Makes this process one of several in this block."""
    global _processes
    before, _processes = _processes, processes
    try:
        yield
    finally:
        _processes = before

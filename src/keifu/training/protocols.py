"""The interfaces between the training loop, its data and its objectives.

A batch is a dict of tensors whose first axis is rows. An objective computes sums over elements (tokens, pictures, rows
of a table) from a model and a batch, so that a batch can be split anywhere without changing the loss.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

Batch: TypeAlias = dict[str, Tensor]
Bounds: TypeAlias = Callable[[int], tuple[int, int]]


class LossOutput(NamedTuple):
    """Sums over the elements of a batch: the loss in nats, the number of elements, and further figures."""

    total: Tensor
    weight: Tensor | float
    figures: dict[str, Tensor] = {}


Objective: TypeAlias = Callable[[nn.Module, Batch], LossOutput]
Sample: TypeAlias = Callable[[int], str | bytes]  # the number of steps done → a text, or a picture as PNG
Save: TypeAlias = Callable[[Path], None]  # writes the model into the run's directory


@runtime_checkable
class Data(Protocol):
    """Training data: batches that depend only on the seed and the step, and a fixed validation set."""

    @property
    def fingerprint(self) -> str:
        """A hash of the data. A run cannot be resumed with data of another fingerprint."""
        ...

    def batch(self, step: int) -> Batch:
        """Return the whole batch of a step (from 0). The loop splits it by rows."""
        ...

    def validation(self) -> Iterable[Batch]:
        """Return the batches for the validation loss, or nothing without held-out data."""
        ...


@runtime_checkable
class DividedData(Protocol):
    """Data that can make some rows of a batch, so that a process reads and makes only the rows it needs."""

    def part(self, step: int, bounds: Bounds) -> tuple[Batch, int, int]:
        """Return some rows of the batch of a step, the index of the first one, and the number of rows of the whole
        batch.

        bounds: number of rows of a batch → the index of the first wanted row and of the one after the last.
        """
        ...


@runtime_checkable
class OnPolicy(Protocol):
    """Data whose batches also depend on the current weights, such as rollouts: a batch is made only after the previous
    update. If several updates share a rollout, a checkpoint stores it too.
    """

    on_policy: Literal[True]

    def state(self) -> Batch:
        """Return what later batches need and later weights could not make again, such as the current rollout."""
        ...

    def load_state(self, state: Batch) -> None:
        """Restore a result of `state`."""
        ...


class StatelessBatches:
    """Base class of on-policy data without a state: the current weights make each batch, which serves one update."""

    on_policy: Literal[True] = True

    def state(self) -> Batch:
        """Return {}: there is no state."""
        return {}

    def load_state(self, state: Batch) -> None:
        """Do nothing: there is no state."""


@dataclass(frozen=True)
class Run:
    """A run: its directory and its description.

    options: further values that determine the result besides the settings (the model's config, the data's options);
    compared when the run is resumed. about: entries of the report: title, paper, command, data (a list of dicts), and
    others. unit: name of the elements that the objective counts. bytes_per_unit: converts the loss to bits per byte.
    watch: called with the figures of each line of metrics; returns warnings.
    """

    directory: Path
    resume: bool = False
    replace: bool = False  # start over in a directory with a run: its state, metrics and samples are removed
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "tokens"
    bytes_per_unit: float | None = None
    watch: Callable[[Mapping[str, float]], Iterable[str]] | None = None

"""The interfaces between the training loop, its data and its objectives.

A batch is a dict of tensors whose first axis is rows. An objective computes sums over elements (tokens, pictures, rows
of a table) from a model and a batch, so that a batch may be split anywhere without changing the loss.
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
    """Training data: batches as a function of the seed and the step alone, and a fixed validation set."""

    @property
    def fingerprint(self) -> str:
        """A hash of the data; a run cannot be resumed with data of another fingerprint."""
        ...

    def batch(self, step: int) -> Batch:
        """Return the whole batch of a step (from 0); the loop splits it by rows."""
        ...

    def validation(self) -> Iterable[Batch]:
        """Return the batches for the validation loss, or nothing without held-out data."""
        ...


@runtime_checkable
class DividedData(Protocol):
    """Data that can make some rows of a batch alone, so that a process reads and makes only those that it computes."""

    def part(self, step: int, bounds: Bounds) -> tuple[Batch, int, int]:
        """Return rows of the batch of a step, the number of their first row, and the number of rows in all.

        bounds: the first row and the row after the last one, of a batch of so many rows.
        """
        ...


@runtime_checkable
class OnPolicy(Protocol):
    """Data whose batches also depend on the current weights, as rollouts do: a batch is made only after the update
    before it. Where several updates share one rollout, a checkpoint holds it too.
    """

    on_policy: Literal[True]

    def state(self) -> Batch:
        """Return the state that later batches need and later weights could not make again, such as the current
        rollout."""
        ...

    def load_state(self, state: Batch) -> None:
        """Restore what `state` gave."""
        ...


class StatelessBatches:
    """Data without a state: the current weights make each batch, which serves one update."""

    on_policy: Literal[True] = True

    def state(self) -> Batch:
        """Return nothing."""
        return {}

    def load_state(self, state: Batch) -> None:
        """Restore what `state` gave."""


@dataclass(frozen=True)
class Run:
    """A run: its directory, and its description.

    `options`: what decides the result beside the settings (the model's config, the data's options); compared when the
    run is resumed. `about`: shown in the report: title, paper, command, data (a list of dicts), and anything else.
    `unit`: the name of the elements that the objective counts. `bytes_per_unit`: turns the loss into bits per byte.
    `watch`: called with the figures of each line of metrics, gives warnings.
    """

    directory: Path
    resume: bool = False
    replace: bool = False  # start over in a directory that holds a run: its state, metrics and samples are removed
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "tokens"
    bytes_per_unit: float | None = None
    watch: Callable[[Mapping[str, float]], Iterable[str]] | None = None

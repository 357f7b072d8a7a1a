"""What the loop asks of data and objectives; knows neither's content.

A batch is a dict of tensors whose first axis is rows. An objective turns a model and a batch into sums over elements
(tokens, pictures, rows of a table), so that a batch may be split anywhere without changing the loss.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

Batch: TypeAlias = dict[str, Tensor]


class LossOutput(NamedTuple):
    """Sums over the elements of a batch: the loss in nats, the number of elements, and further figures."""

    total: Tensor
    weight: Tensor | float
    figures: dict[str, Tensor] = {}


Objective: TypeAlias = Callable[[nn.Module, Batch], LossOutput]
Sample: TypeAlias = Callable[[int], str | bytes]  # from the number of steps done: a text, or a picture as PNG
Save: TypeAlias = Callable[[Path], None]  # writes the model into the run's folder


@runtime_checkable
class Data(Protocol):
    """Batches as a function of the seed and the step alone, and a validation set that is always the same."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data do; resuming with another one is an error."""
        ...

    def batch(self, step: int) -> Batch:
        """The whole batch of a step; the loop splits it by rows."""
        ...

    def validation(self) -> Iterable[Batch]:
        """Batches for the validation loss; empty where there are none."""
        ...


@runtime_checkable
class OnPolicy(Protocol):
    """What data declare whose batches are a function of the weights too: none is made before the update before it.

    Where several updates share what was made with the weights before the first of them, a state holds that too.
    """

    on_policy: Literal[True]

    def kept(self) -> Batch:
        """What batches to come are made of and later weights could not make again; empty where there is nothing."""
        ...

    def take_up(self, kept: Batch) -> None:
        """Goes on with what `kept` gave."""
        ...


@dataclass(frozen=True)
class Run:
    """Where a run lives, what it is about, and how it starts.

    `options` is what decides the result beside the settings (the model's config, the data's options): it is compared on
    resuming. `about` is shown in the report: title, paper, command, data (a list of dicts), and whatever else. `unit`
    names the elements that the objective counts. `bytes_per_unit` turns the loss into bits per byte. `watch` turns
    the means of a line of metrics into warnings.
    """

    directory: Path
    resume: bool = False
    replace: bool = False  # start over although the folder holds a run: its state, metrics and samples are removed
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "tokens"
    bytes_per_unit: float | None = None
    watch: Callable[[Mapping[str, float]], Iterable[str]] | None = None

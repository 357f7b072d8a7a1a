"""One training step: the gradient of a batch, computed in micro-batches; and the validation loss."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.dropout import DropoutKeys
from keifu.training.grad_cache import WholeBatchObjective, whole_batch_outputs
from keifu.training.hardware import failures
from keifu.training.hardware.precision import LossScale, autocast
from keifu.training.loader import on_device
from keifu.training.optim.optimizers import Optimizers
from keifu.training.protocols import Batch, LossOutput, Objective


@dataclass
class Sums:
    """Running sums of the loss, the number of elements and the figures; they stay on the device until they are read."""

    total: Tensor
    weight: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, outcome: LossOutput) -> "Sums":
        """The sums of one micro-batch, detached."""
        total = outcome.total.detach()
        figures = {name: torch.as_tensor(value).detach() for name, value in outcome.figures.items()}
        return cls(total, torch.as_tensor(outcome.weight, dtype=torch.float32, device=total.device), figures)

    def __add__(self, other: "Sums") -> "Sums":
        figures = {name: value + other.figures[name] for name, value in self.figures.items()}
        return Sums(self.total + other.total, self.weight + other.weight, figures)

    def means(self) -> dict[str, float]:
        """The mean loss and figures per element; waits for the device."""
        weight = float(self.weight) or 1.0
        return {"loss": float(self.total) / weight, **{name: float(v) / weight for name, v in self.figures.items()}}

    def tensors(self) -> dict[str, Tensor]:
        """Copies for a checkpoint, which `from_tensors` takes; each has memory of its own, since a figure may be the
        total itself."""
        named = {"total": self.total, "weight": self.weight} | {f"figures.{n}": v for n, v in self.figures.items()}
        return {name: tensor.clone() for name, tensor in named.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: torch.device) -> "Sums":
        """The sums of a checkpoint."""
        placed = {name: tensor.to(device) for name, tensor in tensors.items()}
        total, weight = placed.pop("total"), placed.pop("weight")
        return cls(total, weight, {name.removeprefix("figures."): value for name, value in placed.items()})


class Gradient(NamedTuple):
    """The result of a batch: its sums, and the norm of its mean gradient before clipping."""

    sums: Sums
    norm: Tensor


class MicroBatch(NamedTuple):
    """Consecutive rows of a batch; `first` is the number of their first row in it."""

    first: int
    batch: Batch


@dataclass
class TrainStep:
    """Computes the gradient of the mean loss over a whole batch, however it is split into micro-batches.

    `plain`: the objective before compilation, for the search for a number that is not finite. `micro_batch`: rows
    computed at a time. `row_elements`: the elements of a row that `micro_batch` is meant for; batches of shorter rows
    are split into micro-batches of more rows, with about the same number of elements.
    """

    model: nn.Module
    objective: Objective
    plain: Objective
    optimisers: Optimizers
    device: torch.device
    dtype: torch.dtype
    micro_batch: int
    clip: float
    seed: int
    row_elements: int | None = None
    scale: LossScale = field(default_factory=lambda: LossScale(torch.float32))
    dropout: DropoutKeys = field(init=False)

    def __post_init__(self) -> None:
        self.dropout = DropoutKeys(self.model, self.seed, self.device)

    def gradient(self, step: int, batch: Batch, stop: Callable[[], bool]) -> Gradient | None:
        """Computes the clipped gradient of a batch into the parameters' `grad`; None where `stop()` is true between two
        micro-batches. A batch without rows is a `UserError`.

        Dropout is a function of the seed, the step and the row. torch's global generator is seeded for each
        micro-batch, for modules that are not keifu's; their random numbers depend on `micro_batch`.
        """
        sums: Sums | None = None
        try:
            for outcome in self._outcomes(batch, step):
                if stop():
                    self.optimisers.drop_gradients()
                    return None
                (outcome.total * self.scale.value if self.scale.moves else outcome.total).backward()
                sums = Sums.of(outcome) if sums is None else sums + Sums.of(outcome)
        finally:
            self.dropout.clear()
        if sums is None:
            raise UserError(f"The batch of step {step} has no rows; look at the data.")
        return Gradient(sums, self._scale(sums.weight))

    def explain(self, step: int, batch: Batch) -> str:
        """A sentence that names the layer with the first number that is not finite; computes the step again."""
        self.optimisers.drop_gradients()
        texts = []
        for part in self._parts(batch):
            self._begin(step, part)
            forward = partial(self._forward, part.batch, self.plain)
            texts.append(failures.first_not_finite(self.model, lambda forward=forward: forward().total))
            if texts[-1] != failures.NOT_AGAIN:
                break
        self.dropout.clear()
        self.optimisers.drop_gradients()
        return texts[-1]

    @torch.no_grad()
    def validation(self, batches: Iterable[Batch]) -> dict[str, float]:
        """The mean loss and figures over all elements of the batches, in evaluation mode; empty without batches."""
        self.model.eval()
        sums: Sums | None = None
        for batch in batches:
            for outcome in self._outcomes(on_device(batch, self.device)):
                new = Sums.of(outcome)
                sums = new if sums is None else sums + new
        self.model.train()
        return sums.means() if sums else {}

    def _outcomes(self, batch: Batch, step: int | None = None) -> Iterator[LossOutput]:
        """The outputs of the micro-batches, one after the other, which add up to the whole batch; `step` is None in
        evaluation.

        The dropout keys stay until the next micro-batch, for layers that the backward pass computes again (activation
        checkpointing).
        """
        parts = self._parts(batch)

        def begin(number: int) -> None:
            if step is not None:
                self._begin(step, parts[number])

        if isinstance(self.objective, WholeBatchObjective):
            context = partial(autocast, self.device, self.dtype)
            rows = [part.batch for part in parts]
            yield from whole_batch_outputs(self.objective, self.model, rows, context, begin, self.scale.value)
        else:
            for number, part in enumerate(parts):
                begin(number)
                yield self._forward(part.batch, self.objective)

    def _begin(self, step: int, part: MicroBatch) -> None:
        """Sets all random state for a pass over a micro-batch."""
        torch.manual_seed((self.seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + part.first) % 2**63)
        self.dropout.set(step, part.first, rows_of(part.batch))

    def halve(self, batch: Batch) -> bool:
        """Halves the number of rows of such a batch that are computed at a time, from now on; False where it is 1."""
        rows = min(self._rows(batch), len(next(iter(batch.values()))))
        if rows < 2:
            return False
        self.micro_batch = rows // 2
        self.row_elements = None if self.row_elements is None else row_elements(batch)
        return True

    def _rows(self, batch: Batch) -> int:
        """The number of rows of such a batch that are computed at a time."""
        if self.row_elements is None:
            return self.micro_batch
        return max(1, self.micro_batch * self.row_elements // max(1, row_elements(batch)))

    def _parts(self, batch: Batch) -> list[MicroBatch]:
        rows = self._rows(batch)
        return [MicroBatch(number * rows, part) for number, part in enumerate(split(batch, rows))]

    def _forward(self, part: Batch, objective: Objective) -> LossOutput:
        with autocast(self.device, self.dtype):
            return objective(self.model, part)

    def _scale(self, weight: Tensor) -> Tensor:
        """Divides the gradient of the sum by the number of elements and clips it, in one pass; gives the norm before
        clipping."""
        gradients = [p.grad for p in self.optimisers.parameters.values() if p.grad is not None]
        weight = torch.where(weight > 0, weight, 1.0) * self.scale.value
        norm = torch.nn.utils.get_total_norm(gradients) / weight
        share = (self.clip / (norm + 1e-6)).clamp(max=1.0) if self.clip else 1.0
        torch._foreach_mul_(gradients, share / weight)  # pyright: ignore[reportPrivateImportUsage]
        return norm


def row_elements(batch: Batch) -> int:
    """The number of elements in a row of a batch, over all its tensors."""
    return sum(tensor.numel() for tensor in batch.values()) // max(1, rows_of(batch))


def rows_of(batch: Batch) -> int:
    """The number of rows of a batch."""
    return len(next(iter(batch.values())))


def split(batch: Batch, rows: int) -> Iterator[Batch]:
    """A batch split into parts of at most `rows` rows."""
    for start in range(0, rows_of(batch), rows):
        yield {name: tensor[start : start + rows] for name, tensor in batch.items()}


def compile_objective(objective: Objective, device: torch.device) -> Objective:
    """The objective and the model's forward pass in it through torch.compile; no C++ compiler on a CPU is a
    `UserError`."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        advice = "install g++ or clang++, or leave it out"
        raise UserError(f"compile=True needs a C++ compiler, and none was found; {advice}.")
    if isinstance(objective, WholeBatchObjective):
        return replace(objective, rows=torch.compile(objective.rows))
    return torch.compile(objective)

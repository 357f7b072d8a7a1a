"""The trainer: computes the gradient of a batch in micro-batches, the update of the weights, and the validation loss.

It uses neither files nor time (see `loop`). All random numbers of a step depend only on the seed, the step and the row.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from keifu.devices import device_name, require_compiler
from keifu.errors import UserError
from keifu.layers.dropout import DropoutKeys
from keifu.layers.mixture import end_step
from keifu.processes import MicroBatch, Processes, current, row_elements, rows_of
from keifu.training.grad_cache import WholeBatchObjective, whole_batch_outputs
from keifu.training.hardware import failures
from keifu.training.hardware.precision import LossScale, resolve_dtype
from keifu.training.hardware.recompute import recompute_blocks
from keifu.training.length import Length
from keifu.training.loader import on_device
from keifu.training.optim.loss_spikes import SpikeState
from keifu.training.optim.optimizers import Optimizers
from keifu.training.protocols import Batch, LossOutput, Objective, OnPolicy
from keifu.training.settings import Settings
from keifu.training.state import Sums, TrainState


class Gradient(NamedTuple):
    """Result of a batch: its sums, and the norm of its mean gradient before clipping."""

    sums: Sums
    norm: Tensor


class ObjectiveModule(nn.Module):
    """A module whose forward pass calls any function of the model.

    FSDP and activation checkpointing act in a module's forward pass, but objectives call more methods of the model than
    this one (`hidden`, `encode_image`, `head_weight`). Through this module all of them run inside one forward pass.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Return `function(model, *inputs)`."""
        return function(self.model, *inputs)


class Trainer:
    """Trainer of a model by the gradient of its mean loss over each batch, independently of how batches are split.

    length: the length of a resumed run; None: the settings' steps. data: used if they depend on the weights
    (`OnPolicy`). dtype: dtype of matrix multiplications; None: from the settings. processes: choose the rows of this
    process; None: the current ones.

    micro_batch: rows computed at a time, if a row has `row_elements` elements. If rows are shorter, more rows with
    about the same number of elements. row_elements None: always `micro_batch` rows.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, settings: Settings, *, length: Length | None = None,
        data: object = None, dtype: torch.dtype | None = None, processes: Processes | None = None,
    ):  # fmt: skip
        self.model, self.settings = model, settings
        self.device = next(model.parameters()).device
        self.dtype = dtype or resolve_dtype(settings.precision, self.device)
        self.objective = compile_objective(objective, self.device) if settings.compile else objective
        self.plain = objective  # not compiled, for the search for a number that is not finite
        self.processes = processes or current()
        self.module = self.processes.split(ObjectiveModule(model), self.dtype)
        if settings.activation_checkpointing != "none":
            recompute_blocks(model, settings.activation_checkpointing)
        self.micro_batch = settings.micro_batch or settings.batch_size
        self.row_elements: int | None = None
        self.dropout = DropoutKeys(model, settings.seed, self.device)
        self.optimizers = Optimizers(model, settings)
        self.state = TrainState(
            model, self.optimizers, length or Length(settings.steps), LossScale(self.dtype),
            SpikeState(settings.spikes), data if isinstance(data, OnPolicy) else None,
        )  # fmt: skip

    def gradient(self, step: int, batch: Batch, stop: Callable[[], bool] = lambda: False) -> Gradient | None:
        """Compute the clipped gradient of a batch into the parameters' `grad`.

        Return None if `stop()` is true between two micro-batches. Raises UserError for a batch with fewer rows than
        ranks, or with none. Dropout depends on the seed, the step and the row. torch's global generator is seeded for
        each micro-batch, for modules that are not keifu's.
        """
        self.check_rows(step, batch)
        parts = self._micro_batches(batch)
        sums, scale = Sums(), self.state.scale
        try:
            for number, outcome in enumerate(self._losses(parts, self.processes, step), 1):
                if stop():
                    self.drop_gradients()
                    return None
                if not scale.is_set:
                    scale.begin(self.processes.broadcast(float(outcome.weight)))
                with self.processes.backward(self.module, number == len(parts)):
                    (outcome.total * scale.factor if scale.moves else outcome.total).backward()
                sums += Sums.of(outcome)
        finally:
            self.dropout.clear()
        sums = Sums(self.processes.sum(sums))
        return Gradient(sums, self._average(sums["weight"]))

    def check_rows(self, step: int, batch: Batch) -> None:
        """Raise UserError if a batch has no rows, or fewer rows than ranks."""
        rows, world = rows_of(batch), self.processes.data_size
        if rows < world:
            count = f"{rows:,} rows for {world} processes" if rows else "no rows"
            raise UserError(f"The batch of step {step} has {count}; look at the data.")

    def drop_gradients(self) -> None:
        """Free the gradients of a step that is not applied."""
        self.optimizers.drop_gradients()
        self.processes.discard_gradients(self.module)

    def update(self, gradient: Gradient) -> None:
        """Update the weights with their gradients, and count the step."""
        state = self.state
        self.optimizers.step(state.step, state.length)
        end_step(self.model, self.processes.sum_counts)
        state.scale.count()
        state.step += 1
        state.sums += gradient.sums

    @torch.no_grad()
    def validation(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the mean loss and figures over all elements of the batches, in evaluation mode; {} without batches."""
        self.model.eval()
        sums = Sums()
        for batch in filter(rows_of, batches):
            # a batch with fewer rows than ranks is computed by all, and counted by the first
            shared = rows_of(batch) >= self.processes.data_size
            parts = self._micro_batches(on_device(batch, self.device))
            for outcome in self._losses(parts, self.processes if shared else Processes()):
                new = Sums.of(outcome)
                sums += new if shared or not self.processes.data_rank else new.zeros()
        self.model.train()
        self.drop_gradients()  # there are none, but FSDP keeps weights that it gathered until a backward pass
        return Sums(self.processes.sum(sums)).means() if sums else {}

    def explain(self, step: int, batch: Batch) -> str:
        """Compute the step again, and return a phrase that names the first layer with a number that is not finite."""
        self.optimizers.drop_gradients()
        reason = failures.NOT_AGAIN
        for part in self._micro_batches(batch):
            self._begin(step, part)
            reason = failures.first_not_finite(self.model, lambda part=part: self.forward(part.batch).total)
            if reason != failures.NOT_AGAIN:
                break
        self.dropout.clear()
        self.optimizers.drop_gradients()
        return reason

    def forward(self, batch: Batch) -> LossOutput:
        """Return the objective of one micro-batch, not compiled."""
        return self._call(self.plain, batch)

    def halve(self, batch: Batch) -> bool:
        """Halve the micro-batch for batches with rows of this length, from now on.

        Return False if it is already one row, or if ranks exchange tensors during a pass: they need the same number of
        passes.
        """
        rows = min(self._rows(batch), rows_of(batch))
        whole_batch = self.processes.data_size > 1 and isinstance(self.objective, WholeBatchObjective)
        if rows < 2 or whole_batch or self.processes.overlaps or not self.processes.is_replicated:
            return False
        self.micro_batch = rows // 2
        self.row_elements = None if self.row_elements is None else row_elements(batch)
        return True

    def resolved(self) -> dict[str, Any]:
        """Return the automatic settings (micro-batch, precision, device), which a resumed run keeps."""
        sizes = {"micro_batch": self.micro_batch, "row_elements": self.row_elements}
        hardware = {"precision": str(self.dtype).removeprefix("torch."), "device": device_name(self.device)}
        return sizes | hardware

    def _losses(self, parts: list[MicroBatch], processes: Processes, step: int | None = None) -> Iterator[LossOutput]:
        """Yield the outputs of micro-batches, which add up to the whole batch over the ranks.

        step: None in evaluation. The dropout keys stay set until the next micro-batch, since activation checkpointing
        computes layers again in the backward pass.
        """

        def passes() -> Iterator[Batch]:
            for part in parts:
                if step is not None:
                    self._begin(step, part)
                yield part.batch

        if isinstance(self.objective, WholeBatchObjective):
            sizes = [part.rows for part in parts]
            if not self.state.scale.is_set:
                self.state.scale.begin(processes.broadcast(float(sizes[0])))
            scale = self.state.scale.factor
            yield from whole_batch_outputs(self.objective, self.model, self._call, passes, sizes, scale, processes)
        else:
            for part in passes():
                yield self._call(self.objective, part)

    def _call(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call a function of the model under autocast to the trainer's number format."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.module(function, *inputs)

    def _begin(self, step: int, part: MicroBatch) -> None:
        """Set all random state for a pass over a micro-batch."""
        seed = (self.settings.seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + part.first) % 2**63
        # torch.manual_seed takes 1 ms longer
        (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(seed)
        self.dropout.set(step, part.first, part.rows)

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        return self.processes.micro_batches(batch, self._rows(batch))

    def _rows(self, batch: Batch) -> int:
        """Return the number of rows to compute at a time, for rows of this batch's length."""
        if self.row_elements is None:
            return self.micro_batch
        return max(1, self.micro_batch * self.row_elements // max(1, row_elements(batch)))

    def _average(self, weight: Tensor) -> Tensor:
        """Divide the gradients by the number of elements and clip them, in one pass. Return the norm before
        clipping."""
        weight = torch.where(weight > 0, weight, 1.0) * self.state.scale.factor
        if self.processes.data_size > 1 or not self.processes.is_replicated:
            gradients, total = self.processes.sum_gradients(self.optimizers.parameters)
        else:
            gradients = [p.grad for p in self.optimizers.parameters.values() if p.grad is not None]
            total = torch.nn.utils.get_total_norm(gradients)
        norm = total / weight
        share = (self.settings.clip / (norm + 1e-6)).clamp(max=1.0) if self.settings.clip else 1.0
        device = gradients[0].device  # the host, if weights are offloaded
        torch._foreach_mul_(gradients, (share / weight).to(device))  # pyright: ignore[reportPrivateImportUsage]
        return norm


def compile_objective(objective: Objective, device: torch.device) -> Objective:
    """Return an objective that runs through torch.compile, together with the model's forward pass."""
    require_compiler(device)
    if isinstance(objective, WholeBatchObjective):
        return replace(objective, rows=torch.compile(objective.rows))
    return torch.compile(objective)

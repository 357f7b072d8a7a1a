"""Estimates of the memory, time and FLOPs of a run, measured on a few rows before it starts.

Memory of a step = parameters + gradients + optimizer state + activations. Activations have a fixed part and a part
proportional to the micro-batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm

from keifu.errors import UserError
from keifu.memory import available_memory, release
from keifu.processes import local, rows_of
from keifu.training.hardware import flops as peak
from keifu.training.hardware.failures import ADVICE
from keifu.training.hardware.recompute import Recomputed
from keifu.training.protocols import Batch, LossOutput
from keifu.training.run.progress import format_bytes, format_count, format_seconds, number
from keifu.training.trainer import Trainer

SAFETY = 0.8  # the share of free memory that a run may use
LONGEST = 5e11  # FLOP of a micro-batch on a CPU, some seconds: a request to stop waits for its end


class Cost(NamedTuple):
    """Bytes, seconds and FLOPs of a run. Activations take `fixed_bytes`, plus `row_bytes` for each row of a
    micro-batch.
    """

    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    fixed_bytes: int
    row_bytes: int
    available: int
    micro_batch: int
    step_seconds: float
    flops_per_unit: float
    units_per_step: float

    @property
    def total_bytes(self) -> int:
        """The peak memory of a step. Gradients are as large as the parameters."""
        return 2 * self.parameter_bytes + self.optimizer_bytes + self.activation_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations stored for the backward pass, and of temporary memory."""
        return self.fixed_bytes + self.row_bytes * self.micro_batch

    def sentence(
        self, steps: int, unit: str, whole_steps: float, extra: float, on_policy: bool = False,
        between: bool = True,
    ) -> str:  # fmt: skip
        """Return the sentence printed before a run starts.

        whole_steps: `steps` with each smaller batch counted as a fraction. extra: seconds of validations and samples.
        on_policy: batches are rollouts, whose time is not measured. between: whether the time of validations and
        samples is known.
        """
        up_to = "up to " if whole_steps < steps else ""
        parts = f"{format_bytes(2 * self.parameter_bytes)} parameters and gradients, "
        parts += f"{format_bytes(self.optimizer_bytes)} optimizer, {format_bytes(self.activation_bytes)} activations"
        included = f"validations and samples {'' if between else 'not '}included"
        included += (" and rollouts not" if between else ", nor rollouts") if on_policy else ""
        units = f"{up_to}{self.units_per_step:,.0f} {unit}, {format_count(whole_steps * self.units_per_step)} in all"
        return (
            f"{format_count(self.parameters)} parameters; {number(steps, 'step')} of {units}: "
            f"about {format_seconds(whole_steps * self.step_seconds + extra)}, {included}, and "
            f"{format_bytes(self.total_bytes)} of memory ({parts}), of {format_bytes(self.available)} that are free."
        )


def activations(trainer: Trainer, batch: Batch) -> tuple[int, int]:
    """Return the bytes stored for the backward pass, without parameters, and the bytes of the largest stored tensor.

    On CUDA, return the allocator's peak memory of both passes, and 0: nothing has to be added.
    """
    if trainer.device.type == "cuda":
        backward(trainer, batch)  # allocates gradients and the libraries' workspaces
        before = torch.cuda.memory_allocated(trainer.device)
        torch.cuda.reset_peak_memory_stats(trainer.device)
        backward(trainer, batch)
        return torch.cuda.max_memory_allocated(trainer.device) - before, 0
    known = {local(p).untyped_storage().data_ptr() for p in [*trainer.model.parameters(), *trainer.model.buffers()]}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the reference prevents the reuse of the address
        return tensor

    blocks = Recomputed.measured = []
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(trainer, batch)
    finally:
        Recomputed.measured = None
    sizes = [n for n, _ in kept.values()]
    again = max((every for every, _ in blocks), default=0)  # one block is recomputed at a time
    if trainer.settings.activation_checkpointing == "selective":
        again += sum(products for _, products in blocks)
    return sum(sizes) + again, max(sizes, default=0)


def forward(trainer: Trainer, batch: Batch) -> LossOutput:
    """Return the loss of a batch, with dropout as in a step."""
    trainer.dropout.set(0, 0, rows_of(batch))
    return trainer.forward(batch)


def backward(trainer: Trainer, batch: Batch) -> LossOutput:
    """Run a forward and a backward pass. Return the loss."""
    output = forward(trainer, batch)
    output.total.backward()
    return output


def estimate(trainer: Trainer, batch: Batch, micro_batch: int | None) -> Cost:
    """Measure a run on rows of its first batch. Restore weights, buffers and random generators afterwards.

    micro_batch: None chooses as many rows as fit into 80% of the free memory, and on a CPU into `LONGEST`. Raises
    UserError with the amounts and advice if not even one row fits.
    """
    rows = rows_of(batch)
    with preserve_state(trainer):
        fixed, per_row = _linear(trainer, batch, rows)
        parameter_bytes = sum(p.nbytes for p in trainer.optimizers.parameters.values())
        optimizer_bytes, update_seconds = _optimizer(trainer)
        release(trainer.device)
        available = available_memory(trainer.device)
        base = parameter_bytes + optimizer_bytes + fixed  # gradients, not weights: these are already allocated
        fitting = int((SAFETY * available - base) / max(1, per_row))
        if fitting < 1:
            needed = f"one row at a time needs about {format_bytes(base + per_row)} of memory"
            raise UserError(f"The run does not fit: {needed}, and {format_bytes(available)} are free; {ADVICE}.")
        parts = -(-rows // min(rows, fitting))  # as few as fit, and nearly equal
        if micro_batch is None and trainer.device.type == "cpu":
            probe = first_rows(batch, _least_rows(trainer, rows))
            flops = peak.count_flops(lambda: backward(trainer, probe)) / rows_of(probe)
            parts = max(parts, -(-rows // max(1, int(LONGEST / max(flops, 1)))))
        chosen = min(micro_batch or -(-rows // parts), rows)
        seconds, units, flops = _timed(trainer, batch, chosen)
    return Cost(
        parameters=sum(p.numel() for p in trainer.model.parameters()),
        parameter_bytes=parameter_bytes,
        optimizer_bytes=optimizer_bytes,
        fixed_bytes=fixed,
        row_bytes=per_row,
        available=available,
        micro_batch=chosen,
        step_seconds=seconds * rows / chosen + update_seconds,
        flops_per_unit=flops / max(units, 1),
        units_per_step=units * rows / chosen,
    )


def first_rows(batch: Batch, rows: int) -> Batch:
    """Return the first rows of a batch."""
    return {name: tensor[:rows] for name, tensor in batch.items()}


def _least_rows(trainer: Trainer, rows: int) -> int:
    """Return the fewest rows that can be computed: two with batch normalisation, since one row may have no
    variance."""
    return min(rows, 1 + any(isinstance(part, _BatchNorm) for part in trainer.model.modules()))


def _linear(trainer: Trainer, batch: Batch, rows: int) -> tuple[int, int]:
    """Return the activations' fixed bytes and bytes per row, from passes over one and two rows. With batch
    normalisation: two and three rows.

    Twice the largest tensor is added for the temporary memory of a backward pass: a gradient and its input.
    """
    least = _least_rows(trainer, rows)
    passes = [activations(trainer, first_rows(batch, n)) for n in (least, min(least + 1, rows))]
    few, more = (kept + 2 * largest for kept, largest in passes)
    per_row = more - few if rows > least else few // least
    return max(0, few - least * per_row), per_row


def _optimizer(trainer: Trainer) -> tuple[int, float]:
    """Return the bytes of the optimizer states and the seconds of an update, by an update with rate 0 that is
    undone."""
    trainer.optimizers.prime()
    state_bytes = sum(tensor.nbytes for tensor in trainer.optimizers.state().values())
    seconds = peak.time_call(trainer.optimizers.prime, trainer.device)
    trainer.optimizers.forget()
    return state_bytes, seconds


def _timed(trainer: Trainer, batch: Batch, rows: int) -> tuple[float, float, int]:
    """Return the seconds, elements and FLOPs of a forward and a backward pass over `rows` rows."""
    part, outputs = first_rows(batch, rows), list[LossOutput]()
    flops = peak.count_flops(lambda: outputs.append(backward(trainer, part)))  # also warms up
    return peak.time_call(lambda: backward(trainer, part), trainer.device), float(outputs[0].weight), flops


@contextmanager
def preserve_state(trainer: Trainer) -> Iterator[None]:
    """Run a block, then restore buffers and random generators and drop the gradients."""
    buffers = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]
    device_type = trainer.device.type
    devices: list[Any] = [] if device_type == "cpu" else [trainer.device]
    with torch.random.fork_rng(devices, device_type=device_type if devices else "cuda"):
        yield
    for buffer, before in buffers:
        buffer.copy_(before)
    trainer.dropout.clear()
    trainer.optimizers.drop_gradients()

"""Setup of a run before its first step: optimizers, the state of a resumed run, and the estimate of its cost.

Also the number of steps that fit into a given time, measured before a run starts. That is a first estimate: the loop
adjusts it to the pace (`pace.Budget`), and checkpoints hold the current plan.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keifu.devices import device_name, same_kind
from keifu.errors import UserError
from keifu.training.hardware import cost, failures
from keifu.training.hardware.flops import synchronize
from keifu.training.hardware.precision import LossScale, resolve_dtype, tensor_float32
from keifu.training.length import Length, length_of
from keifu.training.loader import on_device
from keifu.training.optim.loss_spikes import SpikeState
from keifu.training.optim.optimizers import Optimizers
from keifu.training.pace import Plan
from keifu.training.protocols import Batch, Data, Objective, OnPolicy, Run
from keifu.training.run import checkpoint
from keifu.training.run import directory as run_directory
from keifu.training.settings import Settings, as_chosen, check_resumed, compare, describe_settings
from keifu.training.step import Sums, TrainStep, compile_objective, row_elements

ADVICE = "lower micro_batch (it changes no loss), the length of the rows, or the model's size"
DROPOUT = "by row"  # how dropout masks are seeded; missing in checkpoints of earlier versions


@dataclass
class TrainingProgress:
    """The part of the training state that changes from step to step, beside the model and the optimizers; a checkpoint
    holds it."""

    step: int
    seconds: float
    sums: Sums | None
    divergence: failures.Divergence
    spikes: SpikeState
    plan: Plan
    passed: float = 0.0  # seconds of the whole run when the checkpoint was saved

    def facts(self) -> dict[str, Any]:
        """Everything but the sums as JSON, for a checkpoint."""
        own = {"seconds": self.seconds, "passed": self.passed, "plan": dataclasses.asdict(self.plan)}
        return {**own, "divergence": self.divergence.facts(), "spikes": self.spikes.facts()}


@dataclass(frozen=True)
class TrainingSetup:
    """A run that is ready for its next step.

    settings: those of the run, with the steps that it started with. described: what decides its result (see
    `describe_settings`), computed here once: compared on resuming, stored in checkpoints and recipe.json.
    """

    stepper: TrainStep
    optimisers: Optimizers
    cost: cost.Cost
    progressed: TrainingProgress
    length: Length
    settings: Settings
    described: dict[str, Any]

    def resolved(self) -> dict[str, Any]:
        """The automatic settings as they were decided (micro-batch, precision, device); a resumed run keeps them."""
        dtype = _name(self.stepper.dtype)
        stepper = self.stepper
        found = {"micro_batch": stepper.micro_batch, "row_elements": stepper.row_elements}
        found |= {"precision": dtype, "device": device_name(stepper.device)}
        return found | ({"dropout": DROPOUT} if stepper.dropout.drops else {})


def set_up(
    model: nn.Module,
    objective: Objective,
    data: Data,
    settings: Settings,
    run: Run,
    tell: Callable[[str], None],
    largest: Batch | None = None,
) -> TrainingSetup:
    """Builds the optimizers and the training step, loads the state of a resumed run, and measures the cost on the
    largest batch. `tell` shows a message.

    A missing or damaged state, changed data or settings, or a model that does not fit into memory is a `UserError`.
    """
    device = next(model.parameters()).device
    found = _resumed(run, tell) if run.resume else None
    length = _length(found, settings, run.directory) if found else Length(settings.steps)
    settings = dataclasses.replace(settings, steps=length.begun)
    described = describe_settings(settings, run.options, data.fingerprint)
    if found:
        _tell_changes(found, length, settings, described, tell)
    resolved = _as_resolved(found, device, tell) if found else {}
    dtype = _format(settings.precision, resolved, device, tell)
    optimisers = Optimizers(model, settings, length)
    probe = cost.Probe(model, objective, optimisers, device, dtype)
    _check_growth(settings, data)
    batch = on_device(data.batch(found.step if found else 0) if largest is None else largest, device)
    rows = settings.micro_batch or resolved.get("micro_batch")
    with failures.explain_out_of_memory(ADVICE):
        measured = cost.estimate(probe, batch, rows, ADVICE)
    elements = resolved.get("row_elements", row_elements(batch))
    stepper = _train_step(probe, settings, rows or measured.micro_batch, elements, found)
    if found:
        _load_state(model, optimisers, data, found.tensors)
        _tell_dropout(stepper, resolved, tell)
    progressed = _progressed(found, settings, device, length)
    done, whole = progressed.step, settings.whole_steps
    steps = max(done, progressed.plan.steps)
    tell(measured.sentence(steps - done, run.unit, whole(steps) - whole(done)))
    return TrainingSetup(stepper, optimisers, measured, progressed, length, settings, described)


def _train_step(
    probe: cost.Probe, settings: Settings, rows: int, elements: int, found: checkpoint.State | None
) -> TrainStep:
    """The training step of a run, compiled where the settings ask for it, with the loss scale of a resumed run."""
    compiled = compile_objective(probe.objective, probe.device) if settings.compile else probe.objective
    return TrainStep(
        model=probe.model,
        objective=compiled,
        plain=probe.objective,
        optimisers=probe.optimisers,
        device=probe.device,
        dtype=probe.dtype,
        micro_batch=rows,
        clip=settings.clip,
        seed=settings.seed,
        row_elements=elements,
        scale=LossScale(probe.dtype, **(found.facts.get("loss_scale", {}) if found else {})),
    )


def _tell_dropout(stepper: TrainStep, resolved: dict[str, Any], tell: Callable[[str], None]) -> None:
    if stepper.dropout.drops and resolved.get("dropout") != DROPOUT:
        tell("Dropout masks are sampled in another way than in the steps before, which an earlier version made.")


def _format(precision: str, resolved: dict[str, Any], device: torch.device, tell: Callable[[str], None]) -> torch.dtype:
    """The number format of matrix products, which is shown with the device."""
    dtype = resolve_dtype(resolved.get("precision", precision) if precision == "auto" else precision, device)
    tell(f"On {device_name(device)}, matrix products in {_name(dtype)}.")
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_resolved(found: checkpoint.State, device: torch.device, tell: Callable[[str], None]) -> dict[str, Any]:
    """The automatic settings of the resumed run; none on a device of another kind, where they are decided anew."""
    resolved, now = found.facts["resolved"], device_name(device)
    before = resolved.get("device", now)
    if same_kind(before, now):
        return resolved
    tell(f"The run was on {before} and goes on on {now}, which rounds otherwise: it will not end with the same bits.")
    return {}


def _check_growth(settings: Settings, data: Data) -> None:
    """A `UserError` where the settings have batch-size warm-up and the data do not."""
    growth = settings.growth
    if len(growth.rows) > 1 and (rows := len(next(iter(data.batch(0).values())))) != growth.at(0):
        raise UserError(
            f"batch_stages or batch_ramp begin with {growth.at(0)} rows, and these data with {rows}: their batches do "
            "not grow; leave the two out."
        )


def _resumed(run: Run, tell: Callable[[str], None]) -> checkpoint.State:
    found, complaints = checkpoint.latest(run.directory)
    for text in complaints:
        tell(text)
    return found


def _length(found: checkpoint.State, settings: Settings, directory: Path) -> Length:
    """The length of a resumed run. It changes where the settings have other steps than the run started with, or where
    its recipe.json asks for others."""
    length = length_of(found.facts["described"]["settings"], found.facts.get("length", ()))
    asked = run_directory.recorded(directory).get("steps") or length.steps
    steps = asked if settings.steps == length.begun else settings.steps
    return length if steps == length.steps else length.changed(found.step, steps, settings.warmup)


def _tell_changes(
    found: checkpoint.State, length: Length, settings: Settings, now: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """Checks that the run may be resumed with these settings, and shows what has changed."""
    then = length_of(found.facts["described"]["settings"], found.facts.get("length", ()))
    changes = compare({"steps": then.steps}, {"steps": length.steps})
    changes += check_resumed(found.facts["described"], now)
    tell(f"Going on from step {found.step:,}" + (f"; changed: {', '.join(changes)}." if changes else "."))
    if length.steps != then.steps:
        tell(length.sentence(settings))


@torch.no_grad()
def _load_state(model: nn.Module, optimisers: Optimizers, data: Data, tensors: dict[str, Tensor]) -> None:
    checkpoint.load_into_model(model, tensors)
    optimisers.load(_restore("optimisers.", tensors))
    if isinstance(data, OnPolicy):
        data.load_state(_restore("data.", tensors))


def _progressed(
    found: checkpoint.State | None, settings: Settings, device: torch.device, length: Length
) -> TrainingProgress:
    if found is None:
        plan = Plan(settings.steps, settings.steps)
        return TrainingProgress(0, 0.0, None, failures.Divergence(), SpikeState(settings.spikes), plan)
    sums = _restore("sums.", found.tensors)
    facts = found.facts
    taken = Sums.from_tensors(sums, device) if sums else None
    divergence = failures.Divergence(**facts["divergence"])
    spikes = SpikeState(settings.spikes, **facts.get("spikes", {}))
    plan, passed = _plan(facts, settings, length), facts.get("passed", 0.0)
    return TrainingProgress(found.step, facts["seconds"], taken, divergence, spikes, plan, passed)


def _plan(facts: dict[str, Any], settings: Settings, length: Length) -> Plan:
    """The plan of a checkpoint, if the run still has a time limit and the schedule that the plan was made for."""
    found = facts.get("plan", {})
    kept = settings.minutes is not None and found.get("scheduled") == length.steps
    return Plan(**found) if kept else Plan(length.steps, length.steps)


def rewind(started: TrainingSetup, found: checkpoint.State, data: Data) -> TrainingSetup:
    """The run at an earlier checkpoint, after which other batches follow; its training time is not set back."""
    stepper, now = started.stepper, started.progressed
    then = _progressed(found, started.settings, stepper.device, started.length)
    then.spikes = now.spikes.after(found.step, then.spikes.facts())
    then.seconds = now.seconds
    started.optimisers.drop_gradients()
    started.optimisers.forget()
    _load_state(stepper.model, started.optimisers, data, found.tensors)
    return dataclasses.replace(started, progressed=then)


def _restore(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def tensors(started: TrainingSetup, data: Data) -> dict[str, Tensor]:
    """All tensors of a checkpoint: model, optimizers, data, and the sums since the last line of metrics."""
    sums = started.progressed.sums
    kept = data.state() if isinstance(data, OnPolicy) else {}
    return {
        **checkpoint.model_tensors(started.stepper.model),
        **{f"optimisers.{name}": tensor for name, tensor in started.optimisers.state().items()},
        **{f"data.{name}": tensor for name, tensor in kept.items()},
        **{f"sums.{name}": tensor for name, tensor in (sums.tensors() if sums else {}).items()},
    }


SHARE = 0.02  # the share of the time that trial steps take
LEAST_STEPS = 8  # trial steps, at least


def steps_within(
    minutes: float, model: nn.Module, objective: Objective, data: Data, settings: Settings, largest: Batch
) -> int:
    """The number of steps that fit into so many minutes of training, from trial steps on the first batches of the run.

    Validation, samples and checkpoints are not included. The trial takes 2% of the time and does not change the model.
    """
    if not minutes > 0:
        raise UserError(f"minutes must be above 0, and it is {minutes}.")
    settings, device = as_chosen(settings), next(model.parameters()).device
    optimisers = Optimizers(model, settings)
    probe = cost.Probe(model, objective, optimisers, device, resolve_dtype(settings.precision, device))
    batch = on_device(largest, device)
    with cost.preserve_state(probe), failures.explain_out_of_memory(ADVICE), tensor_float32(device):
        rows = cost.estimate(probe, batch, settings.micro_batch, ADVICE).micro_batch
        stepper = TrainStep(
            model, objective, objective, optimisers, device, probe.dtype, rows, settings.clip, settings.seed,
            row_elements(batch), LossScale(probe.dtype),
        )  # fmt: skip
        seconds = _seconds_a_step(stepper, data, SHARE * 60 * minutes)
        optimisers.forget()
    return max(1, round(60 * minutes / seconds))


def _seconds_a_step(stepper: TrainStep, data: Data, budget: float) -> float:
    """The mean seconds of as many steps as fit into the budget, after one to warm up; their learning rates are 0."""
    for step in count():
        if step == 1:
            start = time.perf_counter()
        stepper.gradient(step, on_device(data.batch(step), stepper.device), lambda: False)
        stepper.optimisers.update(dict.fromkeys(stepper.optimisers.all, 0.0))
        synchronize(stepper.device)
        spent = time.perf_counter() - start if step else 0.0
        if step >= LEAST_STEPS and spent > budget:
            return spent / step
    raise AssertionError("count() does not end")


def steps_of(directory: Path) -> int:
    """The number of steps that the run in this directory started with."""
    try:
        return json.loads((directory / run_directory.RECIPE).read_text(encoding="utf-8"))["settings"]["steps"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{directory / run_directory.RECIPE} does not say how many steps its run has: give --steps in place of "
            "--minutes."
        ) from None

"""What a run needs before its first step: the resumed state, the optimizers, the measured cost; knows no model."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keifu.devices import device_name, same_kind
from keifu.errors import UserError
from keifu.training import cost, folder, guards, state
from keifu.training.length import Length, length_of
from keifu.training.loading import on_device
from keifu.training.optimisers import Optimisers
from keifu.training.pace import Plan
from keifu.training.precision import LossScale, resolve
from keifu.training.protocols import Batch, Data, Objective, OnPolicy, Run
from keifu.training.settings import Settings, check_resumed, compare, described
from keifu.training.spikes import Spikes
from keifu.training.step import Stepper, Sums, compiled, row_elements

ADVICE = "lower micro_batch (it changes no loss), the length of the rows, or the model's size"
DROPOUT = "by row"  # how masks are drawn; a state of an earlier version does not say


@dataclass
class Progressed:
    """What changes from step to step beside the model and the optimizers, and is part of a state."""

    step: int
    seconds: float
    sums: Sums | None
    divergence: guards.Divergence
    spikes: Spikes
    plan: Plan
    passed: float = 0.0  # seconds of the whole run when the state was saved

    def facts(self) -> dict[str, Any]:
        """The part that JSON holds."""
        own = {"seconds": self.seconds, "passed": self.passed, "plan": dataclasses.asdict(self.plan)}
        return {**own, "divergence": self.divergence.facts(), "spikes": self.spikes.facts()}


@dataclass(frozen=True)
class Started:
    """Everything in place for the next step."""

    stepper: Stepper
    optimisers: Optimisers
    cost: cost.Cost
    progressed: Progressed
    length: Length

    def resolved(self) -> dict[str, Any]:
        """What the settings left open, as it was decided; a resumed run keeps to it."""
        dtype = _name(self.stepper.dtype)
        stepper = self.stepper
        found = {"micro_batch": stepper.micro_batch, "row_elements": stepper.row_elements}
        found |= {"precision": dtype, "device": device_name(stepper.device)}
        return found | ({"dropout": DROPOUT} if stepper.dropout.drops else {})


def start(
    model: nn.Module,
    objective: Objective,
    data: Data,
    settings: Settings,
    run: Run,
    tell: Callable[[str], None],
    largest: Batch | None = None,
) -> Started:
    """Loads the state where the run is resumed, measures the cost on the largest batch, and says both."""
    device = next(model.parameters()).device
    found = _resumed(run, tell) if run.resume else None
    length = _length(found, settings, run.directory) if found else Length(settings.steps)
    settings = dataclasses.replace(settings, steps=length.begun)
    if found:
        _tell_changes(found, length, settings, described(settings, run.options, data.fingerprint), tell)
    resolved = _as_resolved(found, device, tell) if found else {}
    dtype = _format(settings.precision, resolved, device, tell)
    optimisers = Optimisers(model, settings, length)
    probe = cost.Probe(model, objective, optimisers, device, dtype)
    _check_growth(settings, data)
    batch = on_device(data.batch(found.step if found else 0) if largest is None else largest, device)
    rows = settings.micro_batch or resolved.get("micro_batch")
    with guards.memory(ADVICE):
        measured = cost.estimate(probe, batch, rows, ADVICE)
    if found:
        _take_up(model, optimisers, data, found.tensors)
    running = compiled(objective, device) if settings.compile else objective
    rows, elements = rows or measured.micro_batch, resolved.get("row_elements", row_elements(batch))
    stepper = Stepper(
        model, running, objective, optimisers, device, dtype, rows, settings.clip, settings.seed, elements,
        LossScale(dtype, **(found.facts.get("loss_scale", {}) if found else {})),
    )
    if found:
        _tell_dropout(stepper, resolved, tell)
    done = found.step if found else 0
    progressed = _progressed(found, settings, device, length)
    steps, whole = max(done, progressed.plan.steps), settings.whole_steps
    tell(measured.sentence(steps - done, run.unit, whole(steps) - whole(done)))
    return Started(stepper, optimisers, measured, progressed, length)


def _tell_dropout(stepper: Stepper, resolved: dict[str, Any], tell: Callable[[str], None]) -> None:
    if stepper.dropout.drops and resolved.get("dropout") != DROPOUT:
        tell("Dropout is drawn in another way than in the steps before, which an earlier version made.")


def _format(precision: str, resolved: dict[str, Any], device: torch.device, tell: Callable[[str], None]) -> torch.dtype:
    """The format of matrix products, which is said with the device."""
    dtype = resolve(resolved.get("precision", precision) if precision == "auto" else precision, device)
    tell(f"On {device_name(device)}, matrix products in {_name(dtype)}.")
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _as_resolved(found: state.State, device: torch.device, tell: Callable[[str], None]) -> dict[str, Any]:
    """What the run had decided; on a device of another kind, which is said, that is decided anew."""
    resolved, now = found.facts["resolved"], device_name(device)
    before = resolved.get("device", now)
    if same_kind(before, now):
        return resolved
    tell(f"The run was on {before} and goes on on {now}, which rounds otherwise: it will not end with the same bits.")
    return {}


def _check_growth(settings: Settings, data: Data) -> None:
    """Where the settings say that the batch grows, the data must have been told."""
    growth = settings.growth
    if len(growth.rows) > 1 and (rows := len(next(iter(data.batch(0).values())))) != growth.at(0):
        raise UserError(
            f"batch_stages or batch_ramp begin with {growth.at(0)} rows, and these data with {rows}: their batches do "
            "not grow; leave the two out."
        )


def _resumed(run: Run, tell: Callable[[str], None]) -> state.State:
    found, complaints = state.latest(run.directory)
    for text in complaints:
        tell(text)
    return found


def _length(found: state.State, settings: Settings, directory: Path) -> Length:
    """The length of a run that is resumed. It changes where the settings have other steps than those that it was begun
    with, or where its recipe.json asks for others."""
    length = length_of(found.facts["described"]["settings"], found.facts.get("length", ()))
    asked = folder.recorded(directory).get("steps") or length.steps
    steps = asked if settings.steps == length.begun else settings.steps
    return length if steps == length.steps else length.changed(found.step, steps, settings.warmup)


def _tell_changes(
    found: state.State, length: Length, settings: Settings, now: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """Checks that the run may go on so, and says what has changed."""
    then = length_of(found.facts["described"]["settings"], found.facts.get("length", ()))
    changes = compare({"steps": then.steps}, {"steps": length.steps})
    changes += check_resumed(found.facts["described"], now)
    tell(f"Going on from step {found.step:,}" + (f"; changed: {', '.join(changes)}." if changes else "."))
    if length.steps != then.steps:
        tell(length.sentence(settings))


@torch.no_grad()
def _take_up(model: nn.Module, optimisers: Optimisers, data: Data, tensors: dict[str, Tensor]) -> None:
    state.into_model(model, tensors)
    optimisers.load(_under("optimisers.", tensors))
    if isinstance(data, OnPolicy):
        data.take_up(_under("data.", tensors))


def _progressed(
    found: state.State | None, settings: Settings, device: torch.device, length: Length
) -> Progressed:
    if found is None:
        plan = Plan(settings.steps, settings.steps)
        return Progressed(0, 0.0, None, guards.Divergence(), Spikes(settings.spikes), plan)
    sums = _under("sums.", found.tensors)
    facts = found.facts
    taken = Sums.from_tensors(sums, device) if sums else None
    divergence = guards.Divergence(**facts["divergence"])
    spikes = Spikes(settings.spikes, **facts.get("spikes", {}))
    plan, passed = _plan(facts, settings, length), facts.get("passed", 0.0)
    return Progressed(found.step, facts["seconds"], taken, divergence, spikes, plan, passed)


def _plan(facts: dict[str, Any], settings: Settings, length: Length) -> Plan:
    """The plan of a state, where the run still has minutes and the schedule that it was made for."""
    found = facts.get("plan", {})
    kept = settings.minutes is not None and found.get("scheduled") == length.steps
    return Plan(**found) if kept else Plan(length.steps, length.steps)


def go_back(started: Started, found: state.State, data: Data, settings: Settings) -> Started:
    """The run at an earlier state of its own, from which other batches follow; its clock is not set back."""
    stepper, now = started.stepper, started.progressed
    then = _progressed(found, settings, stepper.device, started.length)
    then.spikes = now.spikes.after(found.step, then.spikes.facts())
    then.seconds = now.seconds
    started.optimisers.drop_gradients()
    started.optimisers.forget()
    _take_up(stepper.model, started.optimisers, data, found.tensors)
    return dataclasses.replace(started, progressed=then)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def tensors(started: Started, data: Data) -> dict[str, Tensor]:
    """Every tensor of a state: the model's, the optimizers', what the data keep, and the sums since the last line of
    metrics."""
    sums = started.progressed.sums
    kept = data.kept() if isinstance(data, OnPolicy) else {}
    return {
        **state.of_model(started.stepper.model),
        **{f"optimisers.{name}": tensor for name, tensor in started.optimisers.state().items()},
        **{f"data.{name}": tensor for name, tensor in kept.items()},
        **{f"sums.{name}": tensor for name, tensor in (sums.tensors() if sums else {}).items()},
    }

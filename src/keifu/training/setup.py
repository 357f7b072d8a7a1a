"""Setup of a run before its first step: the trainer, the state of a resumed run, and the estimate of its cost.

It also estimates the number of steps that fit into a given time. The loop adjusts this number to the actual speed
(`pace.Clock`), and states store it.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keifu import __version__
from keifu.devices import device_name, same_kind
from keifu.errors import UserError
from keifu.memory import keep_freed
from keifu.processes import current, row_elements, rows_of
from keifu.training.hardware import cost, failures
from keifu.training.hardware.precision import resolve_dtype, tensor_float32
from keifu.training.length import USEFUL, Length, length_of
from keifu.training.loader import on_device
from keifu.training.protocols import Batch, Data, Objective, OnPolicy, Run
from keifu.training.run import checkpoint, run_directory
from keifu.training.settings import Settings, as_chosen, check_resumed, compare, describe_settings, flat
from keifu.training.trainer import Trainer


def set_up(
    model: nn.Module, objective: Objective, data: Data, settings: Settings, run: Run, tell: Callable[[str], None],
    largest: Batch | None = None,
) -> tuple[Trainer, cost.Cost]:  # fmt: skip
    """Return the trainer, with the state of a resumed run, and the cost, measured on the largest batch.

    tell: shows a message. Raises UserError for a missing or damaged state, changed data or settings, or a model that
    does not fit into memory.
    """
    if settings.deterministic and current().overlaps:
        raise UserError("--deterministic needs gradients summed in order: give --mesh.gradient-sum ordered.")
    device = next(model.parameters()).device
    saved = _resumed(run, tell) if run.resume else None
    length = _length(saved, settings, run.directory) if saved else Length(settings.steps)
    settings = replace(settings, steps=length.begun)
    described = describe_settings(settings, run.options, data.fingerprint)
    check_alike(described)
    if isinstance(data, OnPolicy) and not current().is_replicated:
        raise UserError("Rollouts need the whole model on each process: leave out --mesh.shard and --mesh.tensor.")
    if saved:
        _report_changes(saved, length, settings, described, tell)
    resolved = _as_resolved(saved, device, tell) if saved else {}
    precision = resolved.get("precision", "auto") if settings.precision == "auto" else settings.precision
    dtype = resolve_dtype(precision, device)
    measuring = "measuring the time and the memory of a step ..."
    tell(f"On {device_name(device)}, matrix products in {str(dtype).removeprefix('torch.')}; {measuring}")
    trainer = Trainer(model, objective, settings, length=length, data=data, dtype=dtype)
    _check_growth(settings, data)
    trainer.state.described = described
    step = saved.step if saved else 0
    batch = on_device(data.batch(step) if largest is None else largest, device)
    trainer.check_rows(step, batch)
    rows = settings.micro_batch or resolved.get("micro_batch")
    with failures.explain_out_of_memory():
        measured = cost.estimate(trainer, batch, rows)
    trainer.micro_batch = rows or current().broadcast(measured.micro_batch)
    trainer.row_elements = resolved.get("row_elements", row_elements(batch))
    if saved:
        trainer.state.load(saved)
    trainer.settings = _limit_validations(settings, data, largest or (data.batch(0) if saved else batch), tell)
    return trainer, measured


def check_alike(described: dict[str, Any]) -> None:
    """Raise UserError if a rank has other data, settings or versions than rank 0."""
    versions = {"keifu": __version__, "torch": torch.__version__}
    here = flat({"version": versions, **described}) | {"data": described["data"]}
    first, *other_descriptions = map(json.loads, current().gather(json.dumps(here, default=str)))
    for number, other in enumerate(other_descriptions, 1):
        if changed := compare(first, other):
            ways = "Start all of them from the same files, with the same options and versions"
            raise UserError(f"Process {number} differs from process 0: {', '.join(changed)}. {ways}.")


def _limit_validations(settings: Settings, data: Data, batch: Batch, tell: Callable[[str], None]) -> Settings:
    """Return the settings with as many steps between validations as keep these within their share of the computation.

    An element of a validation costs a third of one in a step: the backward pass takes twice as long as the forward pass
    (Kaplan et al., 2020, section 2.1). Rollouts, which are generated for each validation, are not counted.
    """
    interval, share = settings.evaluate_every, settings.evaluate_share
    if not interval or isinstance(data, OnPolicy):
        return settings
    elements = sum(rows_of(part) * row_elements(part) for part in data.validation())
    steps = elements / (3 * rows_of(batch) * row_elements(batch))
    every = max(interval, math.ceil(steps * (1 / share - 1)))
    if every > interval:
        tell(
            f"A validation takes about as long as {steps:.1f} steps, so one comes every {every} steps, not {interval}."
        )
    return replace(settings, evaluate_every=every)


def _as_resolved(saved: checkpoint.SavedState, device: torch.device, tell: Callable[[str], None]) -> dict[str, Any]:
    """Return the automatic settings of the resumed run; {} on another kind of device, for which they are chosen
    again."""
    resolved, now = saved.facts["resolved"], device_name(device)
    before = resolved.get("device", now)
    same = same_kind(before, now)
    if not same or (device.type == "cpu" and before != now):  # the number of threads affects the order of sums
        sentence = f"The run was on {before} and goes on on {now}"
        tell(f"{sentence}, which rounds otherwise: it may not end with the same bits.")
    return resolved if same else {}


def _check_growth(settings: Settings, data: Data) -> None:
    """Raise UserError if the settings have batch-size warm-up and the data do not."""
    growth = settings.growth
    if len(growth.rows) > 1 and (rows := rows_of(data.batch(0))) != growth.at(0):
        raise UserError(f"Batches have {rows} rows here, not {growth.at(0)}: leave out batch_stages and batch_ramp.")


def _resumed(run: Run, tell: Callable[[str], None]) -> checkpoint.SavedState:
    """Return the newest undamaged state: on each rank the one that rank 0 has chosen."""
    saved, complaints = checkpoint.latest(run.directory)
    for text in complaints:
        tell(text)
    step = current().broadcast(saved.step)
    return saved if saved.step == step else checkpoint.read(run.directory, step)


def _length(saved: checkpoint.SavedState, settings: Settings, directory: Path) -> Length:
    """Return the length of a resumed run. It is a new one if the settings have other steps than the run started with,
    or if its recipe.json requests others. Raises UserError for an extension that would learn next to nothing."""
    length = length_of(saved.facts)
    requested_steps = run_directory.recorded(directory).get("steps") or length.scheduled
    steps = requested_steps if settings.steps == length.begun else settings.steps
    if steps == length.scheduled:
        return length
    changed = length.changed(saved.step, steps, settings.warmup)
    if steps > length.scheduled and changed.mean_share(settings, saved.step) < USEFUL:
        useless = f"An extension from {length.scheduled:,} to {steps:,} steps would learn next to nothing"
        least = length.useful_steps(settings, saved.step)
        raise UserError(f"{useless}: the schedule ends at a rate of 0. Give --steps {least:,} or more.")
    return changed


def _report_changes(
    saved: checkpoint.SavedState, length: Length, settings: Settings, now: dict[str, Any], tell: Callable[[str], None]
) -> None:
    """Check that the run can be resumed with these settings, and show the changes."""
    before = length_of(saved.facts).scheduled
    changes = compare({"steps": before}, {"steps": length.scheduled})
    changes += check_resumed(saved.facts["described"], now)
    tell(f"Going on from step {saved.step:,}" + (f"; changed: {', '.join(changes)}." if changes else "."))
    if length.scheduled != before:
        tell(length.sentence(settings))


def steps_within(
    minutes: float, model: nn.Module, objective: Objective, data: Data, settings: Settings, largest: Batch
) -> int:
    """Return the number of steps that fit into a training time, from the duration of a step that `cost.estimate`
    measures.

    Validation, samples and checkpoints are not included. The measurement takes a few passes over some rows and does not
    change the model.
    """
    settings, device = as_chosen(settings), next(model.parameters()).device
    trainer = Trainer(model, objective, replace(settings, compile=False))
    with failures.explain_out_of_memory(), tensor_float32(device, settings.precision), keep_freed(device):
        measured = cost.estimate(trainer, on_device(largest, device), settings.micro_batch)
    return max(1, current().broadcast(round(60 * minutes / measured.step_seconds)))

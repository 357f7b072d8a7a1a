"""How many steps a run makes in a given time, tried before it starts; knows no model and no loop.

The number is a first estimate: the loop follows the pace from then on (`pace.Budget`), and its states hold the plan.
"""

import json
import time
from itertools import count
from pathlib import Path

from torch import nn

from keifu.errors import UserError
from keifu.training import cost, folder, guards
from keifu.training.loading import on_device
from keifu.training.optimisers import Optimisers
from keifu.training.peak import synchronise
from keifu.training.precision import LossScale, resolve, tensor_float32
from keifu.training.protocols import Batch, Data, Objective
from keifu.training.settings import Settings, as_chosen
from keifu.training.start import ADVICE
from keifu.training.step import Stepper, row_elements

SHARE, LEAST_STEPS = 0.02, 8  # of the time that is tried, and the fewest steps


def steps_within(
    minutes: float, model: nn.Module, objective: Objective, data: Data, settings: Settings, largest: Batch
) -> int:
    """Steps that fit in so many minutes of training, by the mean of trial steps on the run's own first batches.

    Validation, samples and saving come on top. The trial takes 2% of the time; the model is as before afterwards.
    """
    if not minutes > 0:
        raise UserError(f"minutes must be above 0, and it is {minutes}.")
    settings, device = as_chosen(settings), next(model.parameters()).device
    optimisers = Optimisers(model, settings)
    probe = cost.Probe(model, objective, optimisers, device, resolve(settings.precision, device))
    batch = on_device(largest, device)
    with cost.unchanged(probe), guards.memory(ADVICE), tensor_float32(device):
        rows = cost.estimate(probe, batch, settings.micro_batch, ADVICE).micro_batch
        stepper = Stepper(
            model, objective, objective, optimisers, device, probe.dtype, rows, settings.clip, settings.seed,
            row_elements(batch), LossScale(probe.dtype),
        )  # fmt: skip
        seconds = _seconds_a_step(stepper, data, SHARE * 60 * minutes)
        optimisers.forget()
    return max(1, round(60 * minutes / seconds))


def _seconds_a_step(stepper: Stepper, data: Data, budget: float) -> float:
    """The mean of as many steps as the budget allows, after one that warms up; their rates are 0."""
    for step in count():
        if step == 1:
            start = time.perf_counter()
        stepper.gradient(step, on_device(data.batch(step), stepper.device), lambda: False)
        stepper.optimisers.update(dict.fromkeys(stepper.optimisers.all, 0.0))
        synchronise(stepper.device)
        spent = time.perf_counter() - start if step else 0.0
        if step >= LEAST_STEPS and spent > budget:
            return spent / step
    raise AssertionError("count() does not end")


def steps_of(directory: Path) -> int:
    """The number of steps that a run in this folder was begun with."""
    try:
        return json.loads((directory / folder.RECIPE).read_text(encoding="utf-8"))["settings"]["steps"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{directory / folder.RECIPE} does not say how many steps its run has: give --steps in place of --minutes."
        ) from None

"""The budget of a run: a number of steps, or minutes from which that number follows by the machine's pace."""

from pathlib import Path
from typing import TypeAlias

from torch import nn

from keifu.training.protocols import Batch, Data, Objective
from keifu.training.run import checkpoint
from keifu.training.settings import Settings
from keifu.training.setup import steps_of, steps_within

Budget: TypeAlias = tuple[int | None, float]  # steps, or else minutes


def is_resuming(directory: Path, resume: bool) -> bool:
    """Whether a part of a resumed run was begun."""
    return resume and bool(checkpoint.steps(directory))


def steps_for(
    budget: Budget, directory: Path, resume: bool, model: nn.Module, objective: Objective, data: Data, trial: Settings,
    largest: Batch | None = None,
) -> int:  # fmt: skip
    """The steps asked for, those that the resumed run began with, or as many as fit the minutes by the pace at first.
    largest: the batch that takes most memory, where batches differ."""
    steps, minutes = budget
    if steps:
        return steps
    if resume:
        return steps_of(directory)
    print(f"Trying the pace, to fit the training into {minutes:g} minutes ...", flush=True)
    return steps_within(minutes, model, objective, data, trial, data.batch(0) if largest is None else largest)


def minutes_of(budget: Budget) -> float | None:
    """The minutes of a budget, for the training loop; None where it is in steps."""
    steps, minutes = budget
    return None if steps else minutes

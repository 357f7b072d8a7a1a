"""Training runs of several models in one command: each part has a folder of its own inside the run's.

A part that is done is found again and one that was stopped goes on, each by the training loop's own rules, so that the
whole is resumed bit for bit. The run's one page shows them all.

Also the prompts of the samples of text-to-image runs.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keifu.data.images.augmentation import Augmentation
from keifu.data.images.batches import ImageBatches
from keifu.data.images.dataset import ImageSplit
from keifu.data.images.grid import grid
from keifu.data.images.io import to_bytes, to_signed
from keifu.errors import UserError
from keifu.files import write_atomic
from keifu.training.objectives.diffusion import NoisedBatches
from keifu.training.protocols import Data, Objective, Run
from keifu.training.run import checkpoint, metrics
from keifu.training.run.directory import SAMPLES
from keifu.training.run.report import CURVES
from keifu.training.settings import Settings
from keifu.training.setup import steps_of, steps_within

SHOWN = 12  # pictures of a sample


def is_resuming(directory: Path, resume: bool) -> bool:
    """Whether a part of a resumed run was begun."""
    return resume and bool(checkpoint.steps(directory))


def steps_for(
    budget: tuple[int | None, float],
    directory: Path,
    resume: bool,
    model: nn.Module,
    objective: Objective,
    data: Data,
    trial: Settings,
) -> int:
    """The steps asked for, those that the resumed run began with, or as many as fit the minutes at first sight."""
    steps, minutes = budget
    if steps:
        return steps
    if resume:
        return steps_of(directory)
    print(f"Trying the pace, to fit the training into {minutes:g} minutes ...", flush=True)
    return steps_within(minutes, model, objective, data, trial, data.batch(0))


def minutes_of(budget: tuple[int | None, float]) -> float | None:
    """The minutes of a budget, for the training loop; None where it is in steps."""
    steps, minutes = budget
    return None if steps else minutes


def of_a_part(
    directory: Path, resume: bool, model: nn.Module, parts: ImageSplit, title: str, paper: str,
    options: Mapping[str, Any],
) -> Run:  # fmt: skip
    """The run of a part that learns from pictures alone, whose model has a Config."""
    own: Any = model.config
    about = {
        "title": title,
        "paper": paper,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": [{"source": parts.train.source, "fingerprint": parts.train.fingerprint}],
    }
    options = {"model": vars(own), **options}
    return Run(directory, resume, options=options, about=about, unit="pictures")


def pictures_of(parts: ImageSplit, batch_size: int, seed: int, flip: bool) -> NoisedBatches:
    """The batches of a part that learns from pictures alone, every second one mirrored where `flip`, with draws."""
    batches: Any = ImageBatches(parts.train, parts.validation, batch_size, seed, Augmentation(flip=flip))
    return NoisedBatches(batches, seed)


def before_and_after(model: nn.Module, parts: ImageSplit) -> Callable[[int], bytes]:
    """Samples of a model that makes pictures of pictures: some that were held out, where there are some, above what
    comes back of them."""
    part = parts.validation if len(parts.validation) else parts.train
    some = part.take(slice(0, SHOWN))

    def sample(step: int) -> bytes:
        with torch.inference_mode():
            again = to_bytes(model(to_signed(some.to(next(model.parameters()).device)))).cpu()
        return grid(torch.cat([some, again]), columns=len(some), about={"keifu": f"step {step}"})

    return sample


def show(out: Path, parts: Mapping[str, str]) -> None:
    """Puts the curves of parts that are done, by their folders in the run's, and their last pictures beside the report
    of the run that follows."""
    charts = []
    for name, directory in ((name, out / folder) for name, folder in parts.items() if (out / folder).exists()):
        lines = metrics.last_metrics(metrics.read(directory))
        found = {
            label: [[float(line["step"]), float(line[field])] for line in lines if field in line]
            for label, field in (("training", "loss"), ("validation", "validation_loss"))
        }
        curves = [{"name": k, "points": v, "marked": k == "validation"} for k, v in found.items()]
        charts.append({"title": f"{name}: loss", "y_label": "loss", "curves": curves})
        if pictures := sorted((directory / SAMPLES).glob("*.png")):
            write_atomic(out / f"{directory.name}.png", pictures[-1].read_bytes())
    write_atomic(out / CURVES, json.dumps(charts) + "\n")


PROMPTS = (
    "red heart", "cat face", "green book", "full moon face", "blue apple", "red cat face",
    "赤いハート", "ネコの顔", "緑の本", "ヒマワリ", "青いリンゴ", "緑のハート",
)  # fmt: skip
COLUMNS = 6  # pictures of a row


def check_prompts(prompts: tuple[str, ...]) -> None:
    """Refuses to sample nothing."""
    if not prompts:
        raise UserError("There is no prompt for the samples: give at least one.")

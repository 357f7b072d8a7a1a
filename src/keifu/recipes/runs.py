"""Shared code of all recipes: the budget of a run, options for fine-tuning, and the training of a run with its
report."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from keifu import checkpoints
from keifu.data.attribution import attribution_of
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.ranges import BelowOne, Count, Positive, Seed
from keifu.recipes.options import Logging
from keifu.training.job import Budget, Job, PlannedSettings, RunFacts
from keifu.training.loop import Summary, train
from keifu.training.protocols import Batch, Data, Objective, Run, Sample, Save
from keifu.training.run import checkpoint
from keifu.training.runs import resolve
from keifu.training.settings import Settings

TrainingOptions = Annotated[Settings, tyro.conf.arg(name="")]  # options without a prefix


def given(value: float | int | None, usual: float | int) -> float | int:
    """Return the value of an option, or `usual` if it is unset."""
    return usual if value is None else value


def is_resuming(directory: Path, resume: bool) -> bool:
    """Return whether the run is to be resumed and has begun."""
    return resume and bool(checkpoint.steps(directory))


def fit(
    budget: Budget, directory: Path, resume: bool, model: nn.Module, objective: Objective, data: Data,
    settings: Callable[[int], Settings], largest: Batch | None = None,
) -> Settings:  # fmt: skip
    """Return the settings for the budget's steps, for those of a resumed run, or for as many as fit the minutes at the
    measured speed. largest: the batch with the largest memory, if batches differ."""
    job = Job(
        model=model, objective=objective, data=data, settings=PlannedSettings(budget, settings),
        facts=RunFacts(title=""), largest=largest,
    )  # fmt: skip
    found = resolve(job, directory, resume).settings
    assert isinstance(found, Settings)
    return found


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Logging):
    """Options of every fine-tuning recipe, each of which has different defaults."""

    model: str = field(default="smollm2", kw_only=False)
    """The pretrained model: a run, a directory, a .gguf file, a catalogue name or a hub id."""
    data: str = field(default="preferences.jsonl", kw_only=False)
    """Data to learn from."""
    held_out: BelowOne = 0.1
    """Share of the prompts that is kept for validation, chosen by a hash of the text."""
    epochs: Positive = 1.0
    """Passes over the training examples."""
    steps: Count | None = None
    """Updates of the weights; replaces epochs."""
    micro_batch: Count | None = None
    """Examples computed at a time; unset: as many as fit in memory."""
    learning_rate: float | None = None
    """AdamW's highest learning rate."""
    seed: Seed = 0
    """Random seed of new weights, the order of the examples, dropout and sampling."""

    def origin(self) -> dict[str, Any]:
        """Return the values that a resumed run must share."""
        return {"begins with": self.model}

    def total_steps(self, steps_per_epoch: float | int) -> int:
        """Return the steps of the whole run."""
        return self.steps or max(1, round(self.epochs * steps_per_epoch))

    def settings(self, steps: int, **different: Any) -> Settings:
        """Return settings: AdamW without weight decay, five validations and ten checkpoints. different: fields of
        `Settings` with other values."""
        usual = {"steps": steps, "weight_decay": 0.0, "betas": (0.9, 0.999), "keep_best": True}
        every = {"evaluate_every": max(1, steps // 5), "save_every": max(1, steps // 10)}
        return Settings(**self.loop(**usual | every | different))


def train_run(
    directory: Path, resume: bool, model: nn.Module, objective: Objective, data: Data, settings: Settings,
    tokenizer: Tokenizer | None = None, *, title: str, facts: Mapping[str, Any], options: Mapping[str, Any],
    sample: Sample | None = None, save: Save | None = None, largest: Batch | None = None, unit: str = "tokens",
    replace: bool = False, bytes_per_unit: float | None = None,
    watch: Callable[[Mapping[str, float]], Iterable[str]] | None = None, **about: Any,
) -> Summary:  # fmt: skip
    """Train a model into a run folder. Save it there with its tokenizer, or whatever `save` writes.

    facts: about the data, with its name as "source"; the licence is added. options: values that affect the result, in
    addition to the settings; a resumed run must have the same. about: further lines of the report. Other arguments are
    those of `Run` and of the training loop.
    """
    described = {"title": title, **about, "data": [{**facts, **attribution_of(facts["source"])}]}
    run = Run(directory, resume, replace, options, described, unit, bytes_per_unit, watch)
    save = save or partial(checkpoints.save, model, tokenizer)
    return train(model, objective, data, settings, run, sample, save, largest)

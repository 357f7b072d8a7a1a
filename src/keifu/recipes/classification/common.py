"""What the recipes that train a classifier from a labelled table share: options, settings and the training run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keifu import checkpoints
from keifu.data.classification.batches import LabelledBatches
from keifu.evaluation.classification.metrics import Confusion
from keifu.files import write_atomic
from keifu.recipes.finetuning import FinetuneOptions, describe_run, finetune_settings
from keifu.training.loop import Summary, train
from keifu.training.protocols import Objective, Run
from keifu.training.settings import Settings


@dataclass(frozen=True, kw_only=True)
class TableOptions(FinetuneOptions):
    """Options of the recipes that learn from a labelled table."""

    data: str = field(default="wiki-summaries", kw_only=False)
    """A .csv, .tsv or .jsonl table of labelled examples, or wiki-summaries with its 12 topics."""
    label: str = "label"
    """The table's column of labels."""
    held_out: float = 0.1
    """Share of the rows that is kept for testing, chosen by a hash of the (first) text."""
    epochs: int = 3
    """Passes over the training examples."""
    batch_size: int = 16
    """Examples in a step."""
    weight_decay: float = 0.01
    """AdamW's weight decay, of matrices alone."""


def classifier_settings(recipe: TableOptions, steps_per_epoch: int, **different: Any) -> Settings:
    """A learning rate that falls linearly to 0, and two validations in an epoch; `different` are the fields in which a
    recipe differs from that."""
    usual = {
        "batch_size": recipe.batch_size,
        "schedule": "linear",
        "final_ratio": 0.0,
        "weight_decay": recipe.weight_decay,
        "evaluate_every": max(1, steps_per_epoch // 2),
        "save_every": max(50, steps_per_epoch // 2),
    }
    return finetune_settings(recipe, recipe.total_steps(steps_per_epoch), **usual | different)


def train_classifier(
    task: Any,
    objective: Objective,
    data: LabelledBatches,
    settings: Settings,
    run: Run,
    confusion: Callable[[Any], Confusion],
) -> Summary:
    """Trains the task's model into a run folder, with the confusion matrix of the held-out examples as its sample."""

    def sample(step: int) -> str:
        found = confusion(task)
        write_atomic(run.directory / "confusion.png", found.picture())
        return found.page()

    return train(
        task.model,
        objective,
        data,
        settings,
        run,
        sample=sample if len(task.held) else None,
        save=lambda directory: checkpoints.save(task.model, task.tokenizer, directory),
        largest=data.largest(),
    )


def describe_classifier(
    recipe: Any, task: Any, out: Path, resume: bool, *, title: str, paper: str, unit: str, options: Any, data: Any
) -> Run:
    """The run for the training loop; options: what decides its result beside the model's config and the cut."""
    counts = {"learned from": len(task.training), "held out": len(task.held), "cut": task.cut}
    return describe_run(
        recipe,
        out,
        resume,
        title=title,
        paper=paper,
        unit=unit,
        options={"model": asdict(task.model.config), "cut": recipe.cut, **options},
        data=counts | data,
    )


def batches(recipe: TableOptions, task: Any) -> LabelledBatches:
    """The rows of a task in batches, padded with its tokenizer's padding token."""
    return LabelledBatches(task.training, task.held, recipe.batch_size, recipe.seed, task.tokenizer.pad_id or 0)

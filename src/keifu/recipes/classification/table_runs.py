"""Shared code of the recipes that train a classifier from a labelled table: options, settings and the training run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from keifu.data.classification.batches import EncodedTexts, LabelledBatches
from keifu.data.classification.examples import Examples
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.classification.labelled_texts import confusion_of
from keifu.evaluation.classification.metrics import Confusion
from keifu.files import write_atomic
from keifu.inference.embeddings.classifiers import text_classifier
from keifu.processes import current
from keifu.ranges import BelowOne, Count, NotNegative
from keifu.recipes.options import value_or
from keifu.recipes.training_options import FinetuneOptions
from keifu.training.job import Job, RunFacts
from keifu.training.protocols import Objective

LEAST_CUT = 3  # tokens of a text: special ones and at least one of text


@dataclass(frozen=True, kw_only=True)
class TableOptions(FinetuneOptions):
    """Options of the recipes that learn from a labelled table."""

    data: str = field(default="wiki-summaries", kw_only=False)
    """A .csv, .tsv or .jsonl table of labelled examples, or wiki-summaries with its 12 topics."""
    label: str = "label"
    """The table's column of labels."""
    encoding: str = "utf-8"
    """Encoding of a table without a byte order mark, such as cp932 (Excel in Japan), euc_jp or cp1252."""
    held_out: BelowOne = 0.1
    """Share of the rows that is kept for testing, chosen by a hash of the (first) text."""
    epochs: Count = 3
    """Passes over the training examples."""
    batch_size: Count = 16
    """Examples in a step."""
    cut: Count | None = None
    """Tokens that are kept of longer examples; unset, one longer than the model takes is an error."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay, of matrices alone."""


@dataclass(frozen=True, eq=False)
class TableTask:
    """Task that is ready to train: the model with a head, its tokenizer, and the encoded training and held-out
    examples."""

    model: Any
    tokenizer: Tokenizer
    training: EncodedTexts
    held_out: EncodedTexts
    tested: Examples
    cut: int


def check_cut(cut: int | None, least: int, limit: int) -> None:
    """Raise `UserError` if `cut` is smaller than a sequence needs, or larger than the context."""
    if cut is not None and not least <= cut <= limit:
        raise UserError(f"cut must be from {least} to {limit} tokens, which is all that the model takes, not {cut}.")


def encode(
    recipe: TableOptions,
    model: Any,
    tokenizer: Tokenizer,
    training: Examples,
    validation: Examples,
    make: type[EncodedTexts],
) -> TableTask:
    """Return the task for these examples. All labels must be among the model's. make: class of its batches."""
    judge = text_classifier(model, tokenizer)

    def as_ids(part: Examples) -> tuple[EncodedTexts, int]:
        rows, cut = judge.read(part, recipe.cut or judge.limit, recipe.cut is not None)
        return make(rows, judge.targets(part)), cut

    (learned, cut), (validation_texts, also_cut) = as_ids(training), as_ids(validation)
    return TableTask(model, tokenizer, learned, validation_texts, validation, cut + also_cut)


def evaluate(task: TableTask) -> Confusion:
    """Return the confusion matrix of the held-out examples."""
    judge = text_classifier(task.model, task.tokenizer)
    return confusion_of(judge, task.tested, judge.predict_proba(task.held_out.rows))


def classifier_job(
    recipe: TableOptions, task: TableTask, objective: Objective, out: Path, *, learning_rate: float,
    warmup: Callable[[int], int], facts: RunFacts,
) -> Job:  # fmt: skip
    """Return the training of the task's model, with the confusion matrix of the held-out examples as its sample.

    The learning rate decreases linearly to 0, with two validations in an epoch. out: folder of the run, in which the
    matrix is drawn. learning_rate: the highest rate, unless the
    recipe has one. warmup: function from the number of steps to that of warm-up steps. facts: its options are values
    that affect the result, in addition to the model's config and the cut.
    """
    if task.cut:
        print(f"{task.cut} of {len(task.training) + len(task.held_out)} {facts.unit} were cut to {recipe.cut} tokens.")
    rows = LabelledBatches(task.training, task.held_out, recipe.batch_size, recipe.seed, task.tokenizer.pad_id or 0)
    steps, half = recipe.total_steps(rows.steps_per_epoch), rows.steps_per_epoch // 2
    settings = recipe.settings(
        steps, batch_size=recipe.batch_size, learning_rate=value_or(recipe.learning_rate, learning_rate),
        warmup=warmup(steps), schedule="linear", final_ratio=0.0, weight_decay=recipe.weight_decay,
        evaluate_every=max(1, half), save_every=max(50, half),
    )  # fmt: skip
    data = {
        "source": recipe.data, "learned from": len(task.training), "held out": len(task.held_out), "cut": task.cut,
        **facts.data, "labels": ", ".join(task.model.config.labels),
    }  # fmt: skip
    options = {**recipe.origin(), "model": asdict(task.model.config), "cut": recipe.cut, **facts.options}

    def sample(step: int) -> str:
        confusion = evaluate(task)
        write_atomic(out / "confusion.png", confusion.picture())
        return confusion.page()

    return Job(
        model=task.model, objective=objective, data=rows, settings=settings, tokenizer=task.tokenizer,
        facts=replace(facts, data=data, options=options), sample=sample if len(task.held_out) else None,
        largest=rows.largest(),
    )  # fmt: skip


def show_verdict(task: TableTask, unit: str) -> None:
    """Print the figures of the held-out examples, unless there are none or the model is split over processes."""
    if len(task.held_out) and current().is_replicated:
        print(f"On held-out {unit}: {evaluate(task).verdict()}")

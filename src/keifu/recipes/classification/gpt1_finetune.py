"""Fine-tuning as in GPT-1 (Radford et al., 2018): a pretrained decoder learns a task from a table.

Paper: "Improving Language Understanding by Generative Pre-Training", sections 3.2, 3.3 and 4.1: start, delimiter and
extract tokens are new rows of the embedding, one matrix reads the last token's state, and the loss is the task's plus
half of the language model's. Batch 32, 3 epochs, rate 6.25e-5 with a warm-up of 0.2% of the steps and a linear
decrease, dropout 0.1 on the classified state; weight decay 0.01 and clipping at 1 as in the released code.
Command: keifu train gpt1-finetune --model runs/gpt1 --data wiki-summaries --cut 128
Cost: printed before it starts, for rows as long as the longest. --lm-weight 0 saves the loss of the words.
Expected: see docs/results.md, "Generative pretraining" (--data wiki-summaries).
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from keifu import checkpoints
from keifu.data.classification import input_formats
from keifu.data.classification.batches import FormBatches
from keifu.data.classification.examples import Examples
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.devices import choose
from keifu.errors import UserError, shell
from keifu.inference.text.model import TaskHeadModel, causal
from keifu.models import task_head
from keifu.ranges import BelowOne, Count, NotNegative, check
from keifu.recipes.classification.table_runs import (
    TableOptions,
    TableTask,
    check_cut,
    classifier_job,
    encode,
    show_verdict,
)
from keifu.training.job import RUN_FOLDER, Job, Jobs, RunFacts
from keifu.training.objectives.language_modeling import LM_WEIGHT, finetuning_loss

LEAST_CUT = 8  # tokens: special ones and at least one of text


@dataclass(frozen=True, kw_only=True)
class Recipe(TableOptions):
    """Options of the run."""

    model: str = field(default="runs/gpt1", kw_only=False)
    """The decoder to begin with: a run, a directory, a .gguf file, a hub id or a catalogue name."""
    form: Literal["classification", "entailment", "similarity", "choice"] = "classification"
    """Form of an example: a text; a premise and a hypothesis; two texts in no order; a context and answers to it."""
    columns: tuple[str, ...] = ()
    """The table's columns of texts; unset: text; premise hypothesis; first second; context answers. Of a choice the
    answers are a list in one column (JSON), or one column each."""
    label: str = "label"
    """The table's column of labels; of a choice, the number of the right answer from 0, or its letter from A."""
    test: str | None = None
    """A second table to test on; then no rows of the first are held out."""
    lm_weight: NotNegative = LM_WEIGHT
    """Weight of the language modelling loss, added to the classification loss; 0: none."""
    batch_size: Count = 32
    """Examples in a step."""
    learning_rate: NotNegative = 6.25e-5
    """AdamW's highest learning rate; models smaller than GPT-1 take a higher one."""
    warmup: BelowOne = 0.002
    """Share of the steps in which the learning rate rises from 0."""
    classifier_dropout: BelowOne = 0.1
    """Dropout of the state that is classified."""

    def __post_init__(self) -> None:
        check(self)


def prepare(recipe: Recipe) -> TableTask:
    """Read the recipe's tables, hold rows out if there is only one, and prepare the model."""
    form = input_formats.form_of(recipe.form)
    columns = recipe.columns, recipe.label, recipe.encoding
    table = input_formats.read_examples(recipe.data, form, *columns)
    if recipe.test is not None:
        return ready(recipe, table, input_formats.read_examples(recipe.test, form, *columns))
    return ready(recipe, *table.split(round(recipe.held_out * len(table))))


def ready(recipe: Recipe, training: Examples, validation: Examples) -> TableTask:
    """Return the task for these examples. Raises `UserError` for fewer than two training labels, or a held-out label
    that is not among them."""
    labels, answers = training.classes, input_formats.form_of(recipe.form).answers
    if len(labels) < 2:
        raise UserError(f"There is nothing to tell apart in {training.source}: every label is {', '.join(labels)!r}.")
    _check_labels(validation, () if answers else labels)
    torch.manual_seed(recipe.seed)
    model, tokenizer = start_model(recipe, () if answers else labels)
    check_cut(recipe.cut, LEAST_CUT, model.config.context_length)
    return encode(recipe, model, tokenizer, training, validation, FormBatches)


def _check_labels(validation: Examples, labels: tuple[str, ...]) -> None:
    for row in validation.rows if labels else ():
        if row.label not in labels:
            known_labels = ", ".join(map(repr, labels[:5])) + (", ..." if len(labels) > 5 else "")
            raise UserError(
                f"{row.where}: nothing that is learned from has the label {row.label!r}; there are {known_labels}: "
                "take the row out, or learn from some like it."
            )


def start_model(recipe: Recipe, labels: tuple[str, ...]) -> tuple[task_head.ModelWithHead, Tokenizer]:
    """Load the recipe's decoder with embeddings for the special tokens and a new head; and its tokenizer.

    If the decoder was fine-tuned before, its head is replaced.
    """
    loaded, tokenizer = checkpoints.load(recipe.model, torch.float32)
    decoder: Any = loaded.decoder if isinstance(loaded, TaskHeadModel) else causal(loaded)
    marked, ids = input_formats.add_delimiters(tokenizer)
    fresh = [number for number in ids if number >= tokenizer.vocab_size]
    task_head.grow_vocabulary(decoder, marked.vocab_size, fresh)
    start, delimiter, extract = ids
    config = task_head.Config(decoder.config, recipe.form, labels, start, delimiter, extract, recipe.classifier_dropout)
    return task_head.add_head(decoder, config).to(choose()), marked


def job_of(recipe: Recipe, task: TableTask, out: Path) -> Job:
    """Return the training of the task's model. out: folder of the run, in which the confusion matrix is drawn."""
    facts = RunFacts(
        title=f"A decoder learns “{Path(recipe.data).stem}”",
        about={"paper": "Radford et al., GPT-1 (2018)"},
        data={"form": recipe.form},
        options={"lm_weight": recipe.lm_weight},
        unit="examples",
    )
    return classifier_job(
        recipe, task, partial(finetuning_loss, lm_weight=recipe.lm_weight), out, learning_rate=recipe.learning_rate,
        warmup=lambda steps: round(recipe.warmup * steps), facts=facts,
    )  # fmt: skip


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu classify reads; print the held-out figures."""
    out = yield RUN_FOLDER
    task = prepare(recipe)
    yield job_of(recipe, task, out)
    show_verdict(task, "examples")
    print(f"The model is in {out}: keifu classify {shell(out)} reads such examples.")

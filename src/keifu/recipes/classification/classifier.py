"""Text classification on the labelled rows of a table: fine-tuning of BERT (Devlin et al., 2018, section 4.1), or with
few labels logistic regression on its frozen embeddings.

Paper: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; appendix A.3 gives the ranges
that fine-tuning works in: batch 16 or 32, rate 2e-5 to 5e-5, 2 to 4 epochs, dropout 0.1; the released code adds a
warm-up of a tenth of the steps and a rate that falls linearly to 0.
Below 3,000 labels frozen embeddings with a logistic regression are better, in seconds: the recipe chooses them, unless
--fine-tune or an option of fine-tuning is given.
Command: keifu train classifier --data reviews.csv --text text --label label
Cost: printed before it starts, for rows as long as the longest; minilm on 9,000 summaries of 100 tokens, 10 minutes on
2 cores with bfloat16.
Expected: see docs/results.md, "Bidirectional pretraining" (--data wiki-summaries).
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from keifu import checkpoints
from keifu.data.classification.batches import EncodedTexts
from keifu.data.classification.examples import Examples
from keifu.data.classification.tables import read
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.devices import choose
from keifu.errors import UserError, shell
from keifu.inference.embeddings.encoders import encoder
from keifu.models import bert
from keifu.ranges import BELOW_ONE, Count, NotNegative, check_value
from keifu.recipes.classification import frozen, table_runs
from keifu.training.job import RUN_FOLDER, Job, Jobs, RunFacts
from keifu.training.objectives.language_modeling import classification

SCRATCH = "scratch"
FEW = 3000  # with fewer labelled rows, frozen embeddings are better (docs/results/sentences.md)
FINE_TUNING = "size", "tokenizer", "steps", "learning_rate", "epochs", "batch_size", "micro_batch", "weight_decay"
SMALL = bert.Config(context_length=128, dim=256, hidden_dim=1024, n_layers=4, n_heads=4)


@dataclass(frozen=True, kw_only=True)
class Recipe(table_runs.TableOptions):
    """Options of the run."""

    model: str = field(default="minilm", kw_only=False)
    """The BERT to begin with: a run, a directory, a hub id or a catalogue name; or scratch for a new one."""
    frozen: bool = False
    """Whether the encoder stays frozen and logistic regression learns the labels from its embeddings. Default: chosen
    by the number of labels."""
    fine_tune: bool = False
    """Whether all weights are trained, however few labels there are."""
    text: str = "text"
    """The table's column of texts."""
    size: bert.Config = SMALL
    """Config of the new model, with --model scratch; its vocabulary and heads follow from the tokenizer and labels."""
    tokenizer: str = "minilm"
    """Tokenizer of the new model: a catalogue name, a file or a directory; or wordpiece to train it on the texts."""
    cut: Count | None = None
    """Tokens that are kept of longer texts; unset, a text longer than the model takes is an error."""
    learning_rate: NotNegative | None = None
    """AdamW's highest learning rate; unset: 5e-5, and 5e-4 for a new model."""

    def __post_init__(self) -> None:
        options = self.fine_tuning_options()
        if self.frozen and self.fine_tune:
            raise UserError("--frozen and --fine-tune are two ways to learn: give one of them.")
        if self.frozen and options:
            raise UserError(f"{options[0]} is for fine-tuning, and --frozen trains no encoder: leave it out.")

    def fine_tuning_options(self) -> list[str]:
        """Return the given options that only fine-tuning has."""
        defaults = {field.name: field.default for field in fields(self)}
        changed = [name for name in FINE_TUNING if vars(self)[name] != defaults[name]]
        options = [f"--{name.replace('_', '-')}" for name in changed]
        return ["--model scratch", *options] if self.model == SCRATCH else options


def freezes(recipe: Recipe, rows: int) -> bool:
    """Return whether the encoder stays frozen. If the number of labelled rows decides, print the reason."""
    if recipe.frozen or recipe.fine_tune or rows >= FEW:
        return recipe.frozen
    if options := recipe.fine_tuning_options():
        if recipe.model != SCRATCH:
            print(
                f"With {rows:,} labelled rows --frozen is usually better than fine-tuning ({options[0]}), and faster."
            )
        return False
    print(
        f"{rows:,} labelled rows are fewer than {FEW:,}: the encoder stays frozen, and logistic regression learns the "
        "labels from its embeddings. --fine-tune trains all weights.",
        flush=True,
    )
    return True


def tables(recipe: Recipe) -> tuple[Examples, Examples]:
    """Read the table that the recipe names; return training rows and held-out rows."""
    check_value("held_out", recipe.held_out, BELOW_ONE)
    table = read(recipe.data, recipe.text, recipe.label, recipe.encoding)
    return table.split(round(recipe.held_out * len(table)))


def prepare(recipe: Recipe) -> table_runs.TableTask:
    """Read the recipe's table, hold rows out, and prepare the model."""
    return ready(recipe, *tables(recipe))


def labels_of(training: Examples) -> tuple[str, ...]:
    """Return the labels of the training rows. Raises `UserError` for fewer than two."""
    labels = training.classes
    if len(labels) < 2:
        alone = ", ".join(labels)
        raise UserError(f"There is nothing to tell apart in {training.source}: its labels are {alone} alone.")
    return labels


def ready(recipe: Recipe, training: Examples, validation: Examples) -> table_runs.TableTask:
    """Return the task for these rows. Raises `UserError` for fewer than two training labels, or a held-out label that
    is not among them."""
    labels = labels_of(training)
    torch.manual_seed(recipe.seed)
    model, tokenizer = start_model(recipe, labels, training.texts)
    table_runs.check_cut(recipe.cut, table_runs.LEAST_CUT, model.config.context_length)
    return table_runs.encode(recipe, model, tokenizer, training, validation, EncodedTexts)


def start_model(recipe: Recipe, labels: tuple[str, ...], texts: tuple[str, ...]) -> tuple[Any, Tokenizer]:
    """Return a model with a head for these labels: new, or with the weights of --model."""
    heads: dict[str, Any] = {"pooled": True, "words": False, "next_sentence": False, "labels": labels}
    heads["sentence_head"] = False
    if recipe.model == SCRATCH:
        if recipe.tokenizer == "wordpiece":
            tokenizer = train_tokenizer("wordpiece", texts, recipe.size.vocab_size, lowercase=True)
        else:
            tokenizer = load_tokenizer(recipe.tokenizer)
        size = replace(recipe.size, vocab_size=tokenizer.vocab_size, **heads)
        return bert.build(size).to(choose()), tokenizer
    if (recipe.size, recipe.tokenizer) != (SMALL, Recipe.tokenizer):
        raise UserError(f"--size and --tokenizer are for a new model, and {recipe.model} is none: use --model scratch.")
    base, tokenizer = checkpoints.load(recipe.model, torch.float32)
    return bert.with_heads(base, encoder(base).config, **heads).to(choose()), tokenizer


def job_of(recipe: Recipe, task: table_runs.TableTask, out: Path) -> Job:
    """Return the training of the task's model. out: folder of the run, in which the confusion matrix is drawn."""
    facts = RunFacts(
        title=f"A classifier learns “{Path(recipe.data).stem}”",
        about={"paper": "Devlin et al., BERT (2018)"},
        unit="texts",
    )
    return table_runs.classifier_job(
        recipe, task, classification, out, learning_rate=5e-4 if recipe.model == SCRATCH else 5e-5,
        warmup=lambda steps: steps // 10, facts=facts,
    )  # fmt: skip


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu classify and transformers read; print the held-out figures. A frozen
    encoder needs no training."""
    out = yield RUN_FOLDER
    training, validation = tables(recipe)
    if freezes(recipe, len(training)):
        labels_of(training)
        frozen.learn(recipe, training, validation, out)
    else:
        task = ready(recipe, training, validation)
        yield job_of(recipe, task, out)
        table_runs.show_verdict(task, "texts")
    print(f'The model is in {out}: keifu classify {shell(out)} "A text".')

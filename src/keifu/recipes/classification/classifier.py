"""Text classification by fine-tuning BERT (Devlin et al., 2018, section 4.1), on the labelled rows of a table.

Paper: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; appendix A.3 gives the ranges
that fine-tuning works in: batch 16 or 32, rate 2e-5 to 5e-5, 2 to 4 epochs, dropout 0.1; the released code adds a
warm-up of a tenth of the steps and a rate that falls linearly to 0.
Command: keifu train classifier --data reviews.csv --text text --label label
Cost: printed before it starts, for rows as long as the longest; minilm on 9,000 summaries of 100 tokens, 10 minutes on
2 cores with bfloat16.
Expected: see docs/results.md, "Bidirectional pretraining" (--data wiki-summaries).
"""

from dataclasses import dataclass, field, replace
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
from keifu.evaluation.classification.embeddings import encoder
from keifu.models import bert
from keifu.ranges import check
from keifu.recipes.classification.common import TableOptions, Task, encode, train_classifier
from keifu.training.loop import Summary
from keifu.training.objectives.language_modeling import classification

SCRATCH = "scratch"
SMALL = bert.Config(context_length=128, dim=256, hidden_dim=1024, n_layers=4, n_heads=4)


@dataclass(frozen=True, kw_only=True)
class Recipe(TableOptions):
    """Options of the run."""

    model: str = field(default="minilm", kw_only=False)
    """The BERT to begin with: a run, a directory, a hub id or a catalogue name; or scratch for a new one."""
    text: str = "text"
    """The table's column of texts."""
    size: bert.Config = SMALL
    """Config of the new model, with --model scratch; its vocabulary and heads follow from the tokenizer and labels."""
    tokenizer: str = "minilm"
    """Tokenizer of the new model: a catalogue name, a file or a directory; or wordpiece to train it on the texts."""
    cut: int | None = None
    """Keep the first so many tokens of longer texts; unset, a text longer than the model takes is an error."""
    learning_rate: float | None = None
    """AdamW's highest learning rate; unset: 5e-5, and 5e-4 for a new model."""


def prepare(recipe: Recipe) -> Task:
    """Reads the table that the recipe names, holds rows out, and readies the model."""
    check({"held_out": recipe.held_out})
    table = read(recipe.data, recipe.text, recipe.label, recipe.encoding)
    return ready(recipe, *table.split(round(recipe.held_out * len(table))))


def ready(recipe: Recipe, training: Examples, held: Examples) -> Task:
    """The task of these rows; all labels must be among those to learn from, two at least."""
    labels = training.classes
    if len(labels) < 2:
        alone = ", ".join(labels)
        raise UserError(f"There is nothing to tell apart in {training.source}: its labels are {alone} alone.")
    torch.manual_seed(recipe.seed)
    model, tokenizer = start_model(recipe, labels, training.texts)
    limit = model.config.context_length
    if recipe.cut is not None and not 3 <= recipe.cut <= limit:
        raise UserError(f"cut keeps from 3 to {limit} tokens, as many as the model takes, and it is {recipe.cut}.")
    return encode(recipe, model, tokenizer, training, held, EncodedTexts)


def start_model(recipe: Recipe, labels: tuple[str, ...], texts: tuple[str, ...]) -> tuple[Any, Tokenizer]:
    """A model with a head for these labels: new, or with the weights of the one that the recipe begins with."""
    heads: dict[str, Any] = {"pooled": True, "words": False, "next_sentence": False, "labels": labels}
    if recipe.model == SCRATCH:
        learned = recipe.tokenizer == "wordpiece"
        size = recipe.size.vocab_size
        tokenizer = (
            train_tokenizer("wordpiece", texts, size, lowercase=True) if learned else load_tokenizer(recipe.tokenizer)
        )
        size = replace(recipe.size, vocab_size=tokenizer.vocab_size, **heads)
        return bert.build(size).to(choose()), tokenizer
    if (recipe.size, recipe.tokenizer) != (SMALL, Recipe.tokenizer):
        raise UserError(f"--size and --tokenizer are for a new model, and {recipe.model} is none: use --model scratch.")
    base, tokenizer = checkpoints.load(recipe.model, torch.float32)
    return bert.with_heads(base, encoder(base).config, **heads).to(choose()), tokenizer


def learn(recipe: Recipe, task: Task, out: Path, resume: bool = False) -> Summary:
    """Trains the task's model into a run folder, and draws the confusion matrix of the held-out texts there."""
    return train_classifier(
        recipe, task, classification, out, resume, learning_rate=5e-4 if recipe.model == SCRATCH else 5e-5,
        warmup=lambda steps: steps // 10, who="A classifier", paper="Devlin et al., BERT (2018)", unit="texts",
        options={}, data={},
    )  # fmt: skip


def run(recipe: Recipe, out: Path, resume: bool) -> None:
    """Trains into `out`, which keifu classify and transformers read afterwards, and prints the held-out figures."""
    learn(recipe, prepare(recipe), out, resume)
    print(f'The model is in {out}: keifu classify {shell(out)} "A text".')

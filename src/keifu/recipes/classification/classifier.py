"""Text classification (Devlin et al., 2018, section 4.1): a BERT, pretrained or new, learns the labels of a table.

Paper: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; appendix A.3 gives the ranges
that fine-tuning works in: batch 16 or 32, rate 2e-5 to 5e-5, 2 to 4 epochs, dropout 0.1; the released code adds a
warm-up of a tenth of the steps and a rate that falls linearly to 0.
Command: keifu train classifier --data reviews.csv --text text --label label
Cost: printed before it starts, for rows as long as the longest; minilm on 9,000 summaries of 100 tokens, 10 minutes on
2 cores with bfloat16.
Expected: see docs/results.md for the topics of the Wikipedia summaries (--data wiki-summaries).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from keifu import checkpoints
from keifu.data.classification.batches import EncodedTexts, LabelledBatches
from keifu.data.classification.tables import LabelledTexts, read, split
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.devices import choose
from keifu.errors import UserError
from keifu.evaluation.classification.embeddings import encode_texts, encoder
from keifu.evaluation.classification.metrics import Confusion, probabilities
from keifu.files import write_atomic
from keifu.models import bert
from keifu.recipes.options import Logging
from keifu.training.loop import Summary, train
from keifu.training.objectives.language_modeling import classification
from keifu.training.protocols import Run
from keifu.training.settings import Settings

SCRATCH = "scratch"
SMALL = bert.Config(context_length=128, dim=256, hidden_dim=1024, n_layers=4, n_heads=4)


@dataclass(frozen=True)
class Recipe(Logging):
    """Options of the run."""

    data: str = "wiki-summaries"
    """A .csv, .tsv or .jsonl table of texts with labels, or wiki-summaries with its 12 topics."""
    text: str = "text"
    """The table's column of texts."""
    label: str = "label"
    """The table's column of labels."""
    held_out: float = 0.1
    """Share of the rows that is kept for testing, chosen by a hash of the text."""
    model: str = "minilm"
    """The BERT to begin with: a run, a directory, a hub id or a catalogue name; or scratch for a new one."""
    size: bert.Config = SMALL
    """The new one's, with --model scratch; its vocabulary and heads follow from the tokenizer and the labels."""
    tokenizer: str = "minilm"
    """The new one's tokenizer: a catalogue name, a file or a directory; or wordpiece to learn it from the texts."""
    cut: int | None = None
    """Keep the first so many tokens of longer texts; unset, a text longer than the model takes is an error."""
    epochs: int = 3
    """How often every text is seen."""
    steps: int | None = None
    """Updates of the weights, in place of epochs."""
    batch_size: int = 16
    """Texts in a step."""
    micro_batch: int | None = None
    """Texts computed at a time; unset: as many as fit in memory."""
    learning_rate: float | None = None
    """AdamW's highest rate; unset: 5e-5, and 5e-4 for a new model."""
    weight_decay: float = 0.01
    """How strongly AdamW pulls matrices towards zero."""
    seed: int = 0
    """Of the new weights, the order of the texts and dropout."""


@dataclass(frozen=True, eq=False)
class Task:
    """Everything made ready: a model with a head for the labels, its tokenizer, and the rows as ids."""

    model: Any
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    training: EncodedTexts
    held: EncodedTexts
    cut: int


def prepare(recipe: Recipe) -> Task:
    """Reads the table that the recipe names, holds rows out, and readies the model."""
    if not 0 <= recipe.held_out < 1:
        raise UserError(f"held_out is a share from 0 up to below 1, and it is {recipe.held_out}.")
    table = read(recipe.data, recipe.text, recipe.label)
    return ready(recipe, *split(table, round(recipe.held_out * len(table))))


def ready(recipe: Recipe, training: LabelledTexts, held: LabelledTexts) -> Task:
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
    numbers = {label: number for number, label in enumerate(labels)}

    def as_ids(part: LabelledTexts) -> tuple[EncodedTexts, int]:
        rows, shortened = encode_texts(tokenizer, part.texts, recipe.cut or limit, recipe.cut is not None)
        return EncodedTexts(rows, [numbers[label] for label in part.labels]), shortened

    (learned, cut), (tested, cut_too) = as_ids(training), as_ids(held)
    return Task(model, tokenizer, labels, learned, tested, cut + cut_too)


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
    model = bert.build(replace(encoder(base).config, **heads))
    own: Any = base.config
    fresh = set() if own.labels == labels else {"classifier.weight", "classifier.bias"}
    weights = {name: tensor for name, tensor in base.state_dict().items() if name not in fresh}
    model.load_state_dict({name: weights[name] for name in model.state_dict() if name in weights}, strict=False)
    return model.to(choose()), tokenizer


def settings(recipe: Recipe, steps_per_epoch: int) -> Settings:
    """The training loop's settings for so many steps an epoch."""
    steps = recipe.steps or recipe.epochs * steps_per_epoch
    return Settings(
        steps=steps,
        batch_size=recipe.batch_size,
        micro_batch=recipe.micro_batch,
        learning_rate=recipe.learning_rate or (5e-4 if recipe.model == SCRATCH else 5e-5),
        schedule="linear",
        warmup=steps // 10,
        final_ratio=0.0,
        weight_decay=recipe.weight_decay,
        betas=(0.9, 0.999),
        evaluate_every=max(1, steps_per_epoch // 2),
        save_every=max(50, steps_per_epoch // 2),
        seed=recipe.seed,
        **recipe.logging(),
    )


def learn(recipe: Recipe, task: Task, out: Path, resume: bool = False) -> Summary:
    """Trains the task's model into a run folder, and draws the confusion matrix of the held-out texts there."""
    data = LabelledBatches(task.training, task.held, recipe.batch_size, recipe.seed, task.tokenizer.pad_id or 0)

    def sample(step: int) -> str:
        confusion = evaluate_classifier(task)
        write_atomic(out / "confusion.png", confusion.picture())
        return confusion.page()

    return train(
        task.model,
        classification,
        data,
        settings(recipe, data.steps_per_epoch),
        describe(recipe, task, out, resume),
        sample=sample if len(task.held) else None,
        save=lambda directory: checkpoints.save(task.model, task.tokenizer, directory),
        largest=data.largest(),
    )


def evaluate_classifier(task: Task) -> Confusion:
    """How the held-out texts are told apart."""
    given = probabilities(task.model, task.held.rows, task.tokenizer.pad_id or 0).argmax(-1)
    return Confusion.of(torch.tensor(task.held.targets), given.cpu(), task.labels)


def describe(recipe: Recipe, task: Task, out: Path, resume: bool) -> Run:
    """The run for the training loop: what decides its result beside the settings, and what its report says."""
    rows = {"source": recipe.data, "learned from": len(task.training), "held out": len(task.held), "cut": task.cut}
    return Run(
        directory=out,
        resume=resume,
        options={"begins with": recipe.model, "model": asdict(task.model.config), "cut": recipe.cut},
        about={
            "title": f"A classifier learns “{Path(recipe.data).stem}”",
            "paper": "Devlin et al., BERT (2018)",
            "data": [rows | {"labels": ", ".join(task.labels)}],
        },
        unit="texts",
    )


def run(recipe: Recipe, out: Path, resume: bool) -> None:
    """Trains into `out`, which keifu classify and transformers read afterwards, and prints the held-out figures."""
    task = prepare(recipe)
    if task.cut:
        print(f"{task.cut} of {len(task.training) + len(task.held)} texts were cut to their first {recipe.cut} tokens.")
    learn(recipe, task, out, resume)
    verdict = f"On held-out texts: {evaluate_classifier(task).verdict()} " if len(task.held) else ""
    print(f'{verdict}The model is in {out}: keifu classify {out} "A text".')

"""`keifu classify`: a label for each text, or how many of a table's labels a model finds; knows no model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from keifu.commands import flags, tables
from keifu.commands.encoders import ids, load_encoder, texts_from
from keifu.errors import UserError
from keifu.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from keifu.evaluation.classification import Confusion

EXAMPLE = 'keifu classify runs/classifier "A text"'
NAMED = 5  # labels that an error names


@dataclass(frozen=True)
class Options:
    """Give each text a label, or compare with the labels of a table. keifu train classifier makes the model for it.

    Each argument is a text, or each line of a file or of what is piped in.
    """

    model: flags.Model
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TEXT ...]", help="The texts.")] = ()
    file: Path | None = None
    """The file that has a text on each line."""
    on: str | None = None
    """A .csv, .tsv or .jsonl table of texts with labels: print accuracy, macro F1 and the confusion matrix."""
    text: str = "text"
    """The table's column of texts."""
    label: str = "label"
    """The table's column of labels."""
    picture: Path | None = None
    """The PNG file for the table's confusion matrix."""
    cut: bool = False
    """Keep the beginning of a text that is longer than the model takes."""
    json: bool = False
    """Print every label's probability, or all of a table's figures, as JSON."""


def run(options: Options) -> None:
    """Prints a line a text, or the figures of a table."""
    if options.on is None and options.picture:
        raise UserError("--picture draws a table's confusion matrix: name the table with --on.")
    if options.on is not None and (options.texts or options.file):
        raise UserError(f"There are two sources of texts, {options.on} and those beside it: give one of them.")
    (_predict if options.on is None else _judge)(options)


def _predict(options: Options) -> None:
    texts = texts_from(options.texts, options.file, EXAMPLE)
    model, tokenizer = _load(options.model)
    labels = model.config.labels
    shares = _probabilities(model, tokenizer, texts, options.cut).tolist()
    if options.json:
        for text, row in zip(texts, shares, strict=True):
            best = labels[row.index(max(row))]
            told = {"text": text, "label": best, "probabilities": dict(zip(labels, row, strict=True))}
            print(json.dumps(told, ensure_ascii=False))
        return
    lines = [_line(labels, row, text) for row, text in zip(shares, texts, strict=True)]
    tables.show(["label", "probability", "next", "text"], lines)


def _line(labels: Sequence[str], row: Sequence[float], text: str) -> list[str]:
    """A text's label and, after it, the next likely ones."""
    order = sorted(range(len(row)), key=lambda place: -row[place])
    others = ", ".join(f"{labels[place]} {row[place]:.3f}" for place in order[1:3])
    return [labels[order[0]], f"{row[order[0]]:.3f}", others, text]


def _judge(options: Options) -> None:
    from keifu.data.labelled import read

    table = read(options.on or "", options.text, options.label)
    model, tokenizer = _load(options.model)
    labels = model.config.labels
    if unseen := [label for label in table.classes if label not in labels]:
        raise UserError(
            f"{options.on} has labels that {options.model} never saw: {_some(unseen)}. It knows {_some(labels)}: "
            "take those rows out, or train with them."
        )
    confusion = _compared(labels, table.labels, _probabilities(model, tokenizer, table.texts, options.cut))
    if options.picture:
        write_atomic(options.picture, confusion.picture())
    if options.json:
        print(json.dumps(confusion.to_json(), ensure_ascii=False))
        return
    print(confusion.verdict())
    tables.show(*confusion.by_label())
    tables.show(*confusion.matrix())


def _compared(labels: Sequence[str], right: Sequence[str], shares: "Tensor") -> "Confusion":
    import torch

    from keifu.evaluation.classification import Confusion

    numbers = {label: number for number, label in enumerate(labels)}
    return Confusion.of(torch.tensor([numbers[label] for label in right]), shares.argmax(-1).cpu(), labels)


def _some(labels: Sequence[str]) -> str:
    rest = len(labels) - NAMED
    return ", ".join(map(repr, labels[:NAMED])) + (f" and {rest} more" if rest > 0 else "")


def _load(name: str) -> tuple[Any, Any]:
    """A classifier and its tokenizer; for any other kind of model a `UserError`."""
    model, tokenizer = load_encoder(name)
    if not model.config.labels:
        raise UserError(
            f"{name} has no classification head: train one with keifu train classifier --model {name} --data TABLE, "
            "and classify with that run."
        )
    return model, tokenizer


def _probabilities(model: Any, tokenizer: Any, texts: Sequence[str], cut: bool) -> "Tensor":
    from keifu.evaluation.classification import probabilities

    return probabilities(model, ids(model, tokenizer, texts, cut), tokenizer.pad_id or 0)


parse = flags.parser(Options, run, "keifu classify")

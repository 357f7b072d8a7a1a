"""`keifu classify`: a label for each text or image, or the accuracy on a table of labelled ones.

A fine-tuned classifier has labels of its own; a CLIP classifies images zero-shot, by labels given in words.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from keifu.commands.shared import flags, tables
from keifu.commands.shared.inputs import decode_utf8, is_picture, open_image, texts_from
from keifu.errors import UserError
from keifu.files import write_atomic

if TYPE_CHECKING:
    from keifu.evaluation.classification.metrics import Confusion

PLAIN = ("{}",)


def classify_images(options: Any) -> bool:
    """Whether pictures are to be classified: labels are given, or what is to be classified are pictures."""
    from keifu.data.images.sources import in_catalogue

    on = options.on is not None and (in_catalogue(options.on) or Path(options.on).is_dir())
    return options.labels is not None or on or any(map(is_picture, options.texts))


def run_zero_shot(options: Any) -> None:
    """Prints a line a picture, or the figures of a set of pictures with classes."""
    (_predict_zero_shot if options.on is None else _judge_zero_shot)(options)


def _predict_zero_shot(options: Any) -> None:
    files = list(options.texts)
    if wrong := [file for file in files if not is_picture(file)]:
        raise UserError(f"{wrong[0]!r} is no picture's file, and --labels are for pictures: name a .png or .jpg file.")
    if not files:
        raise UserError('There is no picture: keifu classify MODEL picture.png --labels "a dog,a cat".')
    labels, shares = _shares_of_pictures(options, files)
    rows = []
    for file, row in zip(files, shares, strict=True):
        order = sorted(range(len(labels)), key=lambda place: -row[place])
        others = ", ".join(f"{labels[place]} {row[place]:.3f}" for place in order[1:3])
        rows.append([labels[order[0]], f"{row[order[0]]:.3f}", others, file])
        if options.json:
            told = {"picture": file, "label": labels[order[0]], "probabilities": dict(zip(labels, row, strict=True))}
            print(json.dumps(told, ensure_ascii=False))
    if not options.json:
        tables.show(["label", "probability", "next", "picture"], rows)


def _shares_of_pictures(options: Any, files: list[str]) -> tuple[Sequence[str], list[list[float]]]:
    """The labels, and the probability of each for each picture: a network's own labels, or those given to a CLIP."""
    from keifu.checkpoints import load
    from keifu.evaluation.classification.neurons import RowClassifier, row_of
    from keifu.evaluation.images.retrieval import embed_pictures, label_points, label_shares, two_towers

    given = None if options.labels is None else _labels(options.labels)  # refused before loading
    model, tokenizer = load(options.model)
    if isinstance(model, RowClassifier):
        if given is not None:
            raise UserError(f"{options.model} has labels of its own: leave --labels out.")
        return model.classes, [model.predict_proba(row_of(model, one))[0].tolist() for one in open_image(files)]
    two_towers(model)
    labels = given or _labels(None)
    points = embed_pictures(model, open_image(files))
    texts = label_points(model, tokenizer, labels, options.template or PLAIN)
    return labels, label_shares(model, points, texts).tolist()


def _judge_zero_shot(options: Any) -> None:
    confusion = _compare(options)
    if options.picture:
        write_atomic(options.picture, confusion.picture())
    if options.json:
        print(json.dumps(confusion.to_json(), ensure_ascii=False))
        return
    print(confusion.verdict().replace("texts", "pictures"))
    tables.show(*confusion.by_label())
    tables.show(*confusion.matrix())


def _compare(options: Any) -> "Confusion":
    import torch

    from keifu.evaluation.classification.metrics import Confusion
    from keifu.evaluation.images.retrieval import (
        embed_pictures,
        images,
        label_points,
        label_shares,
        preprocessing,
        select_pairs,
    )

    model, tokenizer = _load_zero_shot(options.model)
    size = preprocessing(model).crop
    pictures = select_pairs(options.on, size)
    if not pictures.classes:
        raise UserError(f"The pictures of {options.on} have no classes: give each class a folder, or name pictures.")
    labels = _labels(options.labels) if options.labels else pictures.classes
    if len(labels) != len(pictures.classes):
        raise UserError(f"{len(labels)} labels were given for the classes {', '.join(pictures.classes)}: one for each.")
    points = embed_pictures(model, images(options.on, pictures, size))
    shares = label_shares(model, points, label_points(model, tokenizer, labels, options.template or PLAIN))
    return Confusion.of(torch.from_numpy(pictures.labels), shares.argmax(-1).cpu(), pictures.classes)


def _labels(given: str | None) -> list[str]:
    """The labels between commas, or one a line of a .txt file."""
    if given is None:
        raise UserError('A CLIP has no labels of its own: give some, such as --labels "a dog,a cat".')
    file = Path(given)
    lines = file.suffix == ".txt" and file.is_file()
    parts = decode_utf8(file.read_bytes(), str(file)).split("\n") if lines else given.split(",")
    labels = [part.strip() for part in parts if part.strip()]
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UserError(f"The labels {given!r} are {len(set(labels))} different ones: give two at least, each once.")
    return labels


def _load_zero_shot(name: str) -> tuple[Any, Any]:
    from keifu.checkpoints import load
    from keifu.evaluation.images.retrieval import two_towers

    model, tokenizer = load(name)
    two_towers(model)
    return model, tokenizer


if TYPE_CHECKING:
    from torch import Tensor

    from keifu.data.classification.input_formats import FormExamples
    from keifu.evaluation.classification.classifiers import TextClassifier

EXAMPLE = 'keifu classify runs/classifier "A text"'
NAMED = 5  # labels that an error names


@dataclass(frozen=True)
class Options(flags.OnDevice):
    """Give each text a label, or compare with the labels of a table. keifu train classifier and keifu train
    gpt1-finetune make the model for it. A CLIP gives pictures any labels in words: picture.png --labels "a dog,a cat".

    Each argument is a text, or each line of a file or of what is piped in. Where the model reads several texts together
    (premise and hypothesis, or a context and answers to it), a tab stands between any two.
    """

    model: flags.Model
    texts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[TEXT ...]", help="The texts.")] = ()
    file: Path | None = None
    """The file that has a text on each line."""
    on: str | None = None
    """A .csv, .tsv or .jsonl table of texts with labels: print accuracy, macro F1 and the confusion matrix."""
    text: str = "text"
    """The table's column of texts."""
    columns: tuple[str, ...] = ()
    """The table's columns where the model reads several texts together; unset: premise hypothesis, or first second, or
    context answers."""
    label: str = "label"
    """The table's column of labels."""
    labels: str | None = None
    """For pictures: what they may show, between commas, or a .txt file with one on each line; with --on, in the order
    of the classes, whose names are taken otherwise."""
    template: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """For pictures: words around a label, such as "a photo of a {}."; given several times, their mean counts."""
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
    if classify_images(options):
        return run_zero_shot(options)
    (_predict if options.on is None else _judge)(options)


def _predict(options: Options) -> None:
    from keifu.data.classification.input_formats import examples_of

    judge = _load(options.model)
    examples = examples_of(texts_from(options.texts, options.file, EXAMPLE), judge.form)
    shares = _probabilities(judge, examples, options.cut).tolist()
    lines = []
    for row, each in zip(examples.rows, shares, strict=True):
        choices, text = judge.choices(row), "\t".join(row.texts)
        if options.json:
            best, named = choices[each.index(max(each))], dict(zip(choices, each, strict=False))
            print(json.dumps({"text": text, "label": best, "probabilities": named}, ensure_ascii=False))
        lines.append(_line(choices, each, " | ".join(row.texts[:1] if judge.form.answers else row.texts)))
    if not options.json:
        tables.show(["label", "probability", "next", "text"], lines)


def _line(labels: Sequence[str], row: Sequence[float], text: str) -> list[str]:
    """A text's label and, after it, the next likely ones."""
    order = sorted(range(len(labels)), key=lambda place: -row[place])
    others = ", ".join(f"{labels[place]} {row[place]:.3f}" for place in order[1:3])
    return [labels[order[0]], f"{row[order[0]]:.3f}", others, text]


def _judge(options: Options) -> None:
    from keifu.data.classification.input_formats import read_examples

    judge = _load(options.model)
    columns = options.columns or ((options.text,) if len(judge.form.columns) == 1 else ())
    examples = read_examples(options.on or "", judge.form, columns, options.label)
    unseen = [] if judge.form.answers else [label for label in examples.classes if label not in judge.labels]
    if unseen:
        raise UserError(
            f"{options.on} has labels that {options.model} never saw: {_some(unseen)}. It knows {_some(judge.labels)}: "
            "take those rows out, or train with them."
        )
    confusion = judge.confusion(examples, _probabilities(judge, examples, options.cut))
    if options.picture:
        write_atomic(options.picture, confusion.picture())
    if options.json:
        print(json.dumps(confusion.to_json(), ensure_ascii=False))
        return
    print(confusion.verdict())
    tables.show(*confusion.by_label())
    tables.show(*confusion.matrix())


def _some(labels: Sequence[str]) -> str:
    rest = len(labels) - NAMED
    return ", ".join(map(repr, labels[:NAMED])) + (f" and {rest} more" if rest > 0 else "")


def _load(name: str) -> "TextClassifier":
    """What chooses; for any other kind of model a `UserError`."""
    from keifu.checkpoints import load
    from keifu.evaluation.classification.classifiers import text_classifier
    from keifu.evaluation.images.retrieval import TwoTowers

    model, tokenizer = load(name)
    if isinstance(model, TwoTowers):
        raise UserError(f'{name} tells pictures apart: keifu classify {name} picture.png --labels "a dog,a cat".')
    return text_classifier(model, tokenizer, name)


def _probabilities(judge: "TextClassifier", examples: "FormExamples", cut: bool) -> "Tensor":
    """Of each label or answer; that some examples were cut is said on stderr."""
    rows, shortened = judge.read(examples, cut)
    if shortened:
        print(f"{shortened} of {len(examples)} texts were cut to the model's {judge.limit} tokens.", file=sys.stderr)
    return judge.predict_proba(rows)


parse = flags.parser(Options, run, "keifu classify")

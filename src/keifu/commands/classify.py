"""`keifu classify`: a label for each text or image, or the accuracy on a labelled table.

A fine-tuned classifier has fixed labels. A CLIP classifies images by labels given in words (zero-shot).
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from keifu import checkpoints
from keifu.commands.shared import flags, tables
from keifu.commands.shared.inputs import decode_utf8, is_picture, open_image, texts_from
from keifu.commands.shared.terminal import say
from keifu.errors import UserError, shell
from keifu.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from keifu.data.classification.examples import Examples
    from keifu.evaluation.classification.metrics import Confusion
    from keifu.inference.embeddings.classifiers import TextClassifier

PLAIN = ("{}",)
Choices = tuple[Sequence[str], Sequence[float], str, str]  # labels, probabilities, name in JSON, name in tables
EXAMPLE = 'keifu classify runs/classifier "A text"'
NAMED = 5  # number of labels that an error lists
MANY = 12  # with more labels than this, only the worst are printed
SHOWN = 10  # number of the worst labels


@dataclass(frozen=True)
class Options(flags.OnDevice):
    """Give each text a label, or compare with the labels of a table. keifu train classifier and keifu train
    gpt1-finetune make such a model. A CLIP labels pictures with any words: picture.png --labels "a dog,a cat".

    Each argument is a text. Without arguments, each line of a file or pipe is a text. If the model reads several texts
    together (premise and hypothesis, or a context and its answers), separate them by tabs.
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
    encoding: str = "utf-8"
    """Encoding of a table without a byte order mark, such as cp932 (Excel in Japan), euc_jp or cp1252."""
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
    """Print a line for each text or picture, or the figures of a labelled table or of a set of pictures."""
    if options.on is None and options.picture:
        raise UserError("--picture draws a table's confusion matrix: name the table with --on.")
    if options.on is not None and (options.texts or options.file):
        raise UserError(
            f"There are two sources of texts, {options.on} and the texts of the command line: give one of them."
        )
    from keifu.data.images.catalogued import CATALOGUED

    on_pictures = options.on is not None and (options.on in CATALOGUED or Path(options.on).is_dir())
    pictures = options.labels is not None or on_pictures or any(map(is_picture, options.texts))
    if options.on is None:
        _show_choices(_of_pictures(options) if pictures else _of_texts(options), pictures, options.json)
    else:
        _show_confusion(_compare_pictures(options) if pictures else _compare_texts(options), pictures, options)


def _show_choices(classified: Iterable[Choices], pictures: bool, as_json: bool) -> None:
    """Print a line for each input with its most likely labels, or all probabilities as JSON."""
    rows, column = [], "picture" if pictures else "text"
    for labels, shares, name, input_text in classified:
        order = sorted(range(len(labels)), key=lambda index: -shares[index])
        runners_up = ", ".join(f"{labels[index]} {shares[index]:.3f}" for index in order[1:3])
        rows.append([labels[order[0]], f"{shares[order[0]]:.3f}", runners_up, input_text])
        if as_json:
            share_by_label = {label: round(share, 8) for label, share in zip(labels, shares, strict=False)}
            say(json.dumps({column: name, "label": rows[-1][0], "probabilities": share_by_label}, ensure_ascii=False))
    if not as_json:
        tables.show(["label", "probability", "next", column], rows)


def _show_confusion(confusion: "Confusion", pictures: bool, options: Options) -> None:
    if options.picture:
        write_atomic(options.picture, confusion.picture())
    if options.json:
        print(json.dumps(confusion.to_json(), ensure_ascii=False))
        return
    columns, rows = confusion.result("texts")
    if len(rows) <= MANY:
        tables.show(columns, rows)
        print()
        tables.show(*confusion.matrix())
    else:
        _show_worst(confusion, columns, rows)
    verdict = confusion.verdict()
    print(f"\n{verdict.replace('texts', 'pictures') if pictures else verdict}")


def _show_worst(confusion: "Confusion", columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print the labels with the lowest F1 and the most frequent errors. A matrix of many labels would not be
    readable."""
    worst = sorted(rows, key=lambda row: float(row[3]))[:SHOWN]
    tables.show(columns, worst)
    print(f"The {SHOWN} lowest F1 of {len(rows)} labels; --json prints all, --picture draws the whole matrix.\n")
    tables.show(["right", "given", "count"], confusion.errors(SHOWN))


def _of_pictures(options: Options) -> Iterable[Choices]:
    """Return the label probabilities of each picture, by a network's fixed labels or by labels given to a CLIP."""
    from keifu.inference.embeddings.clip import embed_pictures, label_points, label_shares, two_towers
    from keifu.inference.embeddings.row_classifiers import RowClassifier, row_of

    files = options.texts
    if wrong := [file for file in files if not is_picture(file)]:
        raise UserError(f"{wrong[0]!r} is no picture's file, and --labels are for pictures: name a .png or .jpg file.")
    if not files:
        raise UserError('There is no picture: keifu classify MODEL picture.png --labels "a dog,a cat".')
    own_labels = None if options.labels is None else _labels(options.labels)  # checked before loading
    model, tokenizer = checkpoints.load(options.model)
    if isinstance(model, RowClassifier):
        if own_labels is not None:
            raise UserError(f"{options.model} has labels of its own: leave --labels out.")
        labels: Sequence[str] = model.classes
        shares = [model.predict_proba(row_of(model, one))[0].tolist() for one in open_image(files)]
    else:
        two_towers(model)
        labels = own_labels or _labels(None)
        points = embed_pictures(model, open_image(files))
        texts = label_points(model, tokenizer, labels, options.template or PLAIN)
        shares = label_shares(model, points, texts).tolist()
    return [(labels, row, file, file) for file, row in zip(files, shares, strict=True)]


def _compare_pictures(options: Options) -> "Confusion":
    import torch

    from keifu.checkpoints.hub import locate
    from keifu.commands.evaluate import training_facts
    from keifu.evaluation.classification.metrics import Confusion
    from keifu.evaluation.images import retrieval
    from keifu.inference.embeddings import clip

    model, tokenizer = checkpoints.load(options.model)
    clip.two_towers(model)
    on, size = str(options.on), clip.preprocessing(model).crop
    pictures = retrieval.split_pairs(on, size, training_facts(locate(options.model)).get("held_out", {})).test
    if not pictures.classes:
        raise UserError(f"The pictures of {on} have no classes: give each class a folder, or name pictures.")
    labels = _labels(options.labels) if options.labels else pictures.classes
    if len(labels) != len(pictures.classes):
        raise UserError(f"{len(labels)} labels were given for the classes {', '.join(pictures.classes)}: one for each.")
    points = clip.embed_pictures(model, retrieval.images(on, pictures, size))
    texts = clip.label_points(model, tokenizer, labels, options.template or PLAIN)
    predictions = clip.label_shares(model, points, texts).argmax(-1).cpu()
    return Confusion.of(torch.from_numpy(pictures.labels), predictions, pictures.classes)


def _labels(argument: str | None) -> list[str]:
    """Split labels at commas, or read a .txt file with one on each line."""
    if argument is None:
        raise UserError('A CLIP has no labels of its own: give some, such as --labels "a dog,a cat".')
    file = Path(argument)
    lines = file.suffix == ".txt" and file.is_file()
    parts = decode_utf8(file.read_bytes(), str(file)).split("\n") if lines else argument.split(",")
    labels = [part.strip() for part in parts if part.strip()]
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UserError(f"The labels {argument!r} are {len(set(labels))} different ones: give two at least, each once.")
    return labels


def _of_texts(options: Options) -> Iterable[Choices]:
    from keifu.data.classification.input_formats import examples_of

    judge = _load(options.model)
    examples = examples_of(texts_from(options.texts, options.file, EXAMPLE), judge.form)
    for row, share in zip(examples.rows, _probabilities(judge, examples, options.cut).tolist(), strict=True):
        shown_text = " | ".join(row.texts[:1] if judge.form.answers else row.texts)
        yield judge.choices(row), share, "\t".join(row.texts), shown_text


def _compare_texts(options: Options) -> "Confusion":
    from keifu.data.classification.input_formats import read_examples

    judge = _load(options.model)
    columns = options.columns or ((options.text,) if len(judge.form.columns) == 1 else ())
    examples = read_examples(options.on or "", judge.form, columns, options.label, options.encoding)
    unseen = [] if judge.form.answers else [label for label in examples.classes if label not in judge.labels]
    if unseen:
        raise UserError(
            f"{options.on} has labels that {options.model} never saw: {_some(unseen)}. It knows {_some(judge.labels)}: "
            "take those rows out, or train with them."
        )
    from keifu.evaluation.classification.labelled_texts import confusion_of

    return confusion_of(judge, examples, _probabilities(judge, examples, options.cut))


def _some(labels: Sequence[str]) -> str:
    n_omitted = len(labels) - NAMED
    return ", ".join(map(repr, labels[:NAMED])) + (f" and {n_omitted} more" if n_omitted > 0 else "")


def _load(name: str) -> "TextClassifier":
    """Load a text classifier. Raises `UserError` for any other model."""
    from keifu.inference.embeddings.classifiers import text_classifier
    from keifu.inference.text.model import TwoTowers

    model, tokenizer = checkpoints.load(name)
    if isinstance(model, TwoTowers):
        raise UserError(f'{name} tells images apart: keifu classify {shell(name)} image.png --labels "a dog,a cat".')
    return text_classifier(model, tokenizer, name)


def _probabilities(judge: "TextClassifier", examples: "Examples", cut: bool) -> "Tensor":
    """Return the probability of each label or answer. Print on stderr how many examples were cut."""
    rows, shortened = judge.read(examples, judge.limit, cut)
    if shortened:
        print(f"{shortened} of {len(examples)} texts were cut to the model's {judge.limit} tokens.", file=sys.stderr)
    return judge.predict_proba(rows)

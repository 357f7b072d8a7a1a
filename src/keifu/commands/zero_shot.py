"""`keifu classify` with a CLIP: labels in words for pictures it was never trained to tell apart; knows no model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keifu.commands import tables
from keifu.commands.language import decoded
from keifu.commands.seen import is_picture, opened
from keifu.errors import UserError
from keifu.files import write_atomic

if TYPE_CHECKING:
    from keifu.evaluation.classification import Confusion

PLAIN = ("{}",)


def wanted(options: Any) -> bool:
    """Whether pictures are to be classified: labels are given, or what is to be classified are pictures."""
    from keifu.data.pictures import in_catalogue

    on = options.on is not None and (in_catalogue(options.on) or Path(options.on).is_dir())
    return options.labels is not None or on or any(map(is_picture, options.texts))


def run(options: Any) -> None:
    """Prints a line a picture, or the figures of a set of pictures with classes."""
    (_predict if options.on is None else _judge)(options)


def _predict(options: Any) -> None:
    from keifu.evaluation.shared_space import embed_pictures, label_points, label_shares

    files, labels = list(options.texts), _labels(options.labels)
    if wrong := [file for file in files if not is_picture(file)]:
        raise UserError(f"{wrong[0]!r} is no picture's file, and --labels are for pictures: name a .png or .jpg file.")
    if not files:
        raise UserError('There is no picture: keifu classify MODEL picture.png --labels "a dog,a cat".')
    model, tokenizer = _load(options.model)
    points = embed_pictures(model, opened(files))
    shares = label_shares(model, points, label_points(model, tokenizer, labels, options.template or PLAIN)).tolist()
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


def _judge(options: Any) -> None:
    confusion = _compared(options)
    if options.picture:
        write_atomic(options.picture, confusion.picture())
    if options.json:
        print(json.dumps(confusion.to_json(), ensure_ascii=False))
        return
    print(confusion.verdict().replace("texts", "pictures"))
    tables.show(*confusion.by_label())
    tables.show(*confusion.matrix())


def _compared(options: Any) -> "Confusion":
    import torch

    from keifu.evaluation.classification import Confusion
    from keifu.evaluation.retrieval import chosen, images
    from keifu.evaluation.shared_space import embed_pictures, label_points, label_shares, preprocessing

    model, tokenizer = _load(options.model)
    size = preprocessing(model).crop
    pictures = chosen(options.on, size)
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
    parts = decoded(file.read_bytes(), str(file)).split("\n") if lines else given.split(",")
    labels = [part.strip() for part in parts if part.strip()]
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UserError(f"The labels {given!r} are {len(set(labels))} different ones: give two at least, each once.")
    return labels


def _load(name: str) -> tuple[Any, Any]:
    from keifu.checkpoints import load
    from keifu.evaluation.shared_space import two_towers

    model, tokenizer = load(name)
    two_towers(model)
    return model, tokenizer

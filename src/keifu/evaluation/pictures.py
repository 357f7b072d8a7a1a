"""What a model that draws is worth: how near its pictures are to real ones, whether they are copies, how well it finds
held-out pictures again in noise, and how many bits they cost it; it knows no model by name.

Axes: picture, channels, height, width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from keifu.data.grid import grid
from keifu.data.picture_catalogue import CATALOGUED
from keifu.data.pictures import Pictures, Split, read_pictures, split
from keifu.data.progress import counting
from keifu.errors import UserError, unknown
from keifu.evaluation.denoised import STEPS, bits, reconstructed, told_labels
from keifu.evaluation.inception import place
from keifu.evaluation.picture_distances import frechet, kernel_distance, manifold, moments, nearest
from keifu.evaluation.picture_features import PAPERS, Extractor, extractor
from keifu.evaluation.task import Asked, Outcome, Table
from keifu.generation.denoiser import Denoising, DenoisingConfig
from keifu.generation.pictures import Drawing, denoising, draw, trained_size

ABOUT = "drawing: a model that removes noise, on pictures"
OPTIONS = {"seed", "batch_size", "output", "sampler", "steps", "metric"}
METRICS = "distances", "reconstruction", "bits"
DRAWN, BATCH = 1000, 64
AGAIN, COUNTED = 256, 64  # held-out pictures that are found again, and whose bits are counted, at most
COMPARED = 10_000  # real pictures that a network looks at, at most
SHOWN, ACROSS = 24, 4  # drawn pictures on the sheet, and in a row of it
Bytes = UInt8[Tensor, "picture channels height width"]


@dataclass(frozen=True)
class Neighbours:
    """The nearest real picture to each of some others, by pixels and by features, and how far the first one is.

    differences: the root of the mean squared difference of two pictures' bytes, 0 to 255.
    """

    by_pixels: Int[Tensor, " picture"]
    differences: Float[Tensor, " picture"]
    by_features: Int[Tensor, " picture"]


def takes(model: nn.Module) -> bool:
    """Whether it draws pictures out of noise, without a text."""
    return isinstance(model, Denoising) and isinstance(model.config, DenoisingConfig)


def names() -> list[str]:
    """The catalogue's pictures."""
    return list(CATALOGUED)


def accepts(on: str) -> bool:
    """Whether `on` is one of them, a folder, or .tar shards."""
    return on in names() or Path(on).expanduser().exists() or on.endswith(".tar")


def evaluate(model: nn.Module, tokenizer: object, asked: Asked) -> Outcome:
    """The figures of `metric`, or of each one.

    distances: drawn pictures beside those that keifu trains on, by features, and by pixels for copies. reconstruction
    and bits: of pictures that it keeps from training (see denoised.py).
    """
    drawer = denoising(model)
    if asked.metric not in (None, *METRICS):
        raise unknown("metric of a model that draws", asked.metric, METRICS)
    real, parts = _real(drawer, asked)
    found = [_drawn_beside(model, drawer, real, parts, asked)] if asked.metric in (None, "distances") else []
    if asked.metric != "distances":
        found.append(_held_out(drawer, parts.test, asked))
    return Outcome(
        {name: value for each in found for name, value in each.figures.items()},
        tuple(note for each in found for note in each.notes),
        {name: table for each in found for name, table in each.tables.items()},
        found[0].items,
        found[0].picture,
    )


def _drawn_beside(model: nn.Module, drawer: Denoising, real: Pictures, parts: Split, asked: Asked) -> Outcome:
    """Draws pictures and compares them with the real ones."""
    any_class = 0 if drawer.config.n_classes and not drawer.config.null_class else None
    wanted = Drawing(asked.sampler or "ddim", asked.steps, asked.seed, any_class).resolved(drawer)
    drawn = _drawn(model, drawer, wanted, asked.limit or DRAWN, asked.batch_size or BATCH)
    return beside(drawn, real, parts.test if len(parts.train) else None, asked, wanted)


def beside(drawn: Bytes, real: Pictures, held: Pictures | None, asked: Asked, wanted: Drawing) -> Outcome:
    """Pictures that were drawn beside real ones: distances, remarks, the nearest real one of each, and a picture."""
    seen = extractor()
    near, figures = compared(seen, drawn, real, held)
    notes = [
        f"{len(drawn):,} pictures by {wanted.sampler} in {wanted.steps} steps, seeds {wanted.seed} and on, beside "
        f"{len(real):,} of {asked.on} at {real.shape[2]} x {real.shape[1]}; features: {seen.name}.",
        "The Fréchet distance falls with the number of drawn pictures: compare it between equal numbers only.",
    ]
    if seen.titles != PAPERS:
        notes.append(f"Inception's weights are not at {place()}: these are no FID and KID as papers print them.")
    columns = "seed", "nearest by pixels", "difference", "nearest by features"
    rows = [
        (asked.seed + n, real.names[one], round(difference, 3), real.names[other])
        for n, (one, difference, other) in enumerate(
            zip(near.by_pixels.tolist(), near.differences.tolist(), near.by_features.tolist(), strict=True)
        )
    ]
    return Outcome(figures, tuple(notes), {}, Table(columns, rows), side_by_side(drawn, real, near, asked.seed))


def _held_out(drawer: Denoising, held: Pictures, asked: Asked) -> Outcome:
    """Reconstruction and bits of pictures that were held out; where that cannot be, a note, or a `UserError` if it was
    asked for by name."""
    try:
        if not len(held):
            raise UserError(f"Too few pictures are in {asked.on} to hold one out, so none can be found again in noise.")
        told_labels(drawer, held)
    except UserError as error:
        if asked.metric:
            raise
        return Outcome({}, (str(error),))
    figures, tables, notes, size = {}, {}, [], asked.batch_size or BATCH
    if asked.metric in (None, "reconstruction"):
        chosen = held.spread(asked.limit or AGAIN)
        figures, tables["reconstruction"] = reconstructed(drawer, chosen, asked.seed, size)
        notes.append(
            f"PSNR and SSIM: {len(chosen):,} held-out pictures, noise added until a half of their variance is left "
            "(the table has other shares), and taken off by ddim without chance (η = 0) along the rest of a path of "
            f"{min(STEPS, drawer.noise.steps)} steps."
        )
    if asked.metric in (None, "bits"):
        chosen = held.spread(asked.limit or COUNTED)
        figures |= bits(drawer, chosen, asked.seed, size)
        notes.append(
            f"bits/dim: the variational bound of {len(chosen):,} held-out pictures, one draw of noise for each of "
            f"{drawer.noise.steps:,} steps; the decoder gives each number one of 256 grey values."
        )
    return Outcome(figures, tuple(notes), tables)


def compared(
    seen: Extractor, drawn: Bytes, real: Pictures, held: Pictures | None
) -> tuple[Neighbours, dict[str, float | int | str]]:
    """The figures of drawn pictures beside real ones, and, where some were held out, of those beside the same."""
    known = real.spread(COMPARED)
    features, known_features = seen(drawn), seen(known.take(slice(None)))
    figures = _figures(seen, known_features, features, "")
    near = neighbours(drawn, features, known, known_features, real)
    figures["median difference to the nearest real picture"] = round(float(near.differences.median()), 2)
    if held is not None and len(held) >= 4:
        others = held.take(slice(None))
        other_features = seen(others)
        figures |= _figures(seen, known_features, other_features, " of held-out pictures")
        apart = neighbours(others, other_features, known, known_features, real).differences
        figures["median difference of held-out pictures"] = round(float(apart.median()), 2)
        figures["share nearer than 99% of held-out pictures"] = round(
            float((near.differences < apart.quantile(0.01)).float().mean()), 4
        )
    return near, figures


def _figures(seen: Extractor, real: Tensor, drawn: Tensor, whose: str) -> dict[str, float | int | str]:
    """Fréchet and kernel distance, precision and recall, each with its name."""
    distance, among = kernel_distance(real, drawn), manifold(real, drawn)
    named = seen.titles
    return {
        f"{named[0]}{whose}": round(frechet(moments(real), moments(drawn)), 4),
        f"{named[1]} x 1000{whose}": round(1000 * distance.mean, 4),
        f"{named[1]} x 1000, deviation of subsets of {distance.size}{whose}": round(1000 * distance.deviation, 4),
        f"precision{whose}": round(among.precision, 4),
        f"recall{whose}": round(among.recall, 4),
    }


def neighbours(drawn: Bytes, features: Tensor, known: Pictures, known_features: Tensor, real: Pictures) -> Neighbours:
    """The nearest of all real pictures by pixels, and of the `known` ones, which have features, by those."""
    pixels = drawn.flatten(1)
    distances, places = nearest(pixels, real.take(slice(None)).flatten(1))
    by_features = nearest(features, known_features)[1]
    where = {name: place for place, name in enumerate(real.names)}
    among = torch.tensor([where[known.names[place]] for place in by_features.tolist()])
    return Neighbours(places, distances / math.sqrt(pixels.shape[1]), among)


def side_by_side(drawn: Bytes, real: Pictures, near: Neighbours, seed: int) -> bytes:
    """A PNG: each of some drawn pictures, the nearest real one by pixels, and the nearest by features."""
    count = min(SHOWN, len(drawn))
    one, other = near.by_pixels[:count].tolist(), near.by_features[:count].tolist()
    triples = torch.stack([drawn[:count], real.take(one), real.take(other)], 1)
    captions = [
        text
        for n in range(count)
        for text in (f"seed {seed + n}", f"pixels: {_said(real, one[n])}", f"features: {_said(real, other[n])}")
    ]
    return grid(triples.flatten(0, 1), captions, columns=3 * ACROSS)


def _said(pictures: Pictures, place: int) -> str:
    """What is known of a picture: its caption, its class or its name."""
    if pictures.captions:
        return pictures.texts()[place]
    return pictures.classes[pictures.labels[place]] if pictures.labels[place] >= 0 else pictures.names[place]


def _real(model: Denoising, asked: Asked) -> tuple[Pictures, Split]:
    """The pictures that are learned from, as the model has them; of a set that is held out whole, all."""
    height, width = trained_size(model)
    if height != width:
        raise UserError(f"This model draws {width} x {height} pictures, and only squares can be compared.")
    pictures = read_pictures(asked.on, height, 1 if model.config.channels == 1 else 3)
    told = asked.held_out
    parts = split(pictures.distinct() if told.get("distinct") else pictures, told.get("share", 0.05))
    return (parts.train if len(parts.train) else parts.test), parts


def _drawn(model: nn.Module, drawer: Denoising, wanted: Drawing, count: int, batch_size: int) -> Bytes:
    """So many pictures, whose seeds follow each other; a model that must be told a class draws them in turn."""
    classes, free = drawer.config.n_classes, drawer.config.null_class
    labels: Sequence[int | None] = [None] if free or not classes else range(classes)
    pictures: dict[int, Tensor] = {}
    with counting("Drawing", count, "pictures") as advance:
        for turn, label in enumerate(labels):
            numbers = range(turn, count, len(labels))
            for first in range(0, len(numbers), batch_size):
                part = numbers[first : first + batch_size]
                seeds = [(wanted.seed or 0) + number for number in part]
                pictures |= dict(zip(part, draw(model, replace(wanted, label=label), seeds), strict=True))
                advance(len(pictures))
    return torch.stack([pictures[number] for number in range(count)])

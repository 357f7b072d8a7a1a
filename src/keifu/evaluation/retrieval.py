"""How well pictures find their captions and captions their pictures: recall among the first 1, 5 and 10; no model.

Axes: pictures, texts, embedding. With several captions to a picture, any of them is right (Karpathy and Fei-Fei, 2015).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from keifu.data import picture_sources
from keifu.data.pictures import Pictures, in_catalogue, read_pictures, split
from keifu.data.tokenizers import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.shared_space import TwoTowers, embed_pictures, embed_texts, preprocessing
from keifu.evaluation.task import Asked, Outcome, Table

ABOUT = "retrieval: a CLIP on captioned pictures, emoji for example"
OPTIONS = {"language", "output"}
FIRST = (1, 5, 10)
AT_ONCE = 2**24  # similarities that exist at a time
NAMES = ("emoji", "openmoji", "photos")


@dataclass(frozen=True)
class Recall:
    """The share of searches whose answer is among the first 1, 5 and 10, by that number, and the median place of it."""

    shares: dict[int, float]
    median: float

    def figures(self, name: str) -> dict[str, float]:
        """The same as figures whose names begin with `name`."""
        return {f"{name} R@{first}": round(share, 4) for first, share in self.shares.items()} | {
            f"{name} median rank": self.median
        }


def ranks(
    queries: Float[Tensor, "queries embedding"],
    among: Float[Tensor, "among embedding"],
    right: Int[Tensor, " queries"],
    answers: Int[Tensor, " among"],
) -> Int[Tensor, " queries"]:
    """The place, from 1, at which each query finds the first of those among which `answers` equals its `right`.

    Whatever is as near as the answer counts as before it, so that a model which knows nothing gains nothing.
    """
    found, rows = [], max(1, AT_ONCE // len(among))
    for start in range(0, len(queries), rows):
        similarity, part = queries[start : start + rows] @ among.T, right[start : start + rows, None]
        wanted = part == answers
        best = similarity.masked_fill(~wanted, -torch.inf).amax(1, keepdim=True)
        found.append(((similarity >= best) & ~wanted).sum(1) + 1)
    return torch.cat(found)


def recall(places: Int[Tensor, " queries"]) -> Recall:
    """The figures of such places."""
    shares = {first: float((places <= first).float().mean()) for first in FIRST}
    return Recall(shares, float(places.float().quantile(0.5)))


def both_ways(
    pictures: Float[Tensor, "pictures embedding"],
    texts: Float[Tensor, "texts embedding"],
    owners: Int[Tensor, " texts"] | None = None,
    alike: Int[Tensor, " pictures"] | None = None,
) -> tuple[Recall, Recall]:
    """Captions found by pictures, and pictures found by captions. owners: the picture of each caption, by place; unset,
    the captions are in the pictures' order. alike: a number for each picture, which owners then are; pictures with the
    same one have the same caption, and each is right for it."""
    numbers = torch.arange(len(pictures), device=pictures.device) if alike is None else alike
    owners = numbers if owners is None else owners
    return (
        recall(ranks(pictures, texts, numbers, owners)),
        recall(ranks(texts, pictures, owners, numbers)),
    )


def takes(model: nn.Module) -> bool:
    """Whether the model has a tower for pictures and one for texts."""
    return isinstance(model, TwoTowers)


def names() -> list[str]:
    """The catalogue's captioned pictures."""
    return list(NAMES)


def accepts(on: str) -> bool:
    """Whether these are pictures: a catalogue name, a folder or shards."""
    return in_catalogue(on) or on.endswith(".tar") or Path(on).expanduser().is_dir()


def evaluate(model: nn.Module, tokenizer: Tokenizer, asked: Asked) -> Outcome:
    """R@1, R@5 and R@10 in both directions, for each language of the captions that the model has learned, where its run
    says which, and else for each that there is."""
    pictures = chosen(asked.on, preprocessing(model).crop)
    if not pictures.captions:
        raise UserError(f"The pictures of {asked.on} have no captions to be found; add metadata.jsonl with text.")
    if asked.language:
        pictures.texts(asked.language)  # an unknown one is an error
    if asked.limit:
        pictures = pictures.chosen(range(min(asked.limit, len(pictures))))
    points = embed_pictures(model, images(asked.on, pictures, preprocessing(model).crop))
    figures: dict[str, float | int | str] = {"pictures": len(pictures)}
    rows = []
    learned = [code for code in asked.languages if code in pictures.captions]
    for language in [asked.language] if asked.language else learned or pictures.captions:
        texts = embed_texts(model, tokenizer, pictures.captions[language])
        alike = equal(pictures.captions[language]).to(points.device)
        captions, found = both_ways(points, texts, alike, alike)
        figures |= captions.figures(f"{language} captions") | found.figures(f"{language} pictures")
        rows += _nearest(pictures, language, points, texts)
    table = Table(("picture", "language", "caption", "nearest caption", "similarity"), rows)
    note = "captions: found by pictures; pictures: found by captions. Chance for R@1 is one in all of them."
    return Outcome(figures, (pictures.sentence(), note), items=table)


def equal(captions: Sequence[str]) -> Int[Tensor, " captions"]:
    """For each caption the place of the first that is the same text."""
    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(caption, place) for place, caption in enumerate(captions)])


def chosen(on: str, size: int) -> Pictures:
    """The pictures that an evaluation is of: those kept from training of a catalogue name, the part called test of a
    folder that has one, else all."""
    pictures = read_pictures(on, size, 3)
    if in_catalogue(on):
        return split(pictures).test
    test = [place for place, part in enumerate(pictures.parts) if part == "test"]
    return pictures.chosen(test) if test else pictures


def images(on: str, pictures: Pictures, size: int) -> Iterator[Image.Image]:
    """The pictures in their order, as they lie in the source and not yet of the network's size."""
    wanted = {name: place for place, name in enumerate(pictures.names)}
    read: dict[int, Any] = {}
    for item in picture_sources.items(on, lambda problem: None):
        if item.name in wanted:
            read[wanted[item.name]] = item.read
    for place in range(len(pictures)):
        yield read[place](size).image


def _nearest(pictures: Pictures, language: str, points: Tensor, texts: Tensor) -> list[tuple[Any, ...]]:
    similarity, place = (points @ texts.T).max(1)
    captions: Sequence[str] = pictures.captions[language]
    return [
        (name, language, own, captions[found], f"{value:.3f}")
        for name, own, found, value in zip(pictures.names, captions, place.tolist(), similarity.tolist(), strict=True)
    ]

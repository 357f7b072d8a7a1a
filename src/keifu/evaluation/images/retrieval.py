"""Image-text retrieval by a CLIP model: recall among the first 1, 5 and 10.

If an image has several captions, each is correct (Karpathy and Fei-Fei, 2015). Axes: pictures, texts, labels,
embedding.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from keifu.data.images import sources
from keifu.data.images.catalogued import CATALOGUED
from keifu.data.images.dataset import ImageDataset, read_images
from keifu.data.images.splits import ImageSplit, split_of_run
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.images.counting import Points, counted_points
from keifu.evaluation.intervals import as_text, bootstrap, mean_figures
from keifu.evaluation.registry import EvalRequest, EvalResult, Figures, ResultTable
from keifu.inference.embeddings.clip import embed_pictures, embed_texts, preprocessing
from keifu.inference.text.model import TwoTowers

ABOUT = "retrieval: a CLIP on captioned pictures, emoji for example"
OPTIONS = {"language", "output"}
FIRST = (1, 5, 10)
AT_ONCE = 2**24  # similarities that are computed at once
NAMES = ("emoji", "openmoji", "photos")


class Recall(NamedTuple):
    """Share of queries whose answer is among the first 1, 5 and 10 (by that number), and the answer's median rank."""

    shares: dict[int, float]
    median: float

    def figures(self, name: str) -> dict[str, float]:
        """Return the figures with names that begin with `name`."""
        shares = {f"{name} R@{first}": round(share, 4) for first, share in self.shares.items()}
        return shares | {f"{name} median rank": self.median}


def ranks(
    queries: Float[Tensor, "queries embedding"],
    among: Float[Tensor, "among embedding"],
    right: Int[Tensor, " queries"],
    answers: Int[Tensor, " among"],
) -> Int[Tensor, " queries"]:
    """Return the rank, from 1, of each query's first correct point. A point is correct if its entry in `answers` equals
    the query's entry in `right`.

    Points with equal similarity count as nearer than the answer, so that constant embeddings gain nothing.
    """
    parts, rows = [], max(1, AT_ONCE // len(among))
    for start in range(0, len(queries), rows):
        similarity, part = queries[start : start + rows] @ among.T, right[start : start + rows, None]
        is_answer = part == answers
        best = similarity.masked_fill(~is_answer, -torch.inf).amax(1, keepdim=True)
        parts.append(((similarity >= best) & ~is_answer).sum(1) + 1)
    return torch.cat(parts)


def recall(positions: Sequence[int]) -> Recall:
    """Return the recall figures of these ranks."""
    shares = {first: float(np.mean(np.array(positions) <= first)) for first in FIRST}
    return Recall(shares, float(np.median(positions)))


def takes(model: nn.Module) -> bool:
    """Return whether the model has a tower for pictures and one for texts."""
    return isinstance(model, TwoTowers)


def accepts(on: str) -> bool:
    """Return whether `on` is a catalogue name of pictures, a folder or shards."""
    return on in CATALOGUED or on.endswith(".tar") or Path(on).expanduser().is_dir()


def evaluate(model: nn.Module, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Return recall in both directions for each language that the model was trained on, or else for each language of
    the data.

    Of near copies, such as an emoji in all skin tones, only the first is used. Intervals resample families.
    """
    size = preprocessing(model).crop
    parts = split_pairs(request.on, size, request.held_out)
    pictures = parts.test.distinct()
    if not pictures.captions:
        raise UserError(f"The pictures of {request.on} have no captions to be found; add metadata.jsonl with text.")
    if request.language:
        pictures.texts(request.language)  # raises an error for an unknown language
    pictures = pictures.subset(range(len(pictures))[: request.limit])
    points = embed_pictures(model, images(request.on, pictures, size))
    families = pictures.families.tolist()
    figures: Figures = {"pictures": len(pictures), "families": len({*families})}
    rows = list[tuple[Any, ...]]()
    learned = [code for code in request.languages if code in pictures.captions]
    for language in [request.language] if request.language else learned or pictures.captions:
        texts = embed_texts(model, tokenizer, pictures.captions[language])
        alike = equal(pictures.captions[language]).to(points.device)
        columns = both_ranks((points, texts), (points, texts), alike)
        if len(parts.train):
            counted = both_ranks(*counted_points(parts.train, pictures, language), alike.cpu())
            columns |= {f"{name}, counted": ranks for name, ranks in counted.items()}
        figures |= figures_of(language, columns, families)
        rows += _nearest(pictures, language, points, texts, columns)
    heads = ("picture", "family", "language", "caption", "nearest caption", "similarity", *columns)
    notes = (
        pictures.sentence(),
        "captions: found by pictures; pictures: found by captions. Chance for R@1 is one in all of them. Near copies "
        "count once; intervals are 95%, by resampling families.",
    )
    return EvalResult(figures, notes, items=ResultTable(heads, rows))


def both_ranks(for_captions: Points, for_pictures: Points, alike: Int[Tensor, " pictures"]) -> dict[str, list[int]]:
    """Return the rank of each picture's caption, and of each caption's picture, by "captions" and "pictures".

    for_captions, for_pictures: (pictures, texts). alike: a number for each picture; pictures with the same number have
    the same caption, and each is correct for it.
    """
    pictures, texts = for_pictures
    captions = ranks(*for_captions, alike, alike)
    return {"captions": captions.tolist(), "pictures": ranks(texts, pictures, alike, alike).tolist()}


def figures_of(language: str, columns: Mapping[str, Sequence[int]], families: Sequence[int]) -> Figures:
    """Return the figures of ranks by direction ("captions", "pictures"), and those of the counting baseline."""
    figures: Figures = {}
    for what in ("captions", "pictures"):
        name = f"{language} {what} R@1"
        figures |= recall(columns[what]).figures(f"{language} {what}")
        right = np.array(columns[what]) == 1
        figures[f"{name}, 95% interval"] = as_text(bootstrap(right, clusters=families))
        if counted := columns.get(f"{what}, counted"):
            baseline = np.array(counted) == 1
            figures |= mean_figures(f"{name} by counting", baseline, clusters=families)
            difference = bootstrap(right * 1.0 - baseline, clusters=families)
            figures[f"{name} above counting, 95% interval"] = as_text(difference)
    return figures


def equal(captions: Sequence[str]) -> Int[Tensor, " captions"]:
    """Return for each caption the index of the first equal caption."""
    first: dict[str, int] = {}
    return torch.tensor([first.setdefault(caption, index) for index, caption in enumerate(captions)])


def split_pairs(on: str, size: int, held_out: Mapping[str, Any]) -> ImageSplit:
    """Split the pictures of an evaluation. `test` is the held-out part of a catalogue entry, or a folder's part called
    test if there is one, else everything; `train` is the rest. held_out: see `split_of_run`."""
    pictures = read_images(on, size, 3)
    if on in CATALOGUED:
        return split_of_run(pictures, held_out)
    test = np.array([part == "test" for part in pictures.parts])
    test |= not test.any()
    learned, tested = (pictures.subset(np.flatnonzero(mask)) for mask in (~test, test))
    return ImageSplit(learned, pictures.subset(()), tested)


def images(on: str, pictures: ImageDataset, size: int) -> Iterator[Image.Image]:
    """Yield the pictures in order, as they are in the source, before resizing."""
    names = {*pictures.names}
    read_picture = {item.name: item.read for item in sources.items(on, lambda problem: None) if item.name in names}
    for name in pictures.names:
        yield read_picture[name](size).image


def _nearest(
    pictures: ImageDataset, language: str, points: Tensor, texts: Tensor, columns: Mapping[str, Sequence[int]]
) -> list[tuple[Any, ...]]:
    similarity, nearest = (points @ texts.T).max(1)
    captions: Sequence[str] = pictures.captions[language]
    nearest_captions = [captions[index] for index in nearest.tolist()]
    similarity_texts = [f"{value:.3f}" for value in similarity.tolist()]
    same = [language] * len(pictures)
    cells = (
        pictures.names,
        pictures.families.tolist(),
        same,
        captions,
        nearest_captions,
        similarity_texts,
        *columns.values(),
    )
    return list(zip(*cells, strict=True))

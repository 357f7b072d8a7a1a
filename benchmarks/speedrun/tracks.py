"""The three tracks: the data, the target and the measure of each. An entry changes nothing in this file.

Axes: row, position; picture, channels, height, width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from keifu.data.catalogue import catalogue
from keifu.data.images.dataset import ImageDataset, read_images
from keifu.data.images.io import to_signed
from keifu.data.images.splits import split
from keifu.evaluation.images.distances import discrepancy
from keifu.evaluation.images.features import RandomFeatures

PLAYS = (  # of tiny Shakespeare, in its order
    "coriolanus", "richard-iii", "richard-ii", "romeo-and-juliet", "henry-vi-part-3", "a-winter-s-tale",
    "measure-for-measure", "the-taming-of-the-shrew", "the-tempest",
)  # fmt: skip
CHARACTERS = 1_115_394  # as many as tiny Shakespeare has
CONTEXT = 64  # characters that a model of the first track sees, as in nanoGPT's example for a CPU
HELD_OUT_DOCUMENTS = 20  # one of so many
EXCERPT = 1000  # characters of each held-out document that are predicted
DRAWN = 256  # pictures
TOKENS_AT_ONCE = 8192
SHA256 = {
    "characters": "92c328dfa6ebf8aa965ffa8d353a4b229dc44b9854b03926f6bd1204a8efb091",
    "english": "015b6fb687b6b4221ba43f52ef4a0e20e73cbb6d80bd9fe6ce2e0870e4ff9bf8",
    "digits": "bc42e8341ecaf9d3fd3f5082066cb25dd0a1c88480f53caec8c16a237781dc48",
}


class Predictor(NamedTuple):
    """A language model: a function from tokens [row, position] to logits, its tokenizer, and its longest row."""

    logits: Callable[[Tensor], Tensor]
    encode: Callable[[str], list[int]]
    context_length: int


Draw: TypeAlias = Callable[[range], Tensor]  # from seeds to pictures, bytes [picture, 1, 28, 28]


@dataclass(frozen=True)
class Texts:
    """Documents to learn from, and held-out ones."""

    training: list[str]
    held_out: list[str]


@dataclass(frozen=True)
class Digits:
    """Pictures to learn from, and held-out ones."""

    training: ImageDataset
    held_out: Tensor


@dataclass(frozen=True)
class Track:
    """One race: its quantity falls until the target is reached."""

    name: str
    quantity: str
    target: float
    prepare: Callable[[], Any]
    measure: Callable[[Any, Any], float]


def characters() -> Texts:
    """Return tiny Shakespeare's plays, cut to its length; the last tenth is held out."""
    names = sorted(file.stem for file in catalogue.fetch("shakespeare").glob("*.md"))
    plays = dict(zip(names, catalogue.documents("shakespeare"), strict=True))
    text = "\n\n".join(plays[name] for name in PLAYS)[:CHARACTERS]
    check("characters", text.encode())
    cut = int(0.9 * len(text))
    return Texts([text[:cut]], [text[cut:]])


def alphabet(task: Texts) -> str:
    """Return the characters of a text in order: the index of each is its token."""
    return "".join(sorted(set("".join(task.training + task.held_out))))


def english() -> Texts:
    """Return Wikipedia's summaries, recipes and presidents' addresses; of every 20 documents the last is held out."""
    documents = list(catalogue.documents("english-documents"))
    check("english", "\0".join(documents).encode())
    numbered = list(enumerate(documents, 1))
    held_out = [document[:EXCERPT] for number, document in numbered if number % HELD_OUT_DOCUMENTS == 0]
    return Texts([document for number, document in numbered if number % HELD_OUT_DOCUMENTS], held_out)


def digits() -> Digits:
    """Return 4,500 handwritten digits to learn from, and 500 held-out ones."""
    parts = split(read_images("mnist", 28, 1))
    held_out = torch.cat([part.take(slice(None)) for part in (parts.validation, parts.test)])
    check("digits", held_out.numpy().tobytes())
    return Digits(parts.train, held_out)


def check(track: str, data: bytes) -> None:
    """Stop unless the data of a track are the pinned ones."""
    found = sha256(data).hexdigest()
    if found != SHA256[track]:
        raise SystemExit(f"The data of the track {track} have the SHA-256 {found}, not {SHA256[track]}.")


def nats(predictor: Predictor, tokens: list[int]) -> float:
    """Return the negative log-likelihood of all tokens but the first, in rows of the longest length, side by side."""
    ids, length = torch.tensor(tokens), predictor.context_length
    rows = (len(ids) - 1) // length
    end, at_once = rows * length, max(1, TOKENS_AT_ONCE // length)
    given, wanted = (part.view(rows, length).split(at_once) for part in (ids[:end], ids[1 : end + 1]))
    pairs = [*zip(given, wanted, strict=True), (ids[None, end:-1], ids[None, end + 1 :])]  # the last row is shorter
    return sum(_nats(predictor.logits, *pair) for pair in pairs if pair[0].numel())


@torch.no_grad()
def _nats(logits: Callable[[Tensor], Tensor], given: Tensor, wanted: Tensor) -> float:
    return F.cross_entropy(logits(given).float().flatten(0, 1), wanted.flatten(), reduction="sum").item()


def nats_per_character(task: Texts, predictor: Predictor) -> float:
    """Return the loss on the whole held-out text, in rows of 64 characters."""
    places = {character: place for place, character in enumerate(alphabet(task))}
    tokens = [places[character] for character in task.held_out[0]]
    return nats(predictor._replace(context_length=CONTEXT), tokens) / (len(tokens) - 1)


def bits_per_byte(task: Texts, predictor: Predictor) -> float:
    """Return the loss on the held-out documents, one after the other, in bits for each byte of UTF-8."""
    tokens = [token for document in task.held_out for token in predictor.encode(document)]
    return nats(predictor, tokens) / math.log(2) / sum(len(document.encode()) for document in task.held_out)


@torch.no_grad()
def distance(task: Digits, draw: Draw) -> float:
    """Return 1000 times the squared discrepancy of 256 drawn and all held-out digits, by keifu's random features."""
    network = RandomFeatures()
    drawn, real = (network(to_signed(each.expand(-1, 3, -1, -1))) for each in (draw(range(DRAWN)), task.held_out))
    return 1000 * discrepancy(real, drawn)


TRACKS = {
    track.name: track
    for track in (
        Track("characters", "nats a character", 1.934, characters, nats_per_character),
        Track("english", "bits a byte", 1.93, english, bits_per_byte),
        Track("digits", "1000 · kernel distance", 6.0, digits, distance),
    )
}

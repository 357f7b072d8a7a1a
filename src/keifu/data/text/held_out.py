"""The held-out part of a text: passages or whole documents, spread over all of its files.

Two rules, each the same at every call:

- `spread`: from 100 documents on, if none of them is longer than half of the held-out part, one of every 1 / share
  consecutive documents is held out, chosen by the seed. Otherwise passages are held out: each document gives its share,
  in passages of at most 8,192 characters at random positions, which begin and end at the end of a line or a sentence if
  one is near. Short documents give one passage together.
- `end`: the same from 100 documents on; with fewer the last characters of the whole text are held out, as in nanoGPT.
  Runs of earlier versions and the texts of the catalogue have this rule, so that published figures stay comparable.
"""

import math
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from keifu.data.catalogue import catalogue
from keifu.data.text.documents import PLAIN, TextChunk, TextFileFormat, read_chunks

SplitRule = Literal["spread", "end"]
MANY = 100  # from this number of documents on, whole documents are held out
PASSAGE = 8192  # characters of the longest passage
LEAST = 512  # characters that a document, or several short ones together, give at least
NEAR = 256  # characters in which the end of a line or a sentence is looked for
ENDS = [re.compile(pattern) for pattern in (r"\n+", r"[.!?]\s+|[。．！？]+", r"\s+")]  # in this order


class Parted(NamedTuple):
    """Chunks with their parts; the numbers of documents and characters; and what is held out: documents, passages, the
    end, or another text."""

    pieces: Iterator[TextChunk]
    documents: int
    characters: int
    rule: str


def stored_rule(source: str | Path, split: SplitRule) -> SplitRule:
    """Return the rule for a source: `split`, but "end" for a text of the catalogue."""
    return "end" if source in catalogue.CATALOGUE else split


def split_documents(
    source: str | Path, share: float, seed: int = 0, form: TextFileFormat = PLAIN, split: SplitRule = "spread"
) -> Parted:
    """Return the documents of a source, each chunk assigned to a part of the split: 0 for training, 1 held out."""
    lengths = document_lengths(source, form)
    characters = sum(lengths)
    pieces = without_blank(read_chunks(source, form))
    if len(lengths) >= MANY and (split == "end" or max(lengths) <= share / 2 * characters):
        return Parted(_by_document(pieces, share, seed), len(lengths), characters, "documents")
    if split == "end":
        return Parted(_by_tail(pieces, int(characters * (1 - share))), len(lengths), characters, "end")
    return Parted(_by_passages(pieces, passages(lengths, share, seed)), len(lengths), characters, "passages")


def training_texts(source: str | Path, share: float, form: TextFileFormat = PLAIN) -> Iterator[str]:
    """Yield the chunks of the training part, which a tokenizer is learned from."""
    for piece in split_documents(source, share, form=form).pieces:
        if not piece.part:
            yield piece.text


def document_lengths(source: str | Path, form: TextFileFormat = PLAIN) -> list[int]:
    """Return the number of characters of each document. This runs before encoding, so that an error in the text is
    reported at once."""
    lengths, size = list[int](), 0
    for piece in without_blank(read_chunks(source, form)):
        size += len(piece.text)
        if piece.ends:
            lengths.append(size)
            size = 0
    return [*lengths, size] if size else lengths


def without_blank(pieces: Iterable[TextChunk]) -> Iterator[TextChunk]:
    """Yield the chunks without those of empty or blank documents."""
    fresh = True
    for piece in pieces:
        if not (fresh and piece.ends and not piece.text.strip()):
            yield piece
        fresh = piece.ends


def passages(lengths: Sequence[int], share: float, seed: int = 0, longest: int = PASSAGE) -> list[tuple[int, int]]:
    """Return the held-out passages of documents of these lengths, as starts and ends in all of them together.

    No passage is longer than `longest`, and no document is held out as a whole.
    """
    spans, starts, due = list[tuple[int, int]](), np.cumsum([0, *lengths]).tolist(), 0.0
    group = list[int]()  # documents that give their share together
    for number, length in enumerate(lengths):
        group.append(number)
        due += length * share
        if due < longest * LEAST / PASSAGE and number < len(lengths) - 1:
            continue
        document = max(group, key=lambda index: lengths[index])
        size, blocks = min(max(1, round(due)), lengths[document] // 2), max(1, math.ceil(due / longest))
        edges = [starts[document] + lengths[document] * block // blocks for block in range(blocks + 1)]
        for block, (first, after) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            width = size * (block + 1) // blocks - size * block // blocks
            start = first + int(np.random.default_rng([seed, document, block]).integers(after - first - width + 1))
            spans += [(start, start + width)] if width else []
        group, due = [], 0.0
    return spans


def _by_passages(pieces: Iterable[TextChunk], spans: Iterable[tuple[int, int]]) -> Iterator[TextChunk]:
    """Yield the chunks with their parts, cut near the starts and ends of the passages. A document ends at each cut."""
    cuts = deque(
        (position, part, (end - start) // 2) for start, end in spans for position, part in ((start, 1), (end, 0))
    )
    first = part = 0  # position of this chunk in the whole text, and the part of its beginning
    for piece in pieces:
        begin, size = 0, len(piece.text)
        while cuts and cuts[0][0] < first + size:
            position, next_part, reach = cuts.popleft()
            cut = max(begin, _near(piece.text, position - first, min(NEAR, reach)))
            if begin < cut < size:
                yield replace(piece, text=piece.text[begin:cut], ends=True, part=part)
                begin = cut
            elif cut == size:
                yield replace(piece, text=piece.text[begin:], part=part)
                begin = size
            part = next_part
        if begin < size:
            yield replace(piece, text=piece.text[begin:], part=part)
        first += size


def _near(text: str, position: int, reach: int) -> int:
    """Return the position after the next end of a line, a sentence or a word that is at most `reach` characters away,
    else one between two characters."""
    if position <= 0:
        return 0
    for end in ENDS:
        if match := end.search(text, position - 1, position + reach):
            return match.end()
    while position < len(text) and unicodedata.combining(text[position]):
        position += 1
    return position


def _by_document(pieces: Iterable[TextChunk], share: float, seed: int) -> Iterator[TextChunk]:
    """Yield the chunks with their parts: one of every 1 / share consecutive documents goes to validation."""
    number, first_after, held_out_number, block = 0, 0, 0, 0
    for piece in pieces:
        if number >= first_after:
            first, first_after = math.ceil(block / share), math.ceil((block + 1) / share)
            held_out_number = first + int(np.random.default_rng([seed, block]).integers(first_after - first))
            block += 1
        yield replace(piece, part=int(number == held_out_number))
        number += piece.ends


def _by_tail(pieces: Iterable[TextChunk], cut: int) -> Iterator[TextChunk]:
    """Yield the chunks with their parts: all characters from `cut` on go to validation."""
    position = 0
    for piece in pieces:
        inside = min(max(cut - position, 0), len(piece.text))
        position += len(piece.text)
        if inside:
            yield replace(piece, text=piece.text[:inside], ends=piece.ends and inside == len(piece.text), part=0)
        if inside < len(piece.text):
            yield replace(piece, text=piece.text[inside:], part=1)

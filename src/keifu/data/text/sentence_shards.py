"""Tokenized sentences on disk. Documents are split and tokenized once, then memory-mapped.

Axes: token (of all documents, concatenated), sentence, document.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from keifu.data.padding import offsets
from keifu.data.prepared_folders import prepared_folder
from keifu.data.progress import counting
from keifu.data.text import documents as sources
from keifu.data.text.documents import PLAIN, TextFileFormat, chunks
from keifu.data.text.token_shards import CHUNK, PARTS, split_settings
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError

FORMAT = 1  # increased when the same source would give other sentences
MANY = 100  # with fewer documents than this, each is split into parts
PART = 32  # sentences in such a part
SEED = 0  # for choosing held-out documents
Splitter = Callable[[str], list[str]]


@dataclass(frozen=True, eq=False)
class Sentences:
    """Tokens of all sentences. Sentence s is tokens[starts[s]:starts[s + 1]]. Document d has sentences documents[d] to
    documents[d + 1] - 1."""

    tokens: np.ndarray
    starts: np.ndarray
    documents: np.ndarray

    def take(self, indices: np.ndarray) -> "Sentences":
        """Return only these documents."""
        first, last = self.documents[indices], self.documents[indices + 1]
        sizes = np.diff(self.starts)
        spans = zip(self.starts[first], self.starts[last], strict=True)
        sentence_sizes = [sizes[a:b] for a, b in zip(first, last, strict=True)]
        tokens = [self.tokens[a:b] for a, b in spans]
        return Sentences(_join(tokens, np.int32), offsets(_join(sentence_sizes, np.int64)), offsets(last - first))


@dataclass(frozen=True, eq=False)
class SentenceShards:
    """Sentences of a source for training and held out, and the index of facts."""

    training: Sentences
    validation: Sentences
    index: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """A hexadecimal hash of the content, the tokenizer and the settings that made the ids."""
        return self.index["fingerprint"]


def prepare_sentences(
    source: str | Path, tokenizer: Tokenizer, split: Splitter, held_out: float = 0.05, form: TextFileFormat = PLAIN,
    validation: str | Path | None = None,
) -> SentenceShards:  # fmt: skip
    """Tokenize the sentences of a source (see `keifu.data.text.documents`). They are cached until the source changes.

    split: function that cuts a line into sentences; the end of a line always ends a sentence. Of every 1 / held_out
    consecutive documents one is held out, always the same. If a source has fewer than 100 documents, blocks of 32
    sentences count as documents.
    """
    split_facts = {"format": FORMAT, "seed": SEED, "split": split.__qualname__}
    settings = split_settings(source, tokenizer, held_out, form, validation, **split_facts)

    def make(folder: Path) -> dict[str, Any]:
        sentences = _encode(source, tokenizer, split, form)
        if validation is None:
            return _write(source, _two_parts(source, sentences, held_out), folder)
        return _write(source, (sentences, _encode(validation, tokenizer, split, form)), folder)

    return _open(*prepared_folder("sentences", source, settings, make))


def _encode(source: str | Path, tokenizer: Tokenizer, split: Splitter, form: TextFileFormat) -> Sentences:
    """Return the sentences of all documents, without empty sentences and documents."""
    tokens, sizes, counts, size, done = [], [], [], 0, 0
    with counting(f"Tokenising {source}, sentence by sentence", None, "characters") as advance:
        for pieces in chunks(sources.read_chunks(source, form), CHUNK):
            texts = [
                [part for line in piece.text.splitlines() if line.strip() for part in split(line)] for piece in pieces
            ]
            encoded = iter(tokenizer.encode_batch(list(chain.from_iterable(texts))))
            for piece, lines in zip(pieces, texts, strict=True):
                ids = [row for row in (next(encoded) for _ in lines) if row]
                tokens.append(np.fromiter(chain.from_iterable(ids), np.int32))
                sizes.append(np.array([len(row) for row in ids], np.int64))
                size += len(ids)
                if piece.ends and size:
                    counts.append(size)
                    size = 0
                done += len(piece.text)
            advance(done)
    if len(counts) < MANY:
        counts = [part for count in counts for part in _parts(count)]
    return Sentences(_join(tokens, np.int32), offsets(_join(sizes, np.int64)), offsets(np.array(counts)))


def _parts(count: int) -> list[int]:
    """Split a document of `count` sentences into parts of similar length. Return their lengths."""
    number = math.ceil(count / PART)
    return np.diff(count * np.arange(number + 1) // number).tolist()


def _join(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts])


def _held_out_mask(count: int, share: float) -> np.ndarray:
    """Return a mask of held-out documents: one of every 1 / share consecutive ones."""
    random, firsts = np.random.default_rng([SEED]), range(math.floor(count * share))
    blocks = [(math.ceil(block / share), math.ceil((block + 1) / share)) for block in firsts]
    return np.array([random.integers(first, after) for first, after in blocks], np.int64)


def _two_parts(source: str | Path, sentences: Sentences, share: float) -> tuple[Sentences, Sentences]:
    """Return the training part and the held-out part."""
    count = len(sentences.documents) - 1
    validation = _held_out_mask(count, share)
    if count - len(validation) < 2 or not len(validation):
        few = f"{source} has {count} documents of {PART} sentences or less: too few to hold out {share:.0%} of them"
        raise UserError(f"{few}; give more text, or hold out a larger share.")
    return sentences.take(np.setdiff1d(np.arange(count), validation)), sentences.take(validation)


def _write(source: str | Path, parts: tuple[Sentences, Sentences], folder: Path) -> dict[str, Any]:
    """Write the training and the held-out part into a new folder. Return their counts."""
    from safetensors.numpy import save_file

    facts = {}
    for part, sentences in zip(PARTS, parts, strict=True):
        if not (documents := len(sentences.documents) - 1):
            raise UserError(f"The {part} text of {source} has no sentence: give more text.")
        facts[part] = {"tokens": len(sentences.tokens), "sentences": len(sentences.starts) - 1, "documents": documents}
        arrays = {name: np.ascontiguousarray(array) for name, array in vars(sentences).items()}
        save_file(arrays, folder / f"{part}.safetensors")
    return facts


def _open(folder: Path, index: dict[str, Any]) -> SentenceShards:
    from safetensors.torch import load_file

    loaded = [load_file(folder / f"{part}.safetensors") for part in PARTS]
    training, validation = (Sentences(**{name: tensor.numpy() for name, tensor in part.items()}) for part in loaded)
    return SentenceShards(training, validation, index)

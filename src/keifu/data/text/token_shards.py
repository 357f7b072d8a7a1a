"""Token shards: text is tokenized once into files of token ids, which are then memory-mapped.

The ids of all documents are concatenated, with the tokenizer's end-of-text id between two documents. They are stored as
little-endian integers of 16 bits (32 for a larger vocabulary), with an index in JSON.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from keifu.data.prepared_folders import prepared_folder
from keifu.data.progress import counting
from keifu.data.text import documents as sources
from keifu.data.text.documents import PLAIN, TextChunk, TextFileFormat, chunks
from keifu.data.text.held_out import (
    MANY,
    Parted,
    SplitRule,
    document_lengths,
    split_documents,
    stored_rule,
    without_blank,
)
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError

FORMAT = 1  # increased when the same source would give other ids
CHUNK = 1 << 22  # characters that are encoded at once, in parallel
PARTS = "training", "validation"


@dataclass(frozen=True)
class Shards:
    """Token ids of a source: `tokens` for training and `validation`, both memory-mapped; and the index of facts."""

    tokens: np.ndarray
    validation: np.ndarray
    index: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """A hexadecimal hash of the content, the tokenizer and the settings that made the ids."""
        return self.index["fingerprint"]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the held-out text divided by its tokens, end-of-text ids included."""
        return self.index["validation"]["bytes"] / self.index["validation"]["tokens"]

    def held_out(self) -> str:
        """Return a sentence that says which part of the text is held out."""
        parts = [self.index[part] for part in PARTS]
        share = parts[1]["bytes"] / max(1, sum(part["bytes"] for part in parts))
        size = f"Held out for validation: {parts[1]['tokens']:,} tokens ({share:.1%} of the text)"
        facts = self.index.get("held_out") or {}
        if facts.get("rule") == "another text":
            return f"Held out for validation: {parts[1]['tokens']:,} tokens of another text."
        if facts.get("rule") == "passages":
            files = f" from {facts['files']} of {facts['of_files']} files" if facts["of_files"] > 1 else ""
            return f"{size}, in {facts['passages']:,} passage{'s' * (facts['passages'] != 1)}{files}."
        if sum(part["documents"] for part in parts) >= MANY:
            return f"{size}, in {parts[1]['documents']:,} whole documents spread over the text."
        return f"{size}, its end."

    def bits_per_byte(self, loss: float) -> float:
        """Convert a loss on the held-out text, in nats per token, to bits per byte, which is comparable between
        tokenizers."""
        return loss / math.log(2) / self.bytes_per_token


def prepare(
    source: str | Path, tokenizer: Tokenizer, held_out: float = 0.05, seed: int = 0, form: TextFileFormat = PLAIN,
    validation: str | Path | None = None, split: SplitRule = "spread",
) -> Shards:  # fmt: skip
    """Tokenize a source (see `keifu.data.text.documents`). The ids are cached until the source changes.

    The share `held_out` is not trained on; `split` says how it is chosen (see `keifu.data.text.held_out`). If
    `validation` names a source, it is held out instead, and all of `source` is trained on. Raises `UserError`, with
    file and line, for a fault in the text; then nothing is cached.
    """
    settings = split_settings(source, tokenizer, held_out, form, validation, format=FORMAT, seed=seed, field="text")
    rule = stored_rule(source, split)
    if validation is not None:
        parted = partial(_side_by_side, source, validation, form)
    else:
        settings |= {"split": rule} if rule == "spread" else {}  # earlier versions knew the other rule alone
        parted = partial(split_documents, source, held_out, seed, form, rule)
    return open_shards(source, settings, partial(_make, source, parted, tokenizer))


def split_settings(
    source: str | Path, tokenizer: Tokenizer, held_out: float, form: TextFileFormat, validation: str | Path | None,
    **further_settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return the settings that affect the ids of a source and their split. They name the folder in the cache.

    Raises `UserError` for a share that is not in (0, 0.5], and for a validation source with the same content as the
    training text.
    """
    if not 0 < held_out <= 0.5:
        raise UserError(f"held_out is {held_out}, but the fraction for validation must be above 0 and at most 0.5.")
    content = sources.content_hash(source, form)
    shared = {
        "content": content,
        "tokenizer": tokenizer.fingerprint,
        "held_out": held_out,
        **further_settings,
        **form.settings(),
    }
    if validation is None:
        return shared
    held_content = sources.content_hash(validation, form)
    if content == held_content:
        raise UserError(f"{validation} holds the same as {source}, which is trained on: give another for validation.")
    return shared | {"validation": held_content, "held_out": 0}


Parts = Callable[[], tuple[Iterable[str], Iterable[str]]]  # returns training and held-out documents


def prepare_parts(name: str, content: str, parts: Parts, tokenizer: Tokenizer) -> Shards:
    """Tokenize documents that are already split into a training part and a held-out part.

    name: of the text, in errors and in the cache. content: hash that changes with the documents. parts: returns both
    parts; it is called only if the ids are not cached.
    """

    def parted() -> Parted:
        chunks = [TextChunk(text, True, part) for part, texts in enumerate(parts()) for text in texts]
        return Parted(iter(chunks), len(chunks), sum(len(piece.text) for piece in chunks), "documents")

    settings = {"format": FORMAT, "content": content, "tokenizer": tokenizer.fingerprint, "parts": "given"}
    return open_shards(name, settings, partial(_make, name, parted, tokenizer))


def open_shards(source: str | Path, settings: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> Shards:
    """Return the shards that were made with these settings. If there are none, `make` writes them into a new folder."""
    folder, index = prepared_folder("tokens", source, settings, make)
    tokens, validation = (np.memmap(folder / f"{part}.bin", dtype=index["dtype"], mode="r") for part in PARTS)
    return Shards(tokens, validation, index)


def _side_by_side(source: str | Path, validation: str | Path, form: TextFileFormat) -> Parted:
    """Return the documents of one source as the training part, and those of another as the validation part."""
    lengths = [*chain.from_iterable(document_lengths(part, form) for part in (source, validation))]
    pieces = chain(
        without_blank(sources.read_chunks(source, form)),
        (replace(piece, part=1) for piece in without_blank(sources.read_chunks(validation, form))),
    )
    return Parted(pieces, len(lengths), sum(lengths), "another text")


def _make(source: str | Path, parted: Callable[[], Parted], tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write the ids of both parts into a new folder. Return facts about them."""
    pieces, count, characters, rule = parted()
    files: tuple[set[str], set[str]] = set(), set()

    def counted() -> Iterator[TextChunk]:
        for piece in pieces:
            files[piece.part].add(piece.file)
            yield piece

    id_format = format_of_ids(tokenizer)
    if id_format["separator"] is None and count > 1:
        print("This tokenizer has no end-of-text token: nothing marks where a document ends.", file=sys.stderr)
    paths = [folder / f"{part}.bin" for part in PARTS]
    with counting(f"Tokenising {source}", characters, "characters") as advance:
        part_totals = write(counted(), tokenizer, paths, lambda n_bytes, _: advance(n_bytes))
    totals = dict(zip(PARTS, part_totals, strict=True))
    if not all(part["tokens"] for part in totals.values()):
        tokens = sum(part["tokens"] for part in totals.values())
        raise UserError(
            f"{source} has {tokens} tokens: too short to hold some out for validation. Give more text (a model learns "
            "little from fewer than about 10,000 tokens), or name another text with --validation-data."
        )
    passages = totals[PARTS[1]]["documents"]
    facts = {"rule": rule, "passages": passages, "files": len(files[1]), "of_files": len(files[0] | files[1])}
    return id_format | totals | {"held_out": facts}


def format_of_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the dtype of stored ids, the id between documents (or None), and the number of ids."""
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    separator = tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id
    return {"dtype": dtype, "separator": separator, "vocab_size": tokenizer.vocab_size}


def write(
    pieces: Iterable[TextChunk], tokenizer: Tokenizer, paths: Sequence[Path], report: Callable[[int, int], None]
) -> list[dict[str, int]]:
    """Encode chunks, and write the ids of each part into its file. Return the counts of each file.

    report: receives the characters and bytes that were encoded so far.
    """
    id_format = format_of_ids(tokenizer)
    writers = [_Writer(path, id_format["dtype"], id_format["separator"]) for path in paths]
    characters = 0
    for chunk in chunks(pieces, CHUNK):
        encoded = tokenizer.encode_batch([piece.text for piece in chunk])
        for part, writer in enumerate(writers):
            writer.add(pair for pair in zip(chunk, encoded, strict=True) if pair[0].part == part)
        characters += sum(len(piece.text) for piece in chunk)
        report(characters, sum(writer.counts["bytes"] for writer in writers))
        del encoded  # free the memory before the next chunk is encoded
    for writer in writers:
        writer.file.close()
    return [writer.counts for writer in writers]


class _Writer:
    """Writer that appends the ids of one part to its file, and counts them."""

    def __init__(self, path: Path, dtype: str, separator: int | None):
        self.file = path.open("wb")
        self.dtype = dtype
        self.separator = [] if separator is None else [separator]
        self.between = False  # whether a document has ended, so that a separator comes before the next
        self.counts = {"tokens": 0, "bytes": 0, "documents": 0}

    def add(self, encoded: Iterable[tuple[TextChunk, list[int]]]) -> None:
        """Append the ids of chunks."""
        rows = []
        for piece, ids in encoded:
            rows += [self.separator, ids] if self.between else [ids]
            self.between = piece.ends
            self.counts["documents"] += piece.ends
            self.counts["bytes"] += len(piece.text.encode())
        joined = np.fromiter(chain.from_iterable(rows), dtype=self.dtype)
        self.counts["tokens"] += len(joined)
        self.file.write(joined.tobytes())

"""Text tokenized by several machines. Each tokenizes some of the files, and each file becomes one shard in a common
folder.

A file's shard is `NNNNN.bin`, ids as in `token_shards`, and `NNNNN.json`, which is written last. A complete shard is
not made again. Only a few megabytes of a file are in memory at once. The folder is then training data: its shards are
checked against their hashes and joined once in the user's cache.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keifu.data.progress import counting
from keifu.data.text import documents, token_shards
from keifu.data.text.documents import TextFileFormat
from keifu.data.text.held_out import SplitRule, passages
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.files import hash_of, remove_abandoned, replacing, sha256, write_atomic
from keifu.untrusted import read_json_object

TOKENIZER = "tokenizer"
COUNTS = "tokens", "bytes", "documents"
IndexedShards = Sequence[tuple[Path, dict[str, Any]]]  # (file of ids, its index)
BLOCK = 1 << 24  # bytes that are read at once
PASSAGE = 2048  # tokens of the longest held-out passage


def is_prepared(source: str | Path) -> bool:
    """Return whether a source is a folder of shards."""
    return (Path(source) / TOKENIZER).is_dir() and any(Path(source).glob("[0-9]*.json"))


def tokenizer_of(folder: str | Path) -> Tokenizer:
    """Load the tokenizer that the shards of a folder were made with."""
    return load_tokenizer(Path(folder) / TOKENIZER)


def prepare_files(
    source: str | Path, tokenizer: Tokenizer, folder: Path, form: TextFileFormat, rank: int = 0, of: int = 1
) -> int:
    """Tokenize every `of`-th file of a source, starting with file `rank`, each into a shard.

    Return the number of new shards. Raises `UserError` if the folder has shards of another tokenizer.
    """
    if not rank < of:
        raise UserError(f"--rank {rank} is not below --of {of}: ranks are counted from 0.")
    tokenizer_folder = folder / TOKENIZER
    for place in (folder, tokenizer_folder):
        remove_abandoned(place)
    if not tokenizer_folder.is_dir():
        temporary = folder / f".{TOKENIZER}-{rank}"
        tokenizer.save(temporary)
        try:
            temporary.rename(tokenizer_folder)
        except OSError:  # another rank has just written the file
            shutil.rmtree(temporary)
    if tokenizer_of(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder} holds shards of another tokenizer: choose another folder.")
    files = [*enumerate(documents.paths(source, form))][rank::of]
    return sum(_prepare_file(path, tokenizer, folder / f"{number:05}.bin", form) for number, path in files)


def _prepare_file(path: Path, tokenizer: Tokenizer, target: Path, form: TextFileFormat) -> bool:
    """Write the shard of a file unless it exists. Return whether it was written."""
    index = target.with_suffix(".json")
    size = path.stat().st_size
    if index.exists():
        return False
    with counting(f"Tokenising {path.name}", size, "bytes") as advance, replacing(target) as temporary:
        pieces = documents.read_chunks(path, form)
        [totals] = token_shards.write(pieces, tokenizer, [temporary], lambda _, n_bytes: advance(min(size, n_bytes)))
        content = sha256(temporary)
    facts = {"file": path.name, **_format(tokenizer), "sha256": content, **totals}
    write_atomic(index, json.dumps(facts, indent=1) + "\n")
    return True


def _format(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the facts that all shards of a tokenizer have in common."""
    return token_shards.format_of_ids(tokenizer) | {"tokenizer": tokenizer.fingerprint}


def open_prepared(folder: str | Path, held_out: float, split: SplitRule = "spread") -> token_shards.Shards:
    """Return the shards of a folder, joined once. The share `held_out` is held out: passages of each shard, or with
    `split` "end" the end of them all.

    Raises `UserError` for a shard that is incomplete, damaged or of another tokenizer.
    """
    folder = Path(folder)
    shared = _format(tokenizer_of(folder))
    shards = [(path.with_suffix(".bin"), _read_index(path, shared)) for path in sorted(folder.glob("[0-9]*.json"))]
    content = hash_of([json.dumps([index for _, index in shards], sort_keys=True)])
    settings = {"format": token_shards.FORMAT, "prepared": content, "held_out": held_out}
    settings |= {"split": split} if split == "spread" else {}  # earlier versions knew the other rule alone
    return token_shards.open_shards(folder, settings, partial(_join, shards, shared, held_out, split))


def _read_index(path: Path, shared: dict[str, Any]) -> dict[str, Any]:
    """Read a shard's index. Check its fields and the shard's length."""
    index = read_json_object(path)
    again = "remove both files, and prepare again"
    for field, value in shared.items():
        if index.get(field) != value:
            raise UserError(f"{path} gives {index.get(field)!r} for {field}, and {value!r} is needed: {again}.")
    for field in COUNTS:
        if type(count := index.get(field)) is not int or count < 0:
            raise UserError(f"{path} gives {count!r} for {field}, which must be a whole number from 0 on: {again}.")
    shard = path.with_suffix(".bin")
    if not shard.is_file() or shard.stat().st_size != index["tokens"] * np.dtype(shared["dtype"]).itemsize:
        raise UserError(f"{shard} is not as long as its index says: {again}.")
    return index


def _join(
    shards: IndexedShards, shared: dict[str, Any], held_out: float, split: SplitRule, folder: Path
) -> dict[str, Any]:
    """Copy the ids of all shards into the files of the training and the held-out part. Return facts about them."""
    width = np.dtype(shared["dtype"]).itemsize
    separator = b"" if shared["separator"] is None else np.array([shared["separator"]], shared["dtype"]).tobytes()
    sizes = [path.stat().st_size + len(separator) * (number > 0) for number, (path, _) in enumerate(shards)]
    total = sum(sizes)
    if split == "end":
        spans = [(round(total // width * (1 - held_out)), total // width)]
    else:
        spans = passages([size // width for size in sizes], held_out, longest=PASSAGE)
    cuts = [
        *(position * width for span in spans for position in span),
        total,
    ]  # where training and validation alternate
    paths = [folder / f"{part}.bin" for part in token_shards.PARTS]
    position, part = 0, 0
    with paths[0].open("wb") as training, paths[1].open("wb") as validation:
        files = training, validation
        for block in _checked_blocks(shards, separator):
            begin, after = 0, position + len(block)
            while cuts[part] < after:
                cut = cuts[part] - position
                files[part % 2].write(block[begin:cut])
                begin, part = cut, part + 1
            files[part % 2].write(block[begin:])
            position = after
    text = sum(index["bytes"] for _, index in shards)
    size_of = {path.stem: path.stat().st_size for path in paths}
    of_files = {"files": len(shards), "of_files": len(shards)}
    facts = {"rule": "passages" if split == "spread" else "end", "passages": len(spans), **of_files}
    return (
        shared
        | {"held_out": facts}
        | {
            part: {"tokens": size // width, "bytes": round(text * size / max(total, 1)), "documents": 0}
            for part, size in size_of.items()
        }
    )


def _checked_blocks(shards: IndexedShards, separator: bytes) -> Iterator[bytes]:
    """Yield the ids of all shards with a separator between two. Raises `UserError` for a shard with a wrong hash."""
    for number, (path, index) in enumerate(shards):
        if number:
            yield separator
        digest = hashlib.sha256()
        with path.open("rb") as shard:
            while block := shard.read(BLOCK):
                digest.update(block)
                yield block
        if digest.hexdigest() != index.get("sha256"):
            raise UserError(f"{path} has another hash than its index says: remove both files, and prepare again.")

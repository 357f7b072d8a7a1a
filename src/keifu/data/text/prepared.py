"""Text that several machines tokenize, each some of its files: one shard a file, in one folder.

A file's shard is `NNNNN.bin`, ids as in `token_shards`, and `NNNNN.json`, which is written last: a complete shard is
not made again. Only some megabytes of a file are in memory at once. The folder is then data to train on. Its shards are
checked against their hashes and joined once into the user's cache.
"""

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keifu.data.progress import counting
from keifu.data.text import documents, token_shards
from keifu.data.text.documents import TextFormat
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.files import read_json_object, replacing, sha256, write_atomic

TOKENIZER = "tokenizer"
COUNTS = "tokens", "bytes", "documents"
BLOCK = 1 << 24  # bytes that are read at a time


def is_prepared(source: str | Path) -> bool:
    """Return whether a source is a folder of shards."""
    return (Path(source) / TOKENIZER).is_dir() and any(Path(source).glob("[0-9]*.json"))


def tokenizer_of(folder: str | Path) -> Tokenizer:
    """Load the tokenizer that made the shards of a folder."""
    return load_tokenizer(Path(folder) / TOKENIZER)


def prepare_files(
    source: str | Path, tokenizer: Tokenizer, folder: Path, form: TextFormat, rank: int = 0, of: int = 1
) -> int:
    """Tokenize every `of`-th file of a source, from number `rank` on, each into its shard.

    Return the number of new shards. Shards of another tokenizer in the folder are a `UserError`.
    """
    if not rank < of:
        raise UserError(f"--rank {rank} is not below --of {of}: ranks are counted from 0.")
    kept = folder / TOKENIZER
    if not kept.is_dir():
        made = folder / f".{TOKENIZER}-{rank}"
        tokenizer.save(made)
        try:
            made.rename(kept)
        except OSError:  # another rank was first
            shutil.rmtree(made)
    if tokenizer_of(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder} holds shards of another tokenizer: choose another folder.")
    files = [*enumerate(documents.paths(source, form))][rank::of]
    return sum(_prepare_file(path, tokenizer, folder / f"{number:05}.bin", form) for number, path in files)


def _prepare_file(path: Path, tokenizer: Tokenizer, target: Path, form: TextFormat) -> bool:
    """Make the shard of a file unless it exists; return whether it was made."""
    index = target.with_suffix(".json")
    size = path.stat().st_size
    if index.exists():
        return False
    with counting(f"Tokenising {path.name}", size, "bytes") as advance, replacing(target) as temporary:
        pieces = documents.read_chunks(path, form)
        [totals] = token_shards.write(pieces, tokenizer, [temporary], lambda _, written: advance(min(size, written)))
        content = sha256(temporary)
    facts = {"file": path.name, **_format(tokenizer), "sha256": content, **totals}
    write_atomic(index, json.dumps(facts, indent=1) + "\n")
    return True


def _format(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the facts that all shards of one tokenizer have in common."""
    dtype, separator = token_shards.number_format(tokenizer)
    return {
        "dtype": dtype, "separator": separator, "tokenizer": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
    }  # fmt: skip


def open_prepared(folder: str | Path, held_out: float) -> token_shards.Shards:
    """Return the shards of a folder, joined once; the last part of the last ones is held out.

    A shard that is incomplete, damaged or of another tokenizer is a `UserError`.
    """
    folder = Path(folder)
    shared = _format(tokenizer_of(folder))
    indices = [(path.with_suffix(".bin"), _read_index(path, shared)) for path in sorted(folder.glob("[0-9]*.json"))]
    names = json.dumps([index for _, index in indices], sort_keys=True)
    content = hashlib.sha256(names.encode()).hexdigest()
    settings = {"format": token_shards.FORMAT, "prepared": content, "held_out": held_out}
    return token_shards.find_made(folder, settings, partial(_join, indices, shared, held_out))


def _read_index(path: Path, shared: dict[str, Any]) -> dict[str, Any]:
    """Read the index of a shard and check its fields and the length of the shard."""
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
    indices: list[tuple[Path, dict[str, Any]]], shared: dict[str, Any], held_out: float, target: Path,
    facts: dict[str, Any],
) -> None:  # fmt: skip
    """Check the ids of all shards and copy them into the files of both parts."""
    separator = shared["separator"]
    between = b"" if separator is None else np.array([separator], shared["dtype"]).tobytes()
    width = np.dtype(shared["dtype"]).itemsize
    text = sum(index["bytes"] for _, index in indices)
    total = sum(path.stat().st_size for path, _ in indices) + len(between) * (len(indices) - 1)
    left = round(total // width * (1 - held_out)) * width
    target.mkdir()
    with (target / "training.bin").open("wb") as training, (target / "validation.bin").open("wb") as validation:
        for number, (path, index) in enumerate(indices):
            digest = hashlib.sha256()
            with path.open("rb") as shard:
                while block := shard.read(BLOCK):
                    digest.update(block)
                    training.write(block[:left])
                    validation.write(block[left:])
                    left = max(0, left - len(block))
            if digest.hexdigest() != index.get("sha256"):
                raise UserError(f"{path} has another hash than its index says: remove both files, and prepare again.")
            after = between if number + 1 < len(indices) else b""
            (training if left else validation).write(after)
            left = max(0, left - len(after))
    parts = {}
    for part in token_shards.PARTS:
        tokens = (target / f"{part}.bin").stat().st_size // width
        parts[part] = {"tokens": tokens, "bytes": round(text * tokens * width / max(total, 1)), "documents": 0}
    index = {**facts, "dtype": shared["dtype"], "vocab_size": shared["vocab_size"], "separator": separator, **parts}
    (target / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

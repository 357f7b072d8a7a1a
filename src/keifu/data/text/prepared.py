"""Text that several machines tokenize, each some of its files: shards with an index each, in one folder.

A file's shard is `NNNNN.bin`, ids as in `token_shards`, and `NNNNN.json`, which is written last: what is complete is
not made again. Nothing but some megabytes of a file is held in memory. The folder is then data to train on, for which
its shards are joined once into the user's cache.
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
from keifu.files import read_json_object, replacing, write_atomic

TOKENIZER = "tokenizer"


def is_prepared(source: str | Path) -> bool:
    """Whether a source is a folder of shards."""
    return (Path(source) / TOKENIZER).is_dir() and any(Path(source).glob("[0-9]*.json"))


def tokenizer_of(folder: str | Path) -> Tokenizer:
    """The tokenizer that made the shards of a folder."""
    return load_tokenizer(Path(folder) / TOKENIZER)


def prepare_files(
    source: str | Path, tokenizer: Tokenizer, folder: Path, form: TextFormat, rank: int = 0, of: int = 1
) -> int:
    """Tokenizes every `of`-th file of a source from number `rank` on, each into its shard; gives how many were not
    there yet. Shards of another tokenizer are a `UserError`."""
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
    """Whether the shard of a file was made; not where it stands already."""
    index, size = target.with_suffix(".json"), path.stat().st_size
    if index.exists():
        return False
    dtype, separator = token_shards.number_format(tokenizer)
    with counting(f"Tokenising {path.name}", size, "bytes") as advance, replacing(target) as temporary:
        pieces = documents.read_chunks(path, form)
        [totals] = token_shards.write(pieces, tokenizer, [temporary], lambda _, written: advance(min(size, written)))
    facts = {"file": path.name, "dtype": dtype, "separator": separator, "tokenizer": tokenizer.fingerprint}
    write_atomic(index, json.dumps({**facts, **totals}, indent=1) + "\n")
    return True


def open_prepared(folder: str | Path, held_out: float) -> token_shards.Shards:
    """The shards of a folder, joined once; the last part of the last ones is held out. A shard that is not complete is
    a `UserError`."""
    folder = Path(folder)
    indices = [(path.with_suffix(".bin"), read_json_object(path)) for path in sorted(folder.glob("[0-9]*.json"))]
    for path, index in indices:
        if not path.is_file() or path.stat().st_size != index["tokens"] * np.dtype(index["dtype"]).itemsize:
            raise UserError(f"{path} is not as long as its index says: remove both files, and prepare again.")
    names = json.dumps([index for _, index in indices], sort_keys=True)
    content = hashlib.sha256(names.encode()).hexdigest()
    settings = {"format": token_shards.FORMAT, "prepared": content, "held_out": held_out}
    return token_shards.find_made(folder, settings, partial(_join, folder, indices, held_out))


def _join(
    folder: Path, indices: list[tuple[Path, dict[str, Any]]], held_out: float, target: Path, facts: dict[str, Any]
) -> None:
    """Copies the ids of all shards into the files of both parts."""
    first = indices[0][1]
    between = b"" if first["separator"] is None else np.array([first["separator"]], first["dtype"]).tobytes()
    width, text = np.dtype(first["dtype"]).itemsize, sum(index["bytes"] for _, index in indices)
    total = sum(path.stat().st_size for path, _ in indices) + len(between) * (len(indices) - 1)
    left = round(total // width * (1 - held_out)) * width
    target.mkdir()
    with (target / "training.bin").open("wb") as training, (target / "validation.bin").open("wb") as validation:
        for number, (path, _) in enumerate(indices):
            with path.open("rb") as shard:
                while block := shard.read(1 << 24):
                    training.write(block[:left])
                    validation.write(block[left:])
                    left = max(0, left - len(block))
            after = between if number + 1 < len(indices) else b""
            (training if left else validation).write(after)
            left = max(0, left - len(after))
    parts = {}
    for part in token_shards.PARTS:
        tokens = (target / f"{part}.bin").stat().st_size // width
        parts[part] = {"tokens": tokens, "bytes": round(text * tokens * width / total), "documents": 0}
    size = tokenizer_of(folder).vocab_size
    index = {**facts, "dtype": first["dtype"], "vocab_size": size, "separator": first["separator"], **parts}
    write_atomic(target / "index.json", json.dumps(index, indent=2) + "\n")

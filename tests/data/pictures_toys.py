"""Tiny pictures for the tests of picture sets: one colour each, in folders, tables and shards; knows no test."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

COLOURS = "red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "pink"


def picture(colour: str, size: tuple[int, int] = (6, 6)) -> bytes:
    """Return the bytes of a PNG file."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def folder(root: Path, content: Mapping[str, bytes | str]) -> Path:
    """Write these files to a folder and return it."""
    for name, data in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def imagefolder(root: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write Hugging Face's: metadata.jsonl with these rows, and a picture for each in the colour of its place."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    named = {str(row["file_name"]): picture(colour) for row, colour in zip(rows, COLOURS, strict=False)}
    return folder(root, {"metadata.jsonl": lines, **named})


def shard(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """Write a tar archive with these members in this order, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            content = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path

"""Sources of images with captions and labels, read one by one: the catalogue, folders, and WebDataset shards.

A source is one of:
- the name of a catalogue entry;
- a folder with metadata.jsonl or metadata.csv (Hugging Face's imagefolder), with columns `file_name` and optionally
  `text` or `caption` (`text_ja`, `caption_ja`, ... for further languages) and `label`;
- a folder with a subfolder for each class, or only with images;
- WebDataset shards: a .tar file, a folder of them or a pattern such as "shards/*.tar". Files with the same name up to
  the first dot belong together: 000.png with 000.txt (a caption), 000.cls (a label), 000.json (both).

Folders called train, validation and test at the top level define the split.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

from keifu.data.images.catalogued import CATALOGUED
from keifu.data.images.io import UNSTATED, ImageItem, read_image
from keifu.data.records import Problem, read_records
from keifu.errors import UserError, unknown
from keifu.folders import matching
from keifu.untrusted import parse_json, plain_file, reading

SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"
LARGEST_MEMBER = 2**28  # maximal bytes of one file in an archive
METADATA = "metadata.jsonl", "metadata.csv"
PARTS = {
    "train": "", "training": "", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
LANGUAGE = re.compile(r"(?:text|caption)(?:_([a-z]{2}))?")


def items(source: str | Path, problem: Problem) -> Iterator[ImageItem]:
    """Yield all pictures of a source in a fixed order, unread.

    `problem` is called with a sentence for each picture that lacks a caption or label that the first one has, for a
    file that a table names and that is missing, and for a file that no table names. If it returns, that picture is left
    out.
    """
    first: ImageItem | None = None
    for item in _all(source, problem):
        first = first or item
        if lacking := _lacking(item, first):
            problem(f"{item.where} has no {lacking}, and {first.where} has one.")
        else:
            yield item


def files(source: str | Path) -> list[Path]:
    """List the files of a source that is not in the catalogue, in order. Raises `UserError` if there are none."""
    path, matches = Path(source).expanduser(), matching(source)
    if path.is_file() and path.suffix.lower() != ".tar":
        raise UserError(f"{path} is one file, and pictures come in a folder or in .tar shards: name its folder.")
    if path.is_dir() or path.is_file():
        return matches
    if shards := [file for file in matches if file.name.endswith(".tar")]:
        return shards
    nearby = [str(path.with_name(file.name)) for file in path.parent.glob("[!.]*")] if path.parent.is_dir() else []
    raise unknown("folder of pictures, .tar shard or catalogue entry", str(source), [*CATALOGUED, *nearby])


def _all(source: str | Path, problem: Problem) -> Iterator[ImageItem]:
    if source in CATALOGUED:
        return CATALOGUED[str(source)]()
    paths = files(source)
    root = Path(source).expanduser()
    shards = [path for path in paths if path.suffix.lower() == ".tar"]
    pictures = [path for path in paths if path.suffix.lower() in SUFFIXES]
    tables = [path for path in paths if path.name in METADATA]
    if shards:
        return _shards(shards, root, problem)
    if not pictures and not tables:
        endings = sorted({path.suffix or path.name for path in paths})[:8]
        holds = f"holds {', '.join(endings)}" if endings else "is empty"
        raise UserError(f"There is no picture in {source}: it {holds}; pictures end in {', '.join(SUFFIXES)}.")
    return _from_tables(root, tables, pictures, problem) if tables else _by_folder(root, pictures)


def _lacking(item: ImageItem, first: ImageItem) -> str:
    """Return the name of a caption or label that the first picture has and this one lacks; "" if it lacks none."""
    for language in first.captions:
        if not item.captions.get(language):
            return "caption" if language == UNSTATED else f"caption in {language!r}"
    return "label" if first.label and not item.label else ""


def _from_tables(root: Path, tables: list[Path], pictures: list[Path], problem: Problem) -> Iterator[ImageItem]:
    """Yield the pictures that the tables name. Pictures outside `root`, or that no table names, are reported by
    `problem`."""
    named_paths = set()
    for table in tables:
        for where, cells in read_records(table):
            if not isinstance(name := cells.get("file_name"), str):
                raise UserError(f"{where}, has no file_name: it names the picture, in the folder of {table.name}.")
            relative = Path(os.path.relpath(table.parent / name, root))
            if relative.parts[:1] == ("..",):
                problem(f"{where}: file_name {name!r} leaves the folder {root}; name a picture inside it.")
                continue
            path = root / relative
            named_paths.add(path)
            if path.is_file():
                yield _item(path, root, _captions(cells), _text(cells.get("label")))
            else:
                problem(f"{where}: there is no picture {path}.")
    for path in pictures:
        if path not in named_paths:
            problem(f"{path} has no caption: no {tables[0].name} names it.")


def _by_folder(root: Path, pictures: list[Path]) -> Iterator[ImageItem]:
    """Yield pictures with their folder's name as label, if all are in folders for classes; else without labels."""
    inner = [_inside(path, root) for path in pictures]
    classes = all(len(parts) > 1 for parts in inner)
    for path, parts in zip(pictures, inner, strict=True):
        yield _item(path, root, {}, parts[0] if classes else None)


def _item(path: Path, root: Path, captions: dict[str, str], label: str | None) -> ImageItem:
    name, part = _name_and_part(path, root)
    return ImageItem(name, str(path), lambda size: read_image(path), captions, label, part=part)


def _name_and_part(path: Path, root: Path) -> tuple[str, str]:
    """Return a file's name in its set, and its part of the split by its top folder."""
    relative = path.relative_to(root) if path.is_relative_to(root) else path
    return relative.as_posix(), PARTS.get(relative.parts[0].lower(), "") if len(relative.parts) > 1 else ""


def _inside(path: Path, root: Path) -> tuple[str, ...]:
    """Return the components of a path below the folders that define the split."""
    parts = path.relative_to(root).parts
    return parts[1:] if len(parts) > 1 and parts[0].lower() in PARTS else parts


def _shards(paths: list[Path], root: Path, problem: Problem) -> Iterator[ImageItem]:
    for path in paths:
        name, part = _name_and_part(path, root if root.is_dir() else path.parent)
        with reading(path), tarfile.open(plain_file(path)) as archive:
            plain = (member for member in archive if member.isfile() and PurePosixPath(member.name).name)
            for key, members in groupby(plain, lambda member: _key(member.name)[0]):
                contents = {_key(member.name)[1]: _content(archive, member) for member in members}
                if item := _sample(f"{name}/{key}", f"{path}, {key}", contents, part, problem):
                    yield item


def _key(name: str) -> tuple[str, str]:
    """Split a file name into the key of its sample and the extension: "a/000.png" into "a/000" and ".png"."""
    path = PurePosixPath(name)
    stem, dot, ending = path.name.partition(".")
    return str(path.with_name(stem or path.name)), (dot + ending).lower()


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > LARGEST_MEMBER or member.issparse():
        what = f"{member.name} with {member.size:,} bytes"
        raise UserError(f"{archive.name} holds {what}, and at most {LARGEST_MEMBER:,} are read of one file.")
    opened = archive.extractfile(member)
    assert opened
    return opened.read()


def _sample(name: str, where: str, contents: dict[str, bytes], part: str, problem: Problem) -> ImageItem | None:
    """Return the picture among the files of a sample, with caption and label from its other files."""
    pictures = [data for suffix, data in contents.items() if suffix.endswith(SUFFIXES)]
    if len(pictures) != 1:
        problem(f"{where} has {len(pictures)} pictures among {', '.join(contents)}, and one is needed.")
        return None
    try:
        cells = parse_json(contents.get(".json", b"{}"), "its .json")
        words = {suffix: contents[suffix].decode().strip() for suffix in (".txt", ".cls") if suffix in contents}
    except ValueError as error:
        problem(f"{where}: its .json, .txt or .cls cannot be read: {error}.")
        return None
    captions = _captions(cells if isinstance(cells, dict) else {})
    captions |= {UNSTATED: words[".txt"]} if ".txt" in words else {}
    label = words.get(".cls") or _text(cells.get("label") if isinstance(cells, dict) else None)
    return ImageItem(name, where, lambda size: read_image(pictures[0], where), captions, label, part=part)


def _captions(cells: dict[str, Any]) -> dict[str, str]:
    """Return the captions in a record, by language."""
    captions = {}
    for column, value in cells.items():
        if (match := LANGUAGE.fullmatch(column)) and (text := _text(value)):
            captions[match[1] or UNSTATED] = text
    return captions


def _text(value: Any) -> str | None:
    """Return a cell as text without spaces at its ends; None if it is empty."""
    return None if value is None else str(value).strip() or None

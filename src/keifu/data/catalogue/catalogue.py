"""The catalogue of data sets and weights: one table of pinned archives, and functions that fetch and read its entries.

Each entry has a name, a source, a licence and the authors to credit. `fetch` downloads one into the user's cache;
`documents`, `pairs` and `conversations` read the entries that are text. `cached` and `remove` look after the user's
cache of downloads and prepared data; files that keifu did not put there stay.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from keifu.data.catalogue import download, readers
from keifu.data.catalogue.entry import CATALOGUE, MODELS, Entry
from keifu.data.catalogue.readers import Dialogue
from keifu.errors import UserError, unknown
from keifu.files import cache

__all__ = ["CATALOGUE", "MODELS", "Entry", "cache", "conversations", "documents", "fetch", "identity", "pairs", "rows"]
MADE = {  # folders of what is made of data, by name
    "tokenizers": "learned tokenizers", "tokens": "texts as ids", "sentences": "sentences as ids",
    "pictures": "pictures at one size",
}  # fmt: skip
FETCHED = re.compile(r".+-[0-9a-f]{8}")  # see Archive.folder


def entry(name: str, among: Mapping[str, Entry] = CATALOGUE) -> Entry:
    """The entry of that name; an unknown name is a `UserError` with the nearest one."""
    if name not in among:
        raise unknown("catalogue entry", name, among)
    return among[name]


def names(gives: str = "text") -> list[str]:
    """Of the entries that give documents, pairs or conversations; text: any of these."""
    return [name for name, each in CATALOGUE.items() if each.gives and gives in ("text", each.gives)]


def fetch(name: str, among: Mapping[str, Entry] = CATALOGUE) -> Path:
    """The file or folder of an entry, downloaded into the cache if it is not there; for a mixture, the cache itself."""
    found = entry(name, among)
    if found.parts:
        for part in found.parts:
            fetch(part)
        return cache()
    if found.package:
        return _folder(found.package) / found.member
    return download.fetch(found.archive) / found.member if found.archive else Path(found.place)


def is_cached(name: str, among: Mapping[str, Entry] = CATALOGUE) -> bool:
    """Whether an entry, with all its parts, is in the cache already, or installed."""
    found = entry(name, among)
    if found.package:
        return find_spec(found.package) is not None and (_folder(found.package) / found.member).exists()
    return all(map(is_cached, found.parts)) and (not found.archive or (cache() / found.archive.folder).is_dir())


def _folder(package: str) -> Path:
    """Where an installed package's files are; one that is not installed is a `UserError` that says how to get it."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        how = "pip install ./pretrained, in keifu's checkout"
        raise UserError(f"The package {package.replace('_', '-')} has it, and is not installed: {how}.")
    return Path(found.submodule_search_locations[0])


def documents(name: str) -> Iterator[str]:
    """The documents of a text entry, in a fixed order.

    A pair is a document of two lines; of a conversation each turn begins a line, after its speaker's name, A or B.
    """
    found = entry(name)
    if found.parts:
        yield from chain.from_iterable(map(documents, found.parts))
        return
    as_text = {"documents": str, "pairs": "\n".join, "conversations": readers.as_document}
    if found.gives not in as_text:
        raise _other(name, "text")
    yield from map(as_text[found.gives], _read(name))


def pairs(name: str) -> Iterator[tuple[str, str]]:
    """The sentences of a parallel text with their translations, in a fixed order."""
    return _only("pairs", name)


def conversations(name: str) -> Iterator[Dialogue]:
    """The conversations of a chat entry, in a fixed order, each a list of messages for a chat template."""
    return _only("conversations", name)


def identity(name: str) -> str:
    """What determines an entry's content: the hashes of its archives, or the version of the running Python."""
    import platform

    found = entry(name)
    own = found.archive.sha256 if found.archive else platform.python_version()
    return "+".join(map(identity, found.parts)) if found.parts else f"{name}:{own}"


def rows() -> list[dict[str, str]]:
    """The catalogue as a table: each entry's description, download size, licence, and whether it is in the cache."""
    data = {name: each for name, each in CATALOGUE.items() if each.kind != "weights"}
    return [_row(name, among) for among in (MODELS, data) for name in among]


def _row(name: str, among: Mapping[str, Entry]) -> dict[str, str]:
    found = among[name]
    needed = {part.archive for part in (found, *map(entry, found.parts)) if part.archive}
    size = f"{sum(archive.size for archive in needed) / 1e6:.1f} MB" if needed else "0"
    return {
        "name": name, "kind": found.kind, "download": size, "about": found.about, "licence": found.licence,
        "attribution": found.attribution, "fetched": "yes" if is_cached(name, among) else "no",
    }  # fmt: skip


def _only(gives: str, name: str) -> Iterator[Any]:
    if entry(name).gives != gives:
        raise _other(name, gives)
    return _read(name)


def _read(name: str) -> Iterator[Any]:
    reader = entry(name).reader
    assert reader
    return reader(fetch(name))


def _other(name: str, wanted: str) -> UserError:
    return UserError(f"The catalogue's {name!r} does not hold {wanted}; these do: {', '.join(names(wanted))}.")


@dataclass(frozen=True)
class Cached:
    """A folder of the cache: its name, what it holds, and its size in bytes."""

    names: tuple[str, ...]
    about: str
    folder: Path
    size: int


def cached() -> list[Cached]:
    """All of keifu's folders in the cache, the largest first."""
    place, found = cache(), []
    if not place.is_dir():
        return []
    of_folder: dict[str, list[str]] = {}
    for name, entry in CATALOGUE.items():
        if entry.archive:
            of_folder.setdefault(entry.archive.folder, []).append(name)
    for folder in sorted(each for each in place.iterdir() if each.is_dir() and not each.name.startswith(".")):
        names = of_folder.get(folder.name, [])
        if names or folder.name in MADE or FETCHED.fullmatch(folder.name):
            about = "fetched" if names else MADE.get(folder.name, "fetched by another version of keifu")
            size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
            found.append(Cached(tuple(names) or (folder.name,), about, folder, size))
    return sorted(found, key=lambda each: -each.size)


def of_name(name: str | None) -> list[Cached]:
    """The folders that a name means: a catalogue entry with its parts, a folder of the cache; for None, all of them."""
    found = cached()
    if name is None:
        return found
    wanted = {name, *(CATALOGUE[name].parts if name in CATALOGUE else ())}
    chosen = [each for each in found if wanted & {*each.names, each.folder.name}]
    if not chosen and name in CATALOGUE:
        raise UserError(f"{name} is not in the cache: there is nothing to remove.")
    if not chosen:
        raise unknown("entry of the cache", name, [n for each in found for n in each.names])
    return chosen


def remove(entries: list[Cached]) -> None:
    """Removes these folders."""
    for each in entries:
        shutil.rmtree(each.folder)

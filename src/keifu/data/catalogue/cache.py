"""The user's cache of downloads and prepared data: sizes and removal. Files that keifu did not put there stay."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from keifu.data.catalogue.catalogue import CATALOGUE
from keifu.errors import UserError, unknown
from keifu.files import cache

MADE = {  # folders of what is made of data, by name
    "tokenizers": "learned tokenizers", "tokens": "texts as ids", "sentences": "sentences as ids",
    "pictures": "pictures at one size",
}  # fmt: skip
FETCHED = re.compile(r".+-[0-9a-f]{8}")  # see Archive.folder


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
            found.append(Cached(tuple(names) or (folder.name,), about, folder, _size(folder)))
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


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())

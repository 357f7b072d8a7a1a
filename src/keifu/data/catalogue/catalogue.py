"""Catalogue of data sets and weights: a table of pinned archives, and functions that download and read its entries.

Each entry has a name, a source, a licence and authors to credit. `fetch` downloads it into the user's cache.
`documents`, `pairs` and `conversations` read text entries. `cached` and `remove` list and clear the cache of downloads
and prepared data; files of other programs are not touched.
"""

import re
import shutil
import sysconfig
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from keifu.data.catalogue import archives, readers
from keifu.data.catalogue.archives import Archive
from keifu.data.catalogue.readers import Conversation
from keifu.errors import UserError, require_known, unknown
from keifu.folders import cache

MADE = {  # folders with data derived from other data, by name
    "tokenizers": "learned tokenizers", "tokens": "texts as ids", "sentences": "sentences as ids",
    "pictures": "pictures at one size",
}  # fmt: skip
CLONE = Path(__file__).parents[4]  # of keifu's repository, if keifu runs from one
HUB: dict[str, str] = {}  # revision of each hub id that this process has read
FETCHED = re.compile(r".+-[0-9a-f]{8}")  # see Archive.folder
AS_TEXT = {"documents": str, "pairs": "\n".join, "conversations": readers.as_document}  # converts items to text


@dataclass(frozen=True)
class Entry:
    """Entry of the catalogue. member: its path inside the archive's folder; "." is the whole folder.

    `reader` converts that path into documents, pairs or conversations, as `gives` says. Instead of an archive an entry
    may have `parts` (a mixture: names of other entries), `package` (an installed Python package with the member), or
    `place` (a path that exists on every machine). generation_config: recommended sampling settings of weights without
    such a file. captions: of pictures, by file name.
    """

    kind: str
    about: str
    licence: str
    attribution: str
    archive: Archive | None = None
    member: str = "."
    gives: str = ""
    reader: Callable[[Path], Iterator[Any]] | None = None
    parts: Sequence[str] = ()
    place: str = ""
    package: str = ""
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)


def _read_table() -> tuple[dict[str, Entry], dict[str, Entry]]:
    """Read the catalogue's table; return the models and the data."""
    table = tomllib.loads((resources.files("keifu.data.catalogue") / "catalogue.toml").read_text(encoding="utf-8"))
    pinned = table.pop("archives")
    for name, facts in pinned.items():
        pinned[name] = Archive(**{"package": name} | facts | {"members": tuple(map(tuple, facts.get("members", ())))})
    models = {name: _entry(pinned, kind="weights", **facts) for name, facts in table.pop("models").items()}
    return models, {name: _entry(pinned, **facts) for name, facts in table.items()}


def _entry(pinned: Mapping[str, Archive], **facts: Any) -> Entry:
    if "archive" in facts:
        facts["archive"] = pinned[facts["archive"]]
    if "reader" in facts:
        facts["reader"] = partial(vars(readers)[facts["reader"]], **facts.pop("options", {}))
    if "place" in facts:
        facts["place"] = sysconfig.get_paths()[facts["place"]]
    return Entry(**facts)


MODELS, DATA = _read_table()
CATALOGUE = MODELS | DATA


def entry(name: str, among: Mapping[str, Entry] = CATALOGUE) -> Entry:
    """Return the entry of that name. Raises `UserError`, with the nearest name, if it is unknown."""
    require_known("catalogue entry", name, among)
    return among[name]


def names(gives: str = "text") -> list[str]:
    """Return the names of entries that give documents, pairs or conversations. gives="text": all three."""
    return [name for name, entry in CATALOGUE.items() if entry.gives and gives in ("text", entry.gives)]


def fetch(name: str, among: Mapping[str, Entry] = CATALOGUE) -> Path:
    """Return the path of an entry; download it into the cache first if needed. For a mixture, return the cache."""
    record = entry(name, among)
    if record.parts:
        for part in record.parts:
            fetch(part)
        return cache()
    if record.package:
        return _folder(record.package) / record.member
    return archives.fetch(record.archive) / record.member if record.archive else Path(record.place)


def is_cached(name: str, among: Mapping[str, Entry] = CATALOGUE) -> bool:
    """Return whether an entry with all its parts is in the cache or installed."""
    record = entry(name, among)
    if record.package:
        return find_spec(record.package) is not None and (_folder(record.package) / record.member).exists()
    return all(map(is_cached, record.parts)) and (not record.archive or (cache() / record.archive.folder).is_dir())


def _folder(package: str) -> Path:
    """Return an installed package's folder. Raises `UserError` with the install command if it is missing."""
    module = find_spec(package)
    if module is None or not module.submodule_search_locations:
        raise UserError(f"The package {package.replace('_', '-')} has it, and is not installed: {how_to_install()}.")
    return Path(module.submodule_search_locations[0])


def how_to_install() -> str:
    """Return the command that installs the package of trained models. It uses the checkout, because keifu is on no
    package index, where somebody else could take its name."""
    return "pip install ./pretrained" + " in keifu's checkout" * (not (CLONE / "pretrained/pyproject.toml").exists())


def documents(name: str) -> Iterator[str]:
    """Yield the documents of a text entry, in a fixed order.

    A pair becomes a document of two lines. A conversation becomes one line for each turn, which begins with the
    speaker's name, A or B.
    """
    record = entry(name)
    if record.parts:
        yield from chain.from_iterable(map(documents, record.parts))
    else:
        records = _read(name, "text")  # refuses an entry without a text
        yield from map(AS_TEXT[record.gives], records)


def pairs(name: str) -> Iterator[tuple[str, str]]:
    """Return the sentence pairs (source, translation) of a parallel text, in a fixed order."""
    return _read(name, "pairs")


def conversations(name: str) -> Iterator[Conversation]:
    """Return the conversations of a chat entry, in a fixed order, as lists of messages for a chat template."""
    return _read(name, "conversations")


def identity(name: str) -> str:
    """Return a string that identifies an entry's content: the hashes of its archives, or the running Python's
    version."""
    import platform

    record = entry(name)
    content = record.archive.sha256 if record.archive else platform.python_version()
    return "+".join(map(identity, record.parts)) if record.parts else f"{name}:{content}"


def rows() -> list[dict[str, str]]:
    """Return the catalogue as a table: description, download size, licence of each entry, and whether it is in the
    cache. A name that is both a model and a data set has two rows."""
    return [_row(name, table) for table in (MODELS, DATA) for name in table]


def _row(name: str, table: Mapping[str, Entry]) -> dict[str, str]:
    record = table[name]
    archives = {part.archive for part in (record, *map(entry, record.parts)) if part.archive}
    size = f"{sum(archive.size for archive in archives) / 1e6:.1f} MB" if archives else "0"
    return {
        "name": name, "kind": record.kind, "download": size, "about": record.about, "licence": record.licence,
        "attribution": record.attribution, "fetched": "yes" if is_cached(name, table) else "no",
    }  # fmt: skip


def _read(name: str, gives: str) -> Iterator[Any]:
    """Return the output of the entry's reader. Raises `UserError` if the entry is not of the type `gives`."""
    reader = entry(name).reader
    if name not in (able := names(gives)) or reader is None:
        raise UserError(f"The catalogue's {name!r} does not hold {gives}; these do: {', '.join(able)}.")
    return reader(fetch(name))


@dataclass(frozen=True)
class Cached:
    """Folder of the cache: its name, a description of its content, and its size in bytes."""

    names: tuple[str, ...]
    about: str
    folder: Path
    size: int


def cached() -> list[Cached]:
    """List keifu's folders in the cache, the largest first."""
    folders = []
    for folder in sorted(path for path in cache().glob("[!.]*") if path.is_dir()):
        names = [n for n, record in CATALOGUE.items() if record.archive and record.archive.folder == folder.name]
        if names or folder.name in MADE or FETCHED.fullmatch(folder.name):
            about = "fetched" if names else MADE.get(folder.name, "fetched by another version of keifu")
            size = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
            folders.append(Cached(tuple(names) or (folder.name,), about, folder, size))
    return sorted(folders, key=lambda folder: -folder.size)


def of_name(name: str | None) -> list[Cached]:
    """Return the cache folders that a name selects: those of a catalogue entry with its parts, or one folder. None:
    all."""
    folders = cached()
    if name is None:
        return folders
    names = {name, *(CATALOGUE[name].parts if name in CATALOGUE else ())}
    matching = [folder for folder in folders if names & {*folder.names, folder.folder.name}]
    if not matching and name in CATALOGUE:
        raise UserError(f"{name} is not in the cache: there is nothing to remove.")
    if not matching:
        raise unknown("entry of the cache", name, [n for folder in folders for n in folder.names])
    return matching


def remove(folders: list[Cached]) -> None:
    """Remove these folders."""
    for folder in folders:
        shutil.rmtree(folder.folder)

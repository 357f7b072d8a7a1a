"""The entries of the catalogue, read from catalogue.toml: archive, licence, credit and reader of each."""

import sysconfig
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from keifu.data.catalogue import readers
from keifu.data.catalogue.download import Archive


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue; `member` is its path inside the archive's folder, "." for all of it.

    `reader` turns that path into what `gives` says: documents, pairs or conversations. A mixture has `parts`, the names
    of other entries, in place of an archive; `package` is an installed Python package that holds the member; an entry
    with none of these is on every machine at `place`. For weights, `generation_config` has the recommended settings of
    text generation, where the file itself has none. Of pictures, `captions` go by the names of their files.
    """

    kind: str
    about: str
    licence: str
    attribution: str
    archive: Archive | None = None
    member: str = "."
    gives: str = ""
    reader: Callable[[Path], Iterator[Any]] | None = None
    parts: tuple[str, ...] = ()
    place: str = ""
    package: str = ""
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    captions: Mapping[str, str] = field(default_factory=dict)


def _read_table() -> tuple[dict[str, Entry], dict[str, Entry]]:
    """The models, and the data."""
    table = tomllib.loads((resources.files("keifu.data.catalogue") / "catalogue.toml").read_text(encoding="utf-8"))
    archives = table.pop("archives")
    for name, facts in archives.items():
        archives[name] = Archive(name, **facts | {"members": tuple(map(tuple, facts.get("members", ())))})
    models = {name: _entry(archives, kind="weights", **facts) for name, facts in table.pop("models").items()}
    return models, {name: _entry(archives, **facts) for name, facts in table.items()}


def _entry(
    archives: Mapping[str, Archive], archive: str = "", reader: str = "", options: Mapping[str, str] | None = None,
    parts: Sequence[str] = (), place: str = "", **facts: Any,
) -> Entry:  # fmt: skip
    return Entry(
        **facts,
        archive=archives[archive] if archive else None,
        reader=partial(vars(readers)[reader], **(options or {})) if reader else None,
        parts=tuple(parts),
        place=sysconfig.get_paths()[place] if place else "",
    )


MODELS, _DATA = _read_table()
CATALOGUE = MODELS | _DATA

"""The record of one catalogue entry: archive, licence, credit and reader."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keifu.data.catalogue.download import Archive


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue; `member` is its path inside the archive's folder, "." for all of it.

    `reader` turns that path into what `gives` says: documents, pairs or conversations. A mixture has `parts`, the names
    of other entries, in place of an archive; `package` is an installed Python package that holds the member; an entry
    with none of these is on every machine at `place`. For weights, `generation_config` has the recommended settings of
    text generation, where the file itself has none.
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

"""Texts that have a label each, from tables of records and from the catalogue, and a held-out part of them.

It knows no model and no tokenizer.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from keifu.data import catalogue
from keifu.data.records import SUFFIXES, Row, cell, read_records
from keifu.data.splits import normalised
from keifu.errors import UserError, unknown


@dataclass(frozen=True)
class Labelled:
    """`texts` and their `labels`, one for one, and where they come from."""

    source: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def classes(self) -> tuple[str, ...]:
        """Every label once, in order; numbers by their value."""
        return sorted_labels(self.labels)

    def chosen(self, places: Iterable[int]) -> "Labelled":
        """Some of the rows."""
        places = list(places)
        return Labelled(self.source, tuple(self.texts[p] for p in places), tuple(self.labels[p] for p in places))


def sorted_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Every label once, in order; numbers by their value."""
    return tuple(sorted(set(labels), key=_by_value))


def _by_value(label: str) -> tuple[bool, int, str]:
    return not label.isdecimal(), int(label) if label.isdecimal() else 0, label


def read(source: str | Path, text: str = "text", label: str = "label") -> Labelled:
    """The table in a file of records, or a catalogue entry that has labels (see `CATALOGUED`).

    text, label: the names of the two columns. A column that is not there, a row with another number of cells, an empty
    text or label: each is a `UserError` that says where.
    """
    found = [(cell(where, cells, text), cell(where, cells, label)) for where, cells in table_rows(source)]
    texts, labels = zip(*found, strict=True)
    return Labelled(str(source), texts, labels)


def table_rows(source: str | Path) -> list[Row]:
    """The rows of such a table, with all their cells; none is a `UserError`."""
    path = Path(source)
    if str(source) in CATALOGUED and not path.exists():
        rows = list(CATALOGUED[str(source)]())
    elif not path.exists() and not path.suffix:
        raise unknown(f"table of texts and labels ({', '.join(SUFFIXES)})", str(source), CATALOGUED)
    else:
        rows = list(read_records(path))
    if not rows:
        raise UserError(f"{source} has no rows: it needs texts with a label each.")
    return rows


def _topics() -> Iterator[Row]:
    """Title and summary of every Wikipedia article in the catalogue, with its topic."""
    articles = json.loads(catalogue.fetch("wiki-summaries").read_text(encoding="utf-8"))
    for title, article in articles.items():
        yield f"wiki-summaries, {title!r}", {"text": f"{title}\n\n{article['extract']}", "label": article["topic"]}


CATALOGUED: dict[str, Callable[[], Iterator[Row]]] = {"wiki-summaries": _topics}


def key(text: str) -> str:
    """A number in hexadecimal for what a text says: case, spaces and punctuation aside (see `normalised`)."""
    return hashlib.sha256(normalised(text).encode()).hexdigest()


def split(table: Labelled, held_out: int) -> tuple[Labelled, Labelled]:
    """Rows to learn from, in the order of their keys, and at most `held_out` others to test on (see `parted`)."""
    training, held = parted([key(text) for text in table.texts], table.labels, held_out)
    return table.chosen(training), table.chosen(held)


def parted(keys: Sequence[str], labels: Sequence[str], held_out: int) -> tuple[list[int], list[int]]:
    """The places of rows to learn from, in the order of their keys, and of at most `held_out` others to test on.

    Which rows those are, only their keys decide: those with the smallest. Rows with the same key stay together, so that
    none is on both sides, and a label that would only be held out is learned from instead.
    """
    if not 0 <= held_out < len(keys):
        raise UserError(f"{held_out} of {len(keys)} rows cannot be held out: give a number between.")
    groups: dict[str, list[int]] = defaultdict(list)
    for place, each in enumerate(keys):
        groups[each].append(place)
    held: list[int] = []
    training: list[int] = []
    for _, places in sorted(groups.items()):
        (held if len(held) + len(places) <= held_out else training).extend(places)
    known = {labels[place] for place in training}
    alone = {keys[place] for place in held if labels[place] not in known}
    training += [place for place in held if keys[place] in alone]
    return training, [place for place in held if keys[place] not in alone]

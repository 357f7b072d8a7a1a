"""Texts that have a label each, from CSV, TSV and JSONL tables and from the catalogue, and a held-out part of them.

It knows no model and no tokenizer. The first line of a CSV or TSV file names its columns.
"""

import csv
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keifu.data import catalogue
from keifu.data.sources import lines, refuse
from keifu.data.splits import normalised
from keifu.errors import UserError, unknown

Row = tuple[str, dict[str, Any]]  # where it stands, for errors, and its cells by column
LONGEST_CELL = 2**31 - 1  # characters; csv's own limit is 131,072


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
    """The table in a .csv, .tsv or .jsonl file, or a catalogue entry that has labels (see `CATALOGUED`).

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
        raise unknown("table of texts and labels (.csv, .tsv or .jsonl)", str(source), CATALOGUED)
    elif path.suffix not in READERS:
        raise UserError(f"{path} is no table that keifu reads: its name must end in {', '.join(READERS)}.")
    else:
        rows = list(READERS[path.suffix](path))
    if not rows:
        raise UserError(f"{source} has no rows: it needs texts with a label each.")
    return rows


def cell(where: str, cells: dict[str, Any], column: str) -> str:
    """The text in a column of a row; one that is not there, empty or not text is a `UserError` with the place."""
    value = content(where, cells, column)
    if isinstance(value, dict | list):
        raise UserError(f"{where}: the column {column!r} holds a {type(value).__name__} where text is needed.")
    written = "" if value is None else str(value).strip()
    if not written:
        raise UserError(f"{where}: the column {column!r} is empty; fill it in, or leave the row out.")
    return written


def content(where: str, cells: dict[str, Any], column: str) -> Any:
    """What a column of a row holds; an unknown column is a `UserError` with the nearest one."""
    if column not in cells:
        raise unknown(f"column (in {where})", column, cells)
    return cells[column]


def _csv(path: Path) -> Iterator[Row]:
    """Cells may be quoted and span lines; the separator is the comma, semicolon or tab that the header has most of."""
    text = "".join(lines(path, refuse))
    header = text.partition("\n")[0]
    return _separated(path, text, delimiter=max(",;\t", key=header.count))


def _tsv(path: Path) -> Iterator[Row]:
    """Tabs part the cells and quotation marks mean nothing."""
    return _separated(path, "".join(lines(path, refuse)), delimiter="\t", quoting=csv.QUOTE_NONE)


def _separated(path: Path, text: str, **dialect: Any) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)
    table = csv.reader(io.StringIO(text, newline=""), strict=True, **dialect)
    header: list[str] | None = None
    try:
        for cells in table:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                continue
            where = f"{path}, line {table.line_num}"
            if len(cells) != len(header):
                raise UserError(f"{where}, has {len(cells)} cells where the first line has {len(header)}.")
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {table.line_num}, cannot be read as a table: {error}.") from error


def _jsonl(path: Path) -> Iterator[Row]:
    """An object a line."""
    for number, line in enumerate(lines(path, refuse), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            cells = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}, is not JSON: {error}.") from error
        if not isinstance(cells, dict):
            raise UserError(f"{where}, holds a {type(cells).__name__} where a JSON object is needed.")
        yield where, cells


def _topics() -> Iterator[Row]:
    """Title and summary of every Wikipedia article in the catalogue, with its topic."""
    articles = json.loads(catalogue.fetch("wiki-summaries").read_text(encoding="utf-8"))
    for title, article in articles.items():
        yield f"wiki-summaries, {title!r}", {"text": f"{title}\n\n{article['extract']}", "label": article["topic"]}


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl}
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

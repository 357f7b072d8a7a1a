"""Labelled examples from tables: texts with a label, and numeric columns with a label.

Axes: rows, dim = the columns other than the label.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.data.catalogue import catalogue
from keifu.data.classification.examples import Example, Examples
from keifu.data.records import SUFFIXES, Row, cell, read_cells, read_records
from keifu.errors import UserError, unknown


def read(source: str | Path, text: str = "text", label: str = "label", encoding: str | None = None) -> Examples:
    """Read a labelled table from a file of records, or from a catalogue entry with labels (see `CATALOGUED`).

    text, label: names of the two columns. encoding: see `text_files.lines`. Raises `UserError`, with the line, for a
    missing column, a row with another number of cells, or an empty text or label.
    """
    rows = table_rows(source, encoding)
    examples = (Example(where, (cell(where, cells, text),), cell(where, cells, label)) for where, cells in rows)
    return Examples(str(source), tuple(examples))


def table_rows(source: str | Path, encoding: str | None = None) -> list[Row]:
    """Return the rows of a table with all cells. Raises `UserError` if there are none."""
    path = Path(source)
    if str(source) in CATALOGUED and not path.exists():
        rows = list(CATALOGUED[str(source)]())
    elif not path.exists() and not path.suffix:
        raise unknown(f"table of texts and labels ({', '.join(SUFFIXES)})", str(source), CATALOGUED)
    else:
        rows = list(read_records(path, encoding=encoding))
    if not rows:
        raise UserError(f"{source} has no rows: it needs texts with a label each.")
    return rows


def _topics() -> Iterator[Row]:
    """Yield title and summary of every Wikipedia article in the catalogue, with its topic."""
    articles = json.loads(catalogue.fetch("wiki-summaries").read_text(encoding="utf-8"))
    for title, article in articles.items():
        yield f"wiki-summaries, {title!r}", {"text": f"{title}\n\n{article['extract']}", "label": article["topic"]}


CATALOGUED: dict[str, Callable[[], Iterator[Row]]] = {"wiki-summaries": _topics}


@dataclass(frozen=True)
class Table:
    """Numeric table with labels.

    inputs: float64. targets: indices into `classes`, the sorted labels. columns: names of the inputs.
    """

    inputs: Float[Tensor, "rows dim"]
    targets: Int[Tensor, "rows"]
    columns: tuple[str, ...]
    classes: tuple[str, ...]


def read_table(path: Path, label: str | None = None) -> Table:
    """Read a CSV file (commas, semicolons or tabs) whose cells are numbers, except in the label's column.

    The first line is a header if none of its cells is a number. Without a header the columns are called 1, 2, ....
    label: name of the label's column; None: the last one. A bad cell raises a `UserError` with its line and column.
    """
    lines = list(read_cells(path))
    if not lines:
        raise UserError(f"{path} is empty: it needs rows of numbers and a label.")
    header = [cell.strip() for cell in lines[0][1]]
    if all(_number(cell) is None for cell in header):
        lines = lines[1:]
    else:
        header = [str(column) for column in range(1, len(header) + 1)]
    if label is not None and label not in header:
        raise unknown(f"column in {path}", label, header)
    if label is not None and header.count(label) > 1:
        raise UserError(f"{path} has {header.count(label)} columns called {label!r}; rename all but one.")
    column = len(header) - 1 if label is None else header.index(label)
    if len(header) < 2 or not lines:
        raise UserError(f"{path} needs at least one column of numbers, one of labels, and one row below any header.")
    inputs = [_numbers(where, cells, header, column) for where, cells in lines]
    labels = [cells[column].strip() for _, cells in lines]
    classes = sorted(set(labels), key=lambda text: (_number(text) is None, _number(text) or 0.0, text))
    columns = tuple(name for i, name in enumerate(header) if i != column)
    targets = torch.tensor([classes.index(text) for text in labels])
    return Table(torch.tensor(inputs, dtype=torch.float64), targets, columns, tuple(classes))


def standardisation(inputs: Float[Tensor, "rows dim"]) -> tuple[Float[Tensor, "dim"], Float[Tensor, "dim"]]:
    """Return each column's mean and standard deviation. The deviation of a constant column is 1."""
    scale = inputs.std(0, correction=0)
    return inputs.mean(0), torch.where(scale > 0, scale, 1.0)


def _number(cell: str) -> float | None:
    """Return the number in a cell; None if it is not a finite number."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _numbers(where: str, cells: Sequence[str], header: Sequence[str], label: int) -> list[float]:
    if len(cells) != len(header):
        raise UserError(f"{where}, has {len(cells)} cells where the first line has {len(header)}.")
    values = [_number(cell) for cell in cells]
    for column, value in enumerate(values):
        if column == label and not cells[column].strip():
            raise UserError(f"{where}, column {header[column]!r}: the label is missing.")
        if column != label and value is None:
            raise UserError(f"{where}, column {header[column]!r}: {cells[column]!r} is no finite number.")
    return [value for column, value in enumerate(values) if column != label and value is not None]

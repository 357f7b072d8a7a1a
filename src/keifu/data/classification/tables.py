"""Labelled examples from tables: texts with a label, and numeric columns with a label; and toy data sets for
classifiers, each split into training and test rows: logic tables, moons, spirals, digits, CSV.

Axes: rows, dim = inputs, the columns other than the label. Generated sets have two columns of float32; targets are 0,
1, ...
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
from keifu.data.images.catalogued import mnist, stratified_sample
from keifu.data.records import SUFFIXES, Row, cell, read_cells, read_records
from keifu.errors import UserError, unknown


def read(source: str | Path, text: str = "text", label: str = "label", encoding: str | None = None) -> Examples:
    """Read a labelled table from a file of records, or from a catalogue entry with labels (see `CATALOGUED`).

    text, label: names of the two columns. encoding: see `records.lines`. Raises `UserError`, with the line, for a
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


LOGIC = {"and": (0, 0, 0, 1), "or": (0, 1, 1, 1), "xor": (0, 1, 1, 0)}  # outputs for 00, 01, 10, 11


def logic(name: str) -> tuple[Float[Tensor, "4 2"], Int[Tensor, "4"]]:
    """Return the four inputs of a logic function in `LOGIC`, and its outputs."""
    return torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor(LOGIC[name])


def moons(rows: int, noise: float = 0.15, seed: int = 0) -> tuple[Float[Tensor, "rows 2"], Int[Tensor, "rows"]]:
    """Draw two interlocking half circles of radius 1, with normal noise."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(rows) % 2
    angle = math.pi * torch.rand(rows, generator=generator)
    turned = 1 - 2 * targets
    x = torch.stack([turned * angle.cos() + targets, turned * angle.sin() + 0.5 * targets], 1)
    return x + noise * torch.randn(rows, 2, generator=generator), targets


def spirals(rows: int, noise: float = 0.04, seed: int = 0) -> tuple[Float[Tensor, "rows 2"], Int[Tensor, "rows"]]:
    """Return two spiral arms of 1.25 turns, with outer radius 1 and normal noise. Each arm is a class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(rows) % 2
    radius = 0.1 + 0.9 * torch.rand(rows, generator=generator).sqrt()
    angle = 2 * math.pi * (1.25 * radius + targets / 2)
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + noise * torch.randn(rows, 2, generator=generator), targets


TOYS = (*LOGIC, "moons", "spirals")


def toy_table(name: str, label: str | None = None, known_names: Sequence[str] = TOYS) -> Table:
    """Return the toy set of that name (moons and spirals have 400 rows), or the CSV file of that path (see
    `read_table`).

    known_names: names that the error for an unknown name lists.
    """
    if name not in TOYS:
        path = Path(name)
        if not path.exists() and path.name == path.stem == name:
            raise unknown("data set or CSV file", name, known_names)
        return read_table(path, label)
    _refuse_label(name, label)
    inputs, targets = logic(name) if name in LOGIC else moons(400) if name == "moons" else spirals(400)
    return Table(inputs.double(), targets, ("x₁", "x₂"), ("0", "1"))


NAMES = ("mnist", *TOYS)
ENOUGH = 50  # with fewer rows, none are held out


@dataclass(frozen=True, eq=False)
class LabelledTensors:
    """`inputs` [rows, dim] and `targets` [rows]."""

    inputs: Float[Tensor, "rows dim"]
    targets: Int[Tensor, "rows"]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class ToyDataset:
    """Training and held-out rows, mean and scale of each input, and the names of columns and classes.

    With too few rows to hold any out, both parts are the same rows. Pictures have no names of columns.
    """

    training: LabelledTensors
    held_out: LabelledTensors
    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]
    columns: tuple[str, ...]
    classes: tuple[str, ...]


def toy_dataset(name: str, label: str | None = None) -> ToyDataset:
    """Return the data set of that name, or a CSV file with its label column (see `read_table`). Every fifth row is held
    out if there are enough rows."""
    if name == "mnist":
        _refuse_label(name, label)
        return _digits()
    table = toy_table(name, label, known_names=NAMES)
    if len(table.classes) == 1:
        raise UserError(f"There is nothing to classify in {name}: all its rows have the label {table.classes[0]!r}.")
    rows = LabelledTensors(table.inputs.float(), table.targets)
    training = validation = rows
    if len(rows) >= ENOUGH:
        parts = stratified_sample(rows.targets, len(rows) // 5)
        training, validation = (LabelledTensors(rows.inputs[part], rows.targets[part]) for part in parts)
    return ToyDataset(training, validation, *standardisation(training.inputs), table.columns, table.classes)


def _refuse_label(name: str, label: str | None) -> None:
    if label is not None:
        raise UserError(f"--label names a column of a CSV file, and the data are {name!r}: leave it out.")


def _digits() -> ToyDataset:
    """Return the catalogue's 5,000 MNIST digits with pixels from 0 to 1; 100 of each digit are held out."""
    pictures, labels = mnist()
    inputs = pictures.flatten(1).float() / 255
    training, validation = (LabelledTensors(inputs[part], labels[part]) for part in stratified_sample(labels, 1000))
    mean, scale = (value.expand(inputs.shape[1]) for value in (training.inputs.mean(), training.inputs.std()))
    return ToyDataset(training, validation, mean, scale, (), tuple("0123456789"))

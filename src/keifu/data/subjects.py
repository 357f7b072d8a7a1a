"""What a classifier can learn: digits, toy sets and CSV files, each split into rows to learn from and rows held out.

It knows no model. Axes: rows, dim = inputs.
"""

from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from keifu.data import toy
from keifu.data.examples import Split
from keifu.data.images import mnist, stratified
from keifu.data.tables import standardisation
from keifu.errors import UserError, unknown

NAMES = ("mnist", *toy.TOYS)
ENOUGH = 50  # rows; with fewer, none is held out


@dataclass(frozen=True, eq=False)
class Subject:
    """Rows to learn from, rows held out, mean and scale of each input, and the names of columns and classes.

    Where there are too few rows to hold any out, the same ones are both. Pictures have no names of columns.
    """

    training: Split
    held: Split
    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]
    columns: tuple[str, ...]
    classes: tuple[str, ...]


def subject(name: str, label: str | None = None) -> Subject:
    """The subject of that name, or the CSV file there with its column of labels (see `read_table`)."""
    if name != "mnist":
        return _table(name, label)
    if label is not None:
        raise UserError("--label names a column of a CSV file, and the data are 'mnist': leave it out.")
    return _digits()


def _digits() -> Subject:
    """The catalogue's 5,000 MNIST digits, of which 1,000 are held out, 100 of each; pixels from 0 to 1."""
    pictures, labels = mnist()
    inputs = pictures.flatten(1).float() / 255
    training, held = (Split(inputs[part], labels[part]) for part in stratified(labels, 1000))
    mean, scale = (value.expand(inputs.shape[1]) for value in (training.inputs.mean(), training.inputs.std()))
    return Subject(training, held, mean, scale, (), tuple("0123456789"))


def _table(name: str, label: str | None) -> Subject:
    """A toy set or a CSV file, of which every fifth row is held out where there are enough."""
    if name not in NAMES and not Path(name).exists() and Path(name).stem == name:
        raise unknown("data set or CSV file", name, NAMES)
    table = toy.table(name, label)
    if len(table.classes) == 1:
        raise UserError(f"There is nothing to tell apart in {name}: all its rows have the label {table.classes[0]!r}.")
    rows = Split(table.inputs.float(), table.targets)
    training = held = rows
    if len(rows) >= ENOUGH:
        parts = stratified(rows.targets, len(rows) // 5)
        training, held = (Split(rows.inputs[part], rows.targets[part]) for part in parts)
    return Subject(training, held, *standardisation(training.inputs), table.columns, table.classes)

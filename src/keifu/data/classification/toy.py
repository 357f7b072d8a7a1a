"""Toy data sets for classifiers, each split into training and test rows: logic tables, moons, spirals, digits, CSV.

Axes: rows, dim = inputs. Generated sets have two columns of float32; targets are 0, 1, ...
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.data.classification.batches import LabelledTensors
from keifu.data.classification.tables import Table, read_table, standardisation
from keifu.data.images.catalogued import mnist, stratified_sample
from keifu.errors import UserError, unknown

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


def spirals(
    rows: int, arms: int = 2, turns: float = 1.25, noise: float = 0.04, seed: int = 0
) -> tuple[Float[Tensor, "rows 2"], Int[Tensor, "rows"]]:
    """Return spiral arms around the origin with outer radius 1 and normal noise. Each arm is a class."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(rows) % arms
    radius = 0.1 + 0.9 * torch.rand(rows, generator=generator).sqrt()
    angle = 2 * math.pi * (turns * radius + targets / arms)
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + noise * torch.randn(rows, 2, generator=generator), targets


TOYS = (*LOGIC, "moons", "spirals")


def toy_table(name: str, label: str | None = None, rows: int = 400, known: Sequence[str] = TOYS) -> Table:
    """Return the toy set of that name (moons and spirals have `rows` rows), or the CSV file of that path (see
    `read_table`).

    known: names that the error for an unknown name lists.
    """
    if name not in TOYS:
        path = Path(name)
        if not path.exists() and path.name == path.stem == name:
            raise unknown("data set or CSV file", name, known)
        return read_table(path, label)
    if label is not None:
        raise UserError(f"--label names a column of a CSV file, and the data are {name!r}: leave it out.")
    inputs, targets = logic(name) if name in LOGIC else {"moons": moons, "spirals": spirals}[name](rows)
    return Table(inputs.double(), targets, ("x₁", "x₂"), ("0", "1"))


NAMES = ("mnist", *TOYS)
ENOUGH = 50  # with fewer rows, none are held out


@dataclass(frozen=True, eq=False)
class ToyDataset:
    """Training and held-out rows, mean and scale of each input, and the names of columns and classes.

    With too few rows to hold any out, both parts are the same rows. Pictures have no names of columns.
    """

    training: LabelledTensors
    held: LabelledTensors
    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]
    columns: tuple[str, ...]
    classes: tuple[str, ...]


def toy_dataset(name: str, label: str | None = None) -> ToyDataset:
    """Return the data set of that name, or a CSV file with its label column (see `read_table`)."""
    if name != "mnist":
        return _table(name, label)
    if label is not None:
        raise UserError("--label names a column of a CSV file, and the data are 'mnist': leave it out.")
    return _digits()


def _digits() -> ToyDataset:
    """Return the catalogue's 5,000 MNIST digits with pixels from 0 to 1; 100 of each digit are held out."""
    pictures, labels = mnist()
    inputs = pictures.flatten(1).float() / 255
    training, validation = (LabelledTensors(inputs[part], labels[part]) for part in stratified_sample(labels, 1000))
    mean, scale = (value.expand(inputs.shape[1]) for value in (training.inputs.mean(), training.inputs.std()))
    return ToyDataset(training, validation, mean, scale, (), tuple("0123456789"))


def _table(name: str, label: str | None) -> ToyDataset:
    """Return a toy set or a CSV file. Every fifth row is held out if there are enough rows."""
    table = toy_table(name, label, known=NAMES)
    if len(table.classes) == 1:
        raise UserError(f"There is nothing to classify in {name}: all its rows have the label {table.classes[0]!r}.")
    rows = LabelledTensors(table.inputs.float(), table.targets)
    training = validation = rows
    if len(rows) >= ENOUGH:
        parts = stratified_sample(rows.targets, len(rows) // 5)
        training, validation = (LabelledTensors(rows.inputs[part], rows.targets[part]) for part in parts)
    return ToyDataset(training, validation, *standardisation(training.inputs), table.columns, table.classes)

"""Small data sets of two numbers a row, made on the spot: logic tables, moons, spirals; knows no model.

Axes: rows, and two columns: inputs are float32, targets 0, 1, ...
"""

import math
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.data.tables import Table, read_table
from keifu.errors import UserError, unknown

LOGIC = {"and": (0, 0, 0, 1), "or": (0, 1, 1, 1), "xor": (0, 1, 1, 0)}  # the outputs for 00, 01, 10, 11


def logic(name: str) -> tuple[Float[Tensor, "4 2"], Int[Tensor, "4"]]:
    """The four rows of a table in LOGIC."""
    return torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor(LOGIC[name])


def moons(rows: int, noise: float = 0.15, seed: int = 0) -> tuple[Float[Tensor, "rows 2"], Int[Tensor, "rows"]]:
    """Two half circles of radius 1, each with an end in the other's mouth, plus normal noise."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(rows) % 2
    angle = math.pi * torch.rand(rows, generator=generator)
    turned = 1 - 2 * targets
    x = torch.stack([turned * angle.cos() + targets, turned * angle.sin() + 0.5 * targets], 1)
    return x + noise * torch.randn(rows, 2, generator=generator), targets


def spirals(
    rows: int, arms: int = 2, turns: float = 1.25, noise: float = 0.04, seed: int = 0
) -> tuple[Float[Tensor, "rows 2"], Int[Tensor, "rows"]]:
    """Arms that wind about the origin to radius 1, each a class, plus normal noise."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(rows) % arms
    radius = 0.1 + 0.9 * torch.rand(rows, generator=generator).sqrt()
    angle = 2 * math.pi * (turns * radius + targets / arms)
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + noise * torch.randn(rows, 2, generator=generator), targets


TOYS = (*LOGIC, "moons", "spirals")


def table(name: str, label: str | None = None, rows: int = 400) -> Table:
    """The toy set of that name (moons and spirals: so many rows), or else the CSV file there (see `read_table`)."""
    if name not in TOYS:
        path = Path(name)
        if not path.exists() and path.name == path.stem == name:
            raise unknown("data set or CSV file", name, TOYS)
        return read_table(path, label)
    if label is not None:
        raise UserError(f"--label names a column of a CSV file, and the data are {name!r}: leave it out.")
    inputs, targets = logic(name) if name in LOGIC else {"moons": moons, "spirals": spirals}[name](rows)
    return Table(inputs.double(), targets, ("x₁", "x₂"), ("0", "1"))

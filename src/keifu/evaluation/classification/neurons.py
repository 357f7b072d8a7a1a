"""Evaluation of networks of neurons on numeric rows: accuracy on digits, a toy set or a CSV file.

Axes: rows, dim = inputs, classes; of a picture: row, column.
"""

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from keifu.data.classification import tables
from keifu.errors import UserError
from keifu.evaluation.classification.metrics import Confusion
from keifu.evaluation.registry import EvalRequest, EvalResult, ResultTable

ABOUT = "a network of neurons on rows of numbers with classes: accuracy"
NAMES = tables.NAMES
OPTIONS = {"output"}


@runtime_checkable
class RowClassifier(Protocol):
    """Network that assigns a class to each row of `config.dim` numbers. `classes` are the names."""

    config: Any
    classes: Any

    def predict_proba(self, x: Float[Tensor, "rows dim"], /) -> Float[Tensor, "rows classes"]:
        """Return the probability of each class."""
        ...


def takes(model: nn.Module) -> bool:
    """Return whether the model classifies numeric rows."""
    return isinstance(model, RowClassifier)


def accepts(on: str) -> bool:
    """Return whether `on` is a table."""
    return on.endswith(".csv")


def evaluate(model: nn.Module, tokenizer: None, request: EvalRequest) -> EvalResult:
    """Return the accuracy on the held-out rows, or on all rows if the set is too small to hold any out."""
    assert isinstance(model, RowClassifier)
    data = tables.toy_dataset(request.on)
    inputs, targets = data.held.inputs[: request.limit], data.held.targets[: request.limit]
    has, given = (model.config.dim, len(model.classes)), (inputs.shape[1], len(data.classes))
    if has != given:
        raise UserError(
            f"{request.on} has rows of {given[0]} numbers in {given[1]} classes, and the network is for {has[0]} in "
            f"{has[1]}: evaluate it on what it was trained for."
        )
    given_classes = model.predict_proba(inputs).argmax(-1)
    confusion = Confusion.of(targets, given_classes, data.classes)
    figures = confusion.accuracy_figures() | {"rows": len(targets)}
    rows = [(data.classes[right], data.classes[given]) for right, given in torch.stack([targets, given_classes], 1)]
    return EvalResult(figures, (), {"by class": confusion.result("rows")}, ResultTable(("right", "given"), rows))


def row_of(model: RowClassifier, picture: Image.Image) -> Float[Tensor, "1 dim"]:
    """Convert a picture to an input row: a grey square with 0 for paper and 1 for ink, as in MNIST.

    A picture with a bright edge is dark ink on bright paper, so it is inverted. Raises `UserError` if the number of
    inputs is not a square.
    """
    side = math.isqrt(model.config.dim)
    if side * side != model.config.dim or side < 8:
        raise UserError(f"The network reads {model.config.dim} numbers, which are no square picture: give it a table.")
    grey = torch.from_numpy(np.asarray(picture.convert("L").resize((side, side)), dtype=np.float32) / 255)
    edge = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return (1 - grey if edge.mean() > 0.5 else grey).reshape(1, -1)

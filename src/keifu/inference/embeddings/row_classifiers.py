"""Networks of neurons that classify rows of numbers, and the conversion of a picture to such a row.

Axes: rows, dim = inputs, classes; of a picture: row, column.
"""

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from keifu.errors import UserError


@runtime_checkable
class RowClassifier(Protocol):
    """Network that assigns a class to each row of `config.dim` numbers. `classes` are the names."""

    config: Any
    classes: Any

    def predict_proba(self, x: Float[Tensor, "rows dim"], /) -> Float[Tensor, "rows classes"]:
        """Return the probability of each class."""
        ...


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

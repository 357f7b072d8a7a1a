"""Matrices that lie one above the other so that one product serves several; knows nothing of what they are used for."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class JoinedLinear(nn.Linear):
    """An `nn.Linear` whose rows are several matrices one above the other: queries, keys and values, or gate and up.

    `parts` are their numbers of rows. The output is split again: one tensor [*batch, rows] for each part.
    """

    def __init__(self, in_features: int, parts: Sequence[int], bias: bool = True):
        super().__init__(in_features, sum(parts), bias)
        self.parts = tuple(parts)

    def forward(self, input: Float[Tensor, "*batch in_features"]) -> tuple[Tensor, ...]:  # noqa: A002 (nn.Linear's name)
        return super().forward(input).split(self.parts, -1)

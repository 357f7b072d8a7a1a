"""Matrices that lie one above the other so that one product serves several; knows nothing of what they are used for."""

from collections.abc import Sequence

from torch import nn


class JoinedLinear(nn.Linear):
    """An `nn.Linear` whose rows are several matrices one above the other: queries, keys and values, or gate and up.

    `parts` are their numbers of rows: who uses the output splits it by them, and weights are loaded, saved, adapted
    and orthogonalised part by part.
    """

    def __init__(self, in_features: int, parts: Sequence[int], bias: bool = True):
        super().__init__(in_features, sum(parts), bias)
        self.parts = tuple(parts)

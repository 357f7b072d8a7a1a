"""One token from each distribution by one uniform number that only the row's seed and place decide; knows no text.

Axes: rows = independent distributions, vocab.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.layers.counted_random import BITS, uniform
from keifu.layers.wide import wide

__all__ = ["BITS", "draw", "uniform"]


def draw(logits: Float[Tensor, "rows vocab"], u: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The first token at which the running sum of probabilities passes u (inverse transform sampling).

    One number a row suffices, where the Gumbel trick needs one for each token of the vocabulary. The sum is float64, so
    that rare tokens keep their share; tokens with no probability are never drawn.
    """
    mass = wide(logits.softmax(-1)).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(mass, wide(u)[:, None] * mass[:, -1:], right=True)[:, 0].to(logits.device)

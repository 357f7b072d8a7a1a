"""Pooling of hidden states into one embedding per sequence, and a classification head.

Axes: batch, length = tokens, dim, labels.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from keifu.layers.linear import Linear

Hidden = Float[Tensor, "batch length dim"]
Mask = Bool[Tensor, "batch length"]
Pooling = Literal["mean", "cls", "max", "mean_sqrt_len"]


def mean_pool(hidden: Hidden, mask: Mask | None) -> Float[Tensor, "batch dim"]:
    """Return the mean over the real tokens (not padding), in float32. `mask` is True on real tokens."""
    if mask is None:
        return hidden.mean(1, dtype=torch.float32)
    return hidden.masked_fill(~mask[..., None], 0.0).sum(1, dtype=torch.float32) / mask.sum(1, keepdim=True)


def pool(hidden: Hidden, mask: Mask | None, pooling: Pooling = "mean") -> Float[Tensor, "batch dim"]:
    """Return one float32 state per sequence, as sentence-transformers' module Pooling does.

    pooling: "mean", "cls" (the first token's state), "max" (the largest value in each dimension), or "mean_sqrt_len"
    (the sum, divided by the square root of the number of tokens).
    """
    if pooling == "cls":
        return hidden[:, 0].float()
    if pooling == "max":
        visible = hidden if mask is None else hidden.masked_fill(~mask[..., None], -torch.inf)
        return visible.amax(1).float()
    mean = mean_pool(hidden, mask)
    if pooling == "mean":
        return mean
    return mean * (hidden.shape[1] if mask is None else mask.sum(1, keepdim=True)) ** 0.5


class SentenceHead(nn.Module):
    """Logistic regression on sentence embeddings: the pooled hidden states, scaled to length 1 (Reimers and Gurevych,
    2019), then a linear layer."""

    def __init__(self, dim: int, labels: int, pooling: Pooling = "mean"):
        super().__init__()
        self.project = Linear(dim, labels)
        self.pooling: Pooling = pooling

    def forward(self, hidden: Hidden, mask: Mask | None = None) -> Float[Tensor, "batch labels"]:
        return self.project(F.normalize(pool(hidden, mask, self.pooling), dim=-1).to(self.project.weight.dtype))

"""Pooling of hidden states into one embedding per sequence, and a classification head.

Axes: batch, length = tokens, dim, labels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from keifu.layers.linear import Linear

Hidden = Float[Tensor, "batch length dim"]
Mask = Bool[Tensor, "batch length"]


def mean_pool(hidden: Hidden, mask: Mask | None) -> Float[Tensor, "batch dim"]:
    """Return the mean over the real tokens (not padding), in float32. `mask` is True on real tokens."""
    if mask is None:
        return hidden.mean(1, dtype=torch.float32)
    return hidden.masked_fill(~mask[..., None], 0.0).sum(1, dtype=torch.float32) / mask.sum(1, keepdim=True)


class SentenceHead(nn.Module):
    """Logistic regression on sentence embeddings: the mean hidden state, scaled to length 1 (Reimers and Gurevych,
    2019), then a linear layer."""

    def __init__(self, dim: int, labels: int):
        super().__init__()
        self.project = Linear(dim, labels)

    def forward(self, hidden: Hidden, mask: Mask | None = None) -> Float[Tensor, "batch labels"]:
        return self.project(F.normalize(mean_pool(hidden, mask), dim=-1).to(self.project.weight.dtype))

"""Noise for several pictures, each from a seed of its own; knows no sampler.

A picture's numbers are those of `torch.Generator().manual_seed(seed)` on the CPU, in the order they are asked for: the
same picture comes alone or in a batch, on any device, and with diffusers' generators too.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


class Seeds:
    """Standard normal noise in the shape of x, each row's from its own generator."""

    def __init__(self, seeds: Sequence[int]):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Noise for each row of x, in its type and on its device."""
        rows = [torch.randn(x.shape[1:], generator=each, dtype=x.dtype) for each in self.generators]
        return torch.stack(rows).to(x.device)

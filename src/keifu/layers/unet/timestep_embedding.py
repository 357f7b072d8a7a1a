"""Timestep embedding: conditioning of a network on the noise level, by sinusoids and two layers.

Axes: batch, dim.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.linear import Linear


class TimestepSinusoids(nn.Module):
    """sin and cos of timestep / 10000^(i / (dim/2 - frequency_shift)), all sines first, in float32.

    The defaults are those of DDPM's code (Ho et al., 2020). Improved DDPM and Stable Diffusion have all cosines first
    and no shift. For an odd `dim` the last number is 0. The frequencies are computed in float32 as in published code:
    at timestep 1000 their rounding changes the angles noticeably.
    """

    def __init__(self, dim: int, frequency_shift: float = 1.0, cosine_first: bool = False):
        super().__init__()
        if dim // 2 == frequency_shift:
            raise UserError(f"{dim} channels are too few for sinusoids with the shift {frequency_shift}; widen them.")
        self.dim, self.frequency_shift, self.cosine_first = dim, frequency_shift, cosine_first

    def forward(self, timestep: Num[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        half = self.dim // 2
        exponents = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timestep.device)
        angles = timestep[:, None].float() * (exponents / (half - self.frequency_shift)).exp()
        both = (angles.cos(), angles.sin()) if self.cosine_first else (angles.sin(), angles.cos())
        return F.pad(torch.cat(both, -1), (0, self.dim % 2))


class TimeEmbedding(nn.Module):
    """Network linear2(swish(linear1(table(number)))), where the number is a timestep or another condition.

    table: converts the number to `dim` numbers: sinusoids, or an `nn.Embedding` if they are learned; `nn.Identity` if
    the input is an embedding. out_dim: None: `time_dim`.
    """

    def __init__(self, table: nn.Module, dim: int, time_dim: int, out_dim: int | None = None):
        super().__init__()
        self.table = table
        self.linear1, self.linear2 = Linear(dim, time_dim), Linear(time_dim, out_dim or time_dim)

    def forward(self, number: Num[Tensor, "batch *dim"]) -> Float[Tensor, "batch out_dim"]:
        return self.linear2(F.silu(self.linear1(self.table(number).to(self.linear1.weight.dtype))))

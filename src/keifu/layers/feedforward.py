"""Feed-forward networks (MLPs) of Transformer blocks, which act on each token separately.

Axes: batch, length, dim; hidden = the inner dimension.
"""

from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.layers.activations import Activation
from keifu.layers.dropout import Dropout
from keifu.layers.linear import JoinedLinear, Linear

Hidden = Float[Tensor, "*batch dim"]
Units = Float[Tensor, "*batch hidden"]


class _Network(nn.Module):
    """Network down(inner(x)). The subclass computes the hidden units."""

    down: Linear

    def forward(self, x: Hidden) -> Hidden:
        return self.down(self.inner(x))

    def inner(self, x: Hidden) -> Units:
        """Return the input of `down`."""
        raise NotImplementedError

    @property
    def residual_weights(self) -> list[Tensor]:
        """Return the matrices whose outputs are added to the residual stream."""
        return [self.down.weight]


class FeedForward(_Network):
    """Network down(activation(up(x))) (Vaswani et al., 2017, section 3.3). Dropout acts on the hidden units."""

    def __init__(self, dim: int, hidden_dim: int, activation: Activation, bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.up, self.down = Linear(dim, hidden_dim, bias), Linear(hidden_dim, dim, bias)
        self.activation, self.dropout = activation, Dropout(dropout)

    def inner(self, x: Hidden) -> Units:
        return self.dropout(self.activation(self.up(x)))


class GatedFeedForward(_Network):
    """Network down(activation(gate(x)) · up(x)) (Shazeer, 2020: GLU variants). One matrix joins gate and up."""

    def __init__(self, dim: int, hidden_dim: int, activation: Activation, bias: bool = False):
        super().__init__()
        self.gate_up = JoinedLinear(dim, (hidden_dim, hidden_dim), bias)
        self.down = Linear(hidden_dim, dim, bias)
        self.activation = activation

    def inner(self, x: Hidden) -> Units:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.activation(gate) * up


class ClampedFeedForward(GatedFeedForward):
    """Network down((up + 1) · gate · sigmoid(slope · gate)), with gate and up clamped (gpt-oss, 2025)."""

    def __init__(self, dim: int, hidden_dim: int, slope: float, limit: float):
        super().__init__(dim, hidden_dim, F.silu, bias=True)
        self.slope, self.limit = slope, limit

    def inner(self, x: Hidden) -> Units:
        gate, up = self.gate_up(x).chunk(2, -1)
        gate = gate.clamp(max=self.limit)
        return (up.clamp(-self.limit, self.limit) + 1) * gate * (self.slope * gate).sigmoid()


SwiGLU = partial(GatedFeedForward, activation=F.silu)


class GEGLU(_Network):
    """Network down(up(x) · gelu(gate(x))) (Shazeer, 2020). The rows of up are before those of gate, as in Stable
    Diffusion's files. Dropout acts on the hidden units. With silu as activation it is SwiGLU."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0, activation: Activation = F.gelu):
        super().__init__()
        self.up_gate = JoinedLinear(dim, (hidden_dim, hidden_dim))
        self.down, self.dropout, self.activation = Linear(hidden_dim, dim), Dropout(dropout), activation

    def inner(self, x: Hidden) -> Units:
        up, gate = self.up_gate(x).chunk(2, -1)
        return self.dropout(up * self.activation(gate))

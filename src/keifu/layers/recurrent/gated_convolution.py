"""Gated short convolution (LFM2, Liquid AI, 2025): a layer whose memory is the last few tokens.

Axes: batch, length, dim; channels = dim; numbers = of a state.
"""

import torch
from torch import Tensor, nn

from keifu.layers.attention.attention import Cache, CacheShape
from keifu.layers.attention.masks import CausalMask, DocumentMask, segments_of
from keifu.layers.linear import Linear
from keifu.layers.recurrent.gated_delta import Channels, Hidden, Numbers, Segments, ShortConvolution


class GatedConvolution(nn.Module):
    """Layer used instead of attention: output gate · convolution(input gate · values), each a projection of the token.

    size: tokens of the convolution, including the token itself. bias: whether the three projections and the convolution
    add one.
    """

    window = None

    def __init__(self, dim: int, size: int, bias: bool = False):
        super().__init__()
        self.inputs, self.output = Linear(dim, 3 * dim, bias=bias), Linear(dim, dim, bias=bias)
        self.convolution = ShortConvolution(dim, size, activation=nn.Identity(), bias=bias)
        self.dim, self.state_size = dim, (size - 1) * dim

    @property
    def cache_shape(self) -> CacheShape:
        """The shape of the cache: nothing per token, and a state of fixed size per sequence."""
        return CacheShape(fixed=self.state_size)

    @property
    def residual_weights(self) -> list[Tensor]:
        """Return the matrices whose outputs are added to the residual stream."""
        return [self.output.weight]

    def forward(
        self, x: Hidden, mask: CausalMask | DocumentMask | None = None, positions: object = None,
        cache: Cache | None = None,
    ) -> Hidden:  # fmt: skip
        """Mix the tokens of a sequence. With a cache, `x` are new tokens, which follow the earlier ones. Otherwise
        `mask` determines where documents begin."""
        input_gate, output_gate, values = self.inputs(x).chunk(3, -1)
        gated = input_gate * values
        if cache is not None:
            y = cache.recur(self._recur, gated)
        else:
            y, _ = self._recur(gated, gated.new_zeros(len(x), self.state_size), segments_of(mask, x.shape[1]))
        return self.output(output_gate * y)

    def _recur(self, x: Channels, state: Numbers, segments: Segments = None) -> tuple[Channels, Numbers]:
        """Return the output for each new token, and the state after the last one."""
        before = state.unflatten(1, (-1, self.dim)).to(x.dtype) if self.state_size else x[:, :0]
        tail = torch.cat([before, x], 1)[:, x.shape[1] :]
        return self.convolution(x, before, segments), tail.flatten(1).to(state.dtype)

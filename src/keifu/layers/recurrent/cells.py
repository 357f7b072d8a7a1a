"""Recurrent layers of decoders: the plain network (Elman, 1990), LSTM (Hochreiter and Schmidhuber, 1997) and GRU (Cho
et al., 2014).

New in the LSTM was a second state, the cell c, which the network only adds to: c ← f · c + i · g, and h = o · tanh(c).
The gates i, f and o are sigmoids of the token and of h, and g is a tanh of them. While f is 1 and i is 0, the cell and
its gradient pass through a step unchanged. In a plain network, h ← tanh(W x + U h) multiplies the gradient with U in
each step, so that it vanishes or grows. The paper had no forget gate (f was always 1): Gers et al. added it in 2000.
These layers have torch's weights and order of gates, and torch computes whole sequences.

Axes: batch, length, dim; numbers = of a state; documents, longest = tokens of the longest document.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.layers.attention.attention import Cache, CacheShape
from keifu.layers.attention.masks import CausalMask, DocumentMask, segments_of
from keifu.layers.dropout import Dropout

Hidden = Float[Tensor, "batch length dim"]
Numbers = Float[Tensor, "batch numbers"]


class RNN(nn.Module):
    """Plain recurrent layer of one state: h ← tanh(W x + b + U h + c)."""

    window = None
    kind: ClassVar[Callable[..., nn.RNNBase]] = nn.RNN
    n_states = 1

    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.network = dim, self.kind(dim, dim, batch_first=True)

    @property
    def cache_shape(self) -> CacheShape:
        """The shape of the cache: nothing per token, and a state of fixed size per sequence."""
        return CacheShape(fixed=self.n_states * self.dim)

    def forward(
        self, x: Hidden, mask: CausalMask | DocumentMask | None = None, positions: object = None,
        cache: Cache | None = None,
    ) -> Hidden:  # fmt: skip
        """Read the tokens of a sequence. With a cache, `x` are new tokens, which follow the earlier ones. Otherwise
        `mask` determines where documents begin, and each of them begins with a state of zeros."""
        if cache is not None:
            return cache.recur(self._recur, x)
        segments = segments_of(mask, x.shape[1])
        return self._recur(x, self._zeros(x))[0] if segments is None else self._documents(x, segments)

    def _recur(self, x: Hidden, state: Numbers) -> tuple[Hidden, Numbers]:
        """Return the output for each new token, and the state after the last one."""
        y, after = self.network(x, state.to(x.dtype)[None])
        return y, after[0].to(state.dtype)

    def _documents(self, x: Hidden, segments: Int[Tensor, "batch length"]) -> Hidden:
        """Read each document as a row of its own, filled up behind its end, and put the outputs back."""
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        document = begins.flatten().cumsum(0) - 1
        first = begins.flatten().nonzero()[:, 0]
        position = torch.arange(len(document), device=x.device) - first[document]
        rows = x.new_zeros(len(first), int(position.max()) + 1, self.dim)
        rows = rows.index_put((document, position), x.flatten(0, 1))
        y, _ = self._recur(rows, self._zeros(rows))
        return y[document, position].view_as(x)

    def _zeros(self, x: Hidden) -> Numbers:
        return x.new_zeros(len(x), self.n_states * self.dim)


class ResetAfterGRU(RNN):
    """Gated recurrent layer, in torch's form: the reset gate acts on U h (`recurrent.gru` has the paper's)."""

    kind = nn.GRU


class LSTM(RNN):
    """Layer of long short-term memory; its state is h, then c."""

    kind = nn.LSTM
    n_states = 2

    def remember(self, bias: float = 1.0) -> None:
        """Set the bias of the forget gate, so that a new layer keeps its cell (Gers et al., 2000)."""
        for name, parameter in self.network.named_parameters():
            if name.startswith("bias"):  # torch adds two biases
                parameter.data[self.dim : 2 * self.dim] = bias / 2

    def _recur(self, x: Hidden, state: Numbers) -> tuple[Hidden, Numbers]:
        h, c = state.to(x.dtype)[None].chunk(2, -1)
        y, (h, c) = self.network(x, (h.contiguous(), c.contiguous()))
        return y, torch.cat([h[0], c[0]], -1).to(state.dtype)


class RecurrentBlock(nn.Module):
    """Block of a decoder that is one recurrent layer and dropout (Zaremba et al., 2014), without a residual
    connection. The mask acts on what goes to the next layer, and not on the state."""

    def __init__(self, layer: RNN, dropout: float = 0.0):
        super().__init__()
        self.attention, self.dropout = layer, Dropout(dropout)

    def forward(
        self, x: Hidden, mask: CausalMask | DocumentMask | None = None, positions: object = None,
        cache: Cache | None = None,
    ) -> Hidden:  # fmt: skip
        """Apply the layer, as `DecoderLM` calls a block."""
        return self.dropout(self.attention(x, mask, positions, cache))

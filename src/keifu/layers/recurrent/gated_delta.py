"""Gated DeltaNet (Yang et al., 2024): attention whose memory is one matrix per head, independent of the sequence's
length.

For each token the matrix S decays by exp(log_decay). Then the delta rule moves the value that S stores for the token's
key towards the token's value, by the share `strength`: S ← exp(log_decay) · S, then S ← S + k (strength · (v - Sᵀk))ᵀ.
The output is Sᵀq. Decoding computes these steps; longer sequences are computed in chunks of 64 tokens by matrix
multiplications.

Axes: batch, length, heads, chunks, chunk = tokens of a chunk, key_dim, value_dim, channels; numbers = of a state.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.attention import Cache, CacheShape
from keifu.layers.attention.masks import CausalMask, DocumentMask, segments_of
from keifu.layers.linear import Linear
from keifu.layers.normalisation import GatedRMSNorm

Hidden = Float[Tensor, "batch length dim"]
Channels = Float[Tensor, "batch length channels"]
Numbers = Float[Tensor, "batch numbers"]
State = Float[Tensor, "batch heads key_dim value_dim"]
Segments = Int[Tensor, "batch length"] | None

CHUNK = 64


class Signals(NamedTuple):
    """Inputs of the delta rule, at least in float32. strength and log_decay are one number per token and head."""

    q: Float[Tensor, "batch heads length key_dim"]
    k: Float[Tensor, "batch heads length key_dim"]
    v: Float[Tensor, "batch heads length value_dim"]
    strength: Float[Tensor, "batch heads length"]
    log_decay: Float[Tensor, "batch heads length"]


def delta_step(signals: Signals, state: State) -> tuple[Float[Tensor, "batch heads 1 value_dim"], State]:
    """Apply the gated delta rule to one token (Yang et al., 2024, equation 10). Return the output and the new state."""
    q, k, v, strength, log_decay = signals
    state = state * log_decay.exp()[..., None]
    state = state + k.mT @ (strength[..., None] * (v - k @ state))
    return q @ state, state


def delta_rule(
    signals: Signals, state: State, segments: Segments = None
) -> tuple[Float[Tensor, "batch heads length value_dim"], State]:
    """Apply the gated delta rule to a sequence, in chunks (Yang et al., 2024, section 3.3). Return the outputs and the
    new state.

    Within a chunk the corrections depend on each other: they solve a triangular system. segments: document number of
    each token; equal neighbours belong together, and a document's state does not reach the next one.
    """
    length = signals.q.shape[2]
    if length == 1 and segments is None:
        return delta_step(signals, state)
    size = min(CHUNK, length)
    padding = -length % size
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, size)) for x in signals[:3])
    strength, log_decay = (F.pad(x, (0, padding)).unflatten(2, (-1, size)) for x in signals[3:])
    total = log_decay.cumsum(-1)  # logarithm of the decay since the chunk's beginning
    pairs = total[..., :, None] - total[..., None, :]
    fading = pairs.masked_fill(torch.ones_like(pairs, dtype=torch.bool).triu(1), -torch.inf).exp()
    entering, leaving, through = total.exp(), (total[..., -1:] - total).exp(), total[..., -1].exp()
    if segments is not None:
        same, first, last, unbroken = _segment_masks(F.pad(segments, (0, padding), value=-1).unflatten(1, (-1, size)))
        fading, entering, leaving, through = fading * same, entering * first, leaving * last, through * unbroken
    weighted = strength[..., None] * k
    system = (weighted @ k.mT) * fading
    right_side = torch.cat([strength[..., None] * v, weighted * entering[..., None]], -1)
    solved = torch.linalg.solve_triangular(system, right_side, upper=False, unitriangular=True)
    values, reading = solved.split([v.shape[-1], k.shape[-1]], -1)
    within, q, k = (q @ k.mT) * fading, q * entering[..., None], k * leaving[..., None]
    outputs = []
    for chunk in range(q.shape[2]):
        new = values[:, :, chunk] - reading[:, :, chunk] @ state
        outputs.append(q[:, :, chunk] @ state + within[:, :, chunk] @ new)
        state = state * through[:, :, chunk, None, None] + k[:, :, chunk].mT @ new
    return torch.cat(outputs, 2)[:, :, :length], state


def _segment_masks(segments: Int[Tensor, "batch chunks chunk"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four masks for the chunks of a row with several documents (segments), each with an axis for the heads.

    same (batch, 1, chunks, chunk, chunk): whether two tokens of a chunk have one segment. first (batch, 1, chunks,
    chunk): whether a token belongs to the segment before the chunk, so that the incoming state reaches it. last (batch,
    1, chunks, chunk): whether a token belongs to the chunk's last segment, so that it reaches the outgoing state. whole
    (batch, 1, chunks): whether the incoming state reaches the outgoing one.
    """
    last = segments[..., -1:]
    before = torch.cat([segments[:, :1, :1], last[:, :-1]], 1)
    same = segments[..., :, None] == segments[..., None, :]
    return same[:, None], (segments == before)[:, None], (segments == last)[:, None], (last == before)[:, None, :, 0]


class ShortConvolution(nn.Module):
    """Causal convolution of each channel over the last `size` tokens, followed by SiLU or another activation."""

    def __init__(self, channels: int, size: int, activation: Callable[[Tensor], Tensor] = F.silu, bias: bool = False):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, 1, size))
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(
        self, x: Channels, before: Float[Tensor, "batch earlier channels"], segments: Segments = None
    ) -> Channels:
        """Convolve `x`, which follows the `size` - 1 tokens `before`. Tokens of another segment count as 0."""
        joined = torch.cat([before, x], 1).mT
        if segments is None:
            return self.activation(F.conv1d(joined, self.weight, self.bias, groups=x.shape[2]).mT)
        taps = torch.arange(x.shape[1], device=x.device)[:, None] - torch.arange(before.shape[1], -1, -1).to(x.device)
        same = (segments[:, taps.clamp(min=0)] == segments[..., None]) & (taps >= 0)
        y = (joined.unfold(2, self.weight.shape[2], 1) * self.weight * same[:, None]).sum(-1).mT
        return self.activation(y if self.bias is None else y + self.bias)


class SeparateInputs(nn.Module):
    """Separate matrices for queries, keys and values; for the output's gate; for strengths; and for decays
    (Qwen3.5)."""

    def __init__(self, dim: int, heads: "Heads"):
        super().__init__()
        self.qkv, self.gate = Linear(dim, heads.channels, bias=False), Linear(dim, heads.value_width, bias=False)
        self.strength, self.decay = (Linear(dim, heads.values, bias=False) for _ in range(2))

    def signals(self, x: Hidden) -> tuple[Tensor, ...]:
        """Return queries, keys and values in one tensor, the gate, the strengths and the decays."""
        return self.qkv(x), self.gate(x), self.strength(x), self.decay(x)


class GroupedInputs(nn.Module):
    """The same projections as two matrices, whose rows are grouped by heads of keys (Qwen3-Next)."""

    def __init__(self, dim: int, heads: "Heads"):
        super().__init__()
        self.heads = heads
        self.main = Linear(dim, heads.channels + heads.value_width, bias=False)
        self.numbers = Linear(dim, 2 * heads.values, bias=False)

    def signals(self, x: Hidden) -> tuple[Tensor, ...]:
        """Return queries, keys and values in one tensor, the gate, the strengths and the decays."""
        heads = self.heads
        group = heads.values // heads.keys
        sizes = [heads.key_dim, heads.key_dim, group * heads.value_dim, group * heads.value_dim]
        q, k, v, gate = (part.flatten(2) for part in self.main(x).unflatten(-1, (heads.keys, -1)).split(sizes, -1))
        strength, decay = (part.flatten(2) for part in self.numbers(x).unflatten(-1, (heads.keys, -1)).chunk(2, -1))
        return torch.cat([q, k, v], -1), gate, strength, decay


class Heads(NamedTuple):
    """Number of heads of keys and of values, and their sizes. A head of keys serves values / keys heads of values."""

    keys: int
    values: int
    key_dim: int
    value_dim: int

    @property
    def value_width(self) -> int:
        """The numbers of all heads of values."""
        return self.values * self.value_dim

    @property
    def channels(self) -> int:
        """The numbers of queries, keys and values."""
        return 2 * self.keys * self.key_dim + self.value_width


class GatedDeltaNet(nn.Module):
    """Layer used instead of attention: a short convolution, the gated delta rule, and a gated norm.

    heads: their numbers and sizes. inputs: builds the input projections. size: tokens of the convolution.
    """

    window = None

    def __init__(
        self, dim: int, heads: Heads, inputs: Callable[[int, Heads], SeparateInputs | GroupedInputs], size: int = 4,
        eps: float = 1e-6,
    ):  # fmt: skip
        super().__init__()
        if heads.values % heads.keys:
            raise UserError(f"{heads.keys} heads of keys must divide the {heads.values} heads of values.")
        self.heads, self.inputs = heads, inputs(dim, heads)
        self.convolution = ShortConvolution(heads.channels, size)
        self.log_rate = nn.Parameter(torch.empty(heads.values))
        self.decay_bias = nn.Parameter(torch.empty(heads.values))
        self.norm = GatedRMSNorm(heads.value_dim, eps)
        self.output = Linear(heads.value_width, dim, bias=False)
        nn.init.uniform_(self.log_rate, 0.01, 16.0)
        self.log_rate.data.log_()
        steps = self.decay_bias.data.uniform_(math.log(0.001), math.log(0.1)).exp_()  # Mamba-2's initialisation
        steps.expm1_().log_()  # the inverse of softplus
        self.sizes = ((size - 1) * heads.channels, heads.values * heads.key_dim * heads.value_dim)

    @property
    def cache_shape(self) -> CacheShape:
        """The shape of the cache: nothing per token, and a state of fixed size per sequence."""
        return CacheShape(fixed=sum(self.sizes))

    def forward(
        self, x: Hidden, mask: CausalMask | DocumentMask | None = None, positions: object = None,
        cache: Cache | None = None,
    ) -> Hidden:  # fmt: skip
        """Mix the tokens of a sequence. With a cache, `x` are new tokens, which follow the earlier ones. Otherwise
        `mask` determines where documents begin."""
        mixed, gate, strength, decay = self.inputs.signals(x)
        joined = torch.cat([mixed, strength, decay], -1)
        if cache is not None:
            y = cache.recur(self._recur, joined)
        else:
            y, _ = self._recur(joined, joined.new_zeros(len(x), sum(self.sizes)), segments_of(mask, x.shape[1]))
        shape = (-1, self.heads.value_dim)
        return self.output(self.norm(y.unflatten(-1, shape), gate.unflatten(-1, shape)).flatten(2))

    def _recur(
        self, x: Channels, state: Numbers, segments: Segments = None
    ) -> tuple[Float[Tensor, "batch length out"], Numbers]:
        """Return the output for each new token, and the state after the last one."""
        heads = self.heads
        mixed, strength, decay = x.split([heads.channels, heads.values, heads.values], -1)
        tail, memory = state.split(self.sizes, -1)
        before = tail.unflatten(1, (-1, heads.channels)).to(x.dtype) if self.sizes[0] else mixed[:, :0]
        signals = self._signals(self.convolution(mixed, before, segments), strength, decay)
        with torch.autocast(x.device.type, enabled=False):
            matrix = memory.to(signals.q.dtype).unflatten(1, (heads.values, heads.key_dim, heads.value_dim))
            y, matrix = delta_rule(signals, matrix, segments)
        tail = torch.cat([before, mixed], 1)[:, mixed.shape[1] :]
        state = torch.cat([tail.flatten(1).to(matrix.dtype), matrix.flatten(1)], 1)
        return y.transpose(1, 2).flatten(2).to(x.dtype), state

    def _signals(self, mixed: Tensor, strength: Tensor, decay: Tensor) -> Signals:
        """Return the inputs of the delta rule: keys and queries of length 1, and each decay between 0 and 1."""
        heads, width = self.heads, self.heads.keys * self.heads.key_dim
        wide = torch.promote_types(mixed.dtype, torch.float32)
        q, k, v = mixed.to(wide).split([width, width, heads.value_width], -1)
        q, k, v = (
            part.unflatten(-1, (-1, size)).transpose(1, 2)
            for part, size in ((q, heads.key_dim), (k, heads.key_dim), (v, heads.value_dim))
        )
        q, k = (_unit(part).repeat_interleave(heads.values // heads.keys, 1) for part in (q, k))
        log_decay = -self.log_rate.to(wide).exp() * F.softplus(decay.to(wide) + self.decay_bias)
        return Signals(q * heads.key_dim**-0.5, k, v, strength.sigmoid().to(wide).mT, log_decay.mT)

    @property
    def residual_weights(self) -> list[Tensor]:
        """Return the matrices whose outputs are added to the residual stream."""
        return [self.output.weight]


def _unit(x: Float[Tensor, "*batch key_dim"]) -> Float[Tensor, "*batch key_dim"]:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

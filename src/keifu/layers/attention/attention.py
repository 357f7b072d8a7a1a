"""Multi-head attention: scaled dot products, grouped-query heads, self-attention with a cache, cross-attention.

Axes: batch, length = queries, seen = keys, heads, head_dim, dim = heads · head_dim after heads are joined.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.masks import Band, Mask, Visible
from keifu.layers.attention.positions import Positions, Rotary, Rotation
from keifu.layers.dropout import Dropout
from keifu.layers.linear import JoinedLinear, Linear

Hidden = Float[Tensor, "batch length dim"]
Heads = Float[Tensor, "batch length heads head_dim"]


class Scoring(NamedTuple):
    """Settings that turn scores q kᵀ into the weights of values.

    dropout: acts on the softmax. scale: factor of the scores; None is 1 / √head_dim. soft_cap: scores become soft_cap ·
    tanh(score / soft_cap) (Gemma 2, 2024). sinks: for each head the score of an extra key whose value is 0 (Xiao et
    al., 2023; gpt-oss, 2025); not together with soft_cap.
    """

    dropout: Dropout | None = None
    scale: float | None = None
    soft_cap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None


def attend(
    q: Float[Tensor, "batch heads length head_dim"], k: Float[Tensor, "batch kv_heads seen head_dim"],
    v: Float[Tensor, "batch kv_heads seen value_dim"], visible: Visible = None, scoring: Scoring | None = None,
) -> Hidden:  # fmt: skip
    """Compute softmax(q kᵀ · scale) v with the heads joined: (batch, length, heads · value_dim). Each head of keys
    serves heads / kv_heads query heads.

    torch's fused attention has neither dropout masks of ours nor a soft cap: these need memory that grows with length ·
    seen.
    """
    batch, heads, length, _ = q.shape
    scoring = scoring or Scoring()
    if isinstance(visible, Band):
        return visible.join(attend(*visible.cut(q, k, v), scoring), length)
    if scoring.sinks is not None:
        q, k, v, visible, scoring = _with_sink(q, k, v, visible, scoring, scoring.sinks)
    group = heads // k.shape[1]
    mask = visible if isinstance(visible, Tensor) else None
    dropout, scale, soft_cap, _ = scoring
    if (dropout is not None and dropout.active) or soft_cap or (q.requires_grad and _short(q, k)):
        return _explicit(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), visible, scoring)
    # one new token: the queries of a group become the rows of one small matrix multiplication
    if group > 1 and length == 1:
        q = q.reshape(batch, k.shape[1], group, -1)
        group = 1
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=visible == "causal", scale=scale, enable_gqa=group > 1)
    return y.reshape(batch, heads, length, -1).transpose(1, 2).flatten(2)


def _with_sink(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, scoring: Scoring, sinks: Float[Tensor, " heads"]
) -> tuple[Tensor, Tensor, Tensor, Bool[Tensor, "#batch 1 #length more"] | None, Scoring]:
    """Add the sinks to queries and keys, as a first key that every query sees, with the value 0.

    Its score must be the head's sink: queries get one more number, which only this key multiplies.
    """
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    scores = (sinks / scale).to(q.dtype)[:, None, None].expand(len(q), -1, q.shape[2], 1)
    keys = F.pad(k, (0, 1, 1, 0))
    keys[:, :, 0, -1] = 1
    mask = F.pad(visible, (1, 0), value=True) if isinstance(visible, Tensor) else None
    if visible == "causal":
        mask = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool, device=q.device).tril(1)[None, None]
    return torch.cat([q, scores], -1), keys, F.pad(v, (0, 0, 1, 0)), mask, scoring._replace(scale=scale, sinks=None)


def _short(q: Tensor, k: Tensor) -> bool:
    """Return whether torch's fused attention is slower than three matrix multiplications.

    Its backward pass is, measured on 2 cores with AMX in bfloat16: by a factor of 4 at 64 tokens and 1.7 at 256. In
    float32, or from 512 tokens on, it is faster.
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and max(q.shape[2], k.shape[2]) <= 256


def _explicit(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scoring: Scoring) -> Hidden:
    """Compute `attend` step by step, with keys for each head. One operation multiplies, scales and masks the scores."""
    batch, heads, length, head_dim = q.shape
    hidden = torch.zeros((), dtype=q.dtype, device=q.device)  # added to the scores: -inf for keys that are not visible
    if visible == "causal":
        hidden = torch.full((length, k.shape[2]), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    elif isinstance(visible, Tensor):
        added = visible.to(q.dtype) if visible.is_floating_point() else hidden.where(visible, -torch.inf)
        hidden = added.expand(batch, heads, -1, -1).flatten(0, 1)
    alpha = head_dim**-0.5 if scoring.scale is None else scoring.scale
    if cap := scoring.soft_cap:
        scores = cap * (q.flatten(0, 1) @ k.mT.flatten(0, 1) * (alpha / cap)).tanh() + hidden
    else:
        scores = torch.baddbmm(hidden, q.flatten(0, 1), k.mT.flatten(0, 1), alpha=alpha)
    weights = scores.softmax(-1).unflatten(0, (batch, heads))
    weights = weights if scoring.dropout is None else scoring.dropout(weights)
    return (weights @ v).transpose(1, 2).flatten(2)


class CacheShape(NamedTuple):
    """Shape of the cache of a layer.

    heads, head_dim: heads of keys, and their size. value_dim: size of a head of values; None is head_dim; 0 means that
    the keys are used as values too. fixed: float32 numbers per sequence, independent of its length.
    """

    heads: int = 0
    head_dim: int = 0
    value_dim: int | None = None
    fixed: int = 0

    @property
    def widths(self) -> tuple[int, int]:
        """Return the sizes of a key and of a value."""
        return self.head_dim, self.head_dim if self.value_dim is None else self.value_dim


Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # new tokens and a state → an output and the new state


@runtime_checkable
class Cache(Protocol):
    """Interface of a layer's cache of earlier tokens: keys and values, or a state of fixed size.

    `attend` adds the keys and values of new tokens and attends to all; without values the keys are used as values too.
    Without keys it adds nothing: the layer uses those that an earlier layer of the pass added.
    `recur` calls `rule` with the new tokens and the state, returns its output, and stores its new state.

    `LayerCache` (kv_cache.py) has a row for each sequence; it serves beam search, image tokens, and models called with
    a `KVState`. `PagedCache` (inference/text/paged) has blocks of a pool; it serves the engine.
    """

    def attend(
        self, q: Float[Tensor, "batch heads length head_dim"],
        keys: Float[Tensor, "batch kv_heads length head_dim"] | None,
        values: Float[Tensor, "batch kv_heads length head_dim"] | None, window: int | None, scoring: Scoring,
    ) -> Hidden: ...  # fmt: skip

    def recur(self, rule: Rule, x: Float[Tensor, "batch length channels"]) -> Float[Tensor, "batch length out"]: ...


class Attention(nn.Module):
    """Self-attention (Vaswani et al., 2017, section 3.2): multi-head; grouped-query (Ainslie et al., 2023) with fewer
    `n_kv_heads` than `n_heads`; multi-query (Shazeer, 2019) with one. The mask determines which keys each query sees.

    window: limits each query to the last `window` tokens, including itself (Mistral, Jiang et al., 2023); the cost then
    grows with the window. scale: factor of the scores; None: 1 / √head_dim. rotary: rotates queries and keys by their
    positions. qk_norm: norms of queries and of keys (..., heads, head_dim), applied before the rotation (Henry et al.,
    2020): of each head (Qwen3, Gemma 3) or of all heads together (OLMo 2).
    """

    def __init__(
        self, dim: int, n_heads: int, n_kv_heads: int | None = None, head_dim: int | None = None, bias: bool = True,
        out_bias: bool | None = None, window: int | None = None, dropout: float = 0.0, scale: float | None = None,
        rotary: Rotary | None = None, qk_norm: tuple[nn.Module, nn.Module] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads or n_heads
        self.head_dim, self.window, self.dropout = head_dim or dim // n_heads, window, Dropout(dropout)
        self.scale = scale
        self.soft_cap: float | None = None
        self.sinks: Tensor | None = None
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_kv_heads ({n_kv_heads}) must divide n_heads ({n_heads}).")
        if head_dim is None and dim % n_heads:
            raise UserError(f"n_heads ({n_heads}) must divide dim ({dim}); choose another number or give head_dim.")
        inner, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.qkv: nn.Module = JoinedLinear(dim, (inner, kv, kv), bias)
        self.out = Linear(inner, dim, bias if out_bias is None else out_bias)
        self.rotary = rotary
        self.q_norm, self.k_norm = qk_norm or (None, None)

    def forward(
        self, x: Hidden, mask: Mask | None = None, positions: Positions | None = None, cache: Cache | None = None
    ) -> Hidden:
        """Attend. With a cache, `x` are new tokens, which also see the earlier ones. Otherwise `mask` determines what
        is visible (None: all)."""
        return self.out(self._mix(self.qkv(x).unflatten(-1, (-1, self.head_dim)), mask, positions, cache))

    def _mix(
        self, heads: Float[Tensor, "batch length all_heads head_dim"], mask: Mask | None, positions: Positions | None,
        cache: Cache | None,
    ) -> Float[Tensor, "batch length inner"]:  # fmt: skip
        """Return the joined outputs of the heads. heads: queries, keys and values, in this order."""
        qk, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([self.n_heads, self.n_kv_heads], 2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], 2)
        if self.rotary is not None and positions is not None:
            qk = self._rotate(qk, positions.rotation(self.rotary), positions)
        q, k, v = qk[:, :, : self.n_heads].transpose(1, 2), qk[:, :, self.n_heads :].transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            return cache.attend(q, k, v, self.window, self.scoring)
        visible = None if mask is None else mask.visible(k.shape[2], self.window)
        return attend(q, k, v, visible, self.scoring)

    def _rotate(self, qk: Heads, rotation: Rotation, positions: Positions) -> Heads:
        """Rotate queries and keys by their positions."""
        return rotation.apply(qk)

    @property
    def scoring(self) -> Scoring:
        """Return the settings of the scores."""
        return Scoring(self.dropout, self.scale, self.soft_cap, self.sinks)

    @property
    def cache_shape(self) -> CacheShape:
        """Return the shape of the cached values of a token."""
        return CacheShape(self.n_kv_heads, self.head_dim)

    @property
    def residual_weights(self) -> list[Tensor]:
        """Return the matrices whose outputs are added to the residual stream."""
        return [self.out.weight]


class SinkAttention(Attention):
    """Attention with a learned sink for each head: a token need not attend to anything (gpt-oss, 2025)."""

    def __init__(self, *sizes: Any, **settings: Any):
        super().__init__(*sizes, **settings)
        self.sinks = nn.Parameter(torch.zeros(self.n_heads))


class TemperedAttention(Attention):
    """Attention whose queries are multiplied by 1 + growth · ln(1 + ⌊position / trained⌋), so that attention to many
    tokens stays sharp (Llama 4, 2025; Ministral 3)."""

    def __init__(self, *sizes: Any, growth: float, trained: int, **settings: Any):
        super().__init__(*sizes, **settings)
        self.growth, self.trained = growth, trained

    def _rotate(self, qk: Heads, rotation: Rotation, positions: Positions) -> Heads:
        q, k = rotation.apply(qk).split([self.n_heads, self.n_kv_heads], 2)
        size = 1 + self.growth * (1 + positions.ids // self.trained).float().log()
        return torch.cat([q * size[..., None, None].to(q.dtype), k], 2)


class GatedAttention(Attention):
    """Attention that multiplies the output of each head by the sigmoid of a gate, computed from the token (Qwen3-Next,
    2025).

    In the matrix, the rows of a head's gate follow those of its queries.
    """

    def __init__(self, dim: int, *sizes: Any, **settings: Any):
        super().__init__(dim, *sizes, **settings)
        inner, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.qkv = JoinedLinear(dim, (2 * inner, kv, kv), self.qkv.bias is not None)

    def forward(
        self, x: Hidden, mask: Mask | None = None, positions: Positions | None = None, cache: Cache | None = None
    ) -> Hidden:
        queries, keys_values = self.qkv(x).unflatten(-1, (-1, self.head_dim)).tensor_split([2 * self.n_heads], 2)
        q, gate = queries.unflatten(2, (-1, 2)).unbind(3)
        return self.out(self._mix(torch.cat([q, keys_values], 2), mask, positions, cache) * gate.flatten(2).sigmoid())


class CappedAttention(Attention):
    """Attention whose scores stay between -soft_cap and soft_cap (Gemma 2, 2024)."""

    def __init__(self, *sizes: Any, soft_cap: float, **settings: Any):
        super().__init__(*sizes, **settings)
        self.soft_cap = soft_cap


class JoinedUnbiasedKeys(nn.Module):
    """Joined matrix of queries (if any), keys and values, with a bias for all but keys.

    A bias of keys would add the same number to all scores of a query, and softmax would cancel it (Whisper, 2022).
    """

    def __init__(self, dim: int, parts: dict[str, int]):
        super().__init__()
        self.parts, self.matrix = parts, JoinedLinear(dim, [*parts.values()], bias=False)
        self.biases = nn.ParameterDict({n: torch.zeros(size) for n, size in parts.items() if n != "k"})

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch joined"]:
        y = self.matrix(x)
        return y + torch.cat([self.biases[n] if n != "k" else y.new_zeros(size) for n, size in self.parts.items()])


class KeysUnbiased(Attention):
    """Attention with a bias for queries, values and outputs, but not for keys (Whisper, 2022)."""

    def __init__(self, dim: int, n_heads: int):
        super().__init__(dim, n_heads)
        self.qkv = JoinedUnbiasedKeys(dim, {"q": dim, "k": dim, "v": dim})


class CrossAttention(nn.Module):
    """Attention with queries from one sequence, and keys and values from another (Vaswani et al., 2017, section
    3.2.3)."""

    def __init__(
        self, dim: int, n_heads: int, context_dim: int | None = None, bias: bool = True, dropout: float = 0.0,
        out_bias: bool | None = None, head_dim: int | None = None, scale: float | None = None,
    ):  # fmt: skip
        super().__init__()
        if head_dim is None and dim % n_heads:
            raise UserError(f"n_heads ({n_heads}) must divide dim ({dim}); choose another number.")
        self.n_heads, self.dropout, self.scale = n_heads, Dropout(dropout), scale
        inner = n_heads * (head_dim or dim // n_heads)
        self.q = Linear(dim, inner, bias)
        self.kv: nn.Module = JoinedLinear(context_dim or dim, (inner, inner), bias)
        self.out = Linear(inner, dim, bias if out_bias is None else out_bias)

    def project(self, context: Float[Tensor, "batch seen context_dim"]) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a context, (batch, heads, seen, head_dim) each, for use at every step."""
        k, v = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in self.kv(context).chunk(2, -1))
        return k, v

    def forward(self, x: Hidden, keys_values: tuple[Tensor, Tensor], mask: Mask) -> Hidden:
        k, v = keys_values
        q = self.q(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        return self.out(attend(q, k, v, mask.visible(k.shape[2], None), Scoring(self.dropout, self.scale)))


class KeysUnbiasedCross(CrossAttention):
    """Cross-attention with a bias for queries, values and outputs, but not for keys (Whisper, 2022)."""

    def __init__(self, dim: int, n_heads: int):
        super().__init__(dim, n_heads)
        self.kv = JoinedUnbiasedKeys(dim, {"k": dim, "v": dim})

"""Multi-head attention: scaled dot products, grouped-query heads, self-attention with a cache, cross-attention.

Axes: batch, length = queries, seen = keys, heads, head_dim, dim = heads · head_dim where they are joined.
"""

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.masks import Band, Mask, Visible
from keifu.layers.attention.positions import Positions, Rotary
from keifu.layers.dropout import Dropout
from keifu.layers.linear import JoinedLinear, Linear

Hidden = Float[Tensor, "batch length dim"]


def attend(
    q: Float[Tensor, "batch heads length head_dim"], k: Float[Tensor, "batch kv_heads seen head_dim"],
    v: Float[Tensor, "batch kv_heads seen head_dim"], visible: Visible = None, dropout: Dropout | None = None,
    scale: float | None = None,
) -> Hidden:  # fmt: skip
    """softmax(q kᵀ · scale) v, the heads joined; each head of keys serves heads / kv_heads neighbouring queries.

    The scale is 1 / √head_dim where none is given. `dropout` acts on the softmax; torch's fused attention has none
    whose mask could be told, so it costs memory that grows with length · seen.
    """
    batch, heads, length, _ = q.shape
    if isinstance(visible, Band):
        return visible.join(attend(*visible.cut(q, k, v), dropout, scale), length)
    group = heads // k.shape[1]
    mask = visible if isinstance(visible, Tensor) else None
    dropout = dropout if dropout is not None and dropout.active else None
    if dropout is not None or (q.requires_grad and _short(q, k)):
        return _explicit(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), visible, dropout, scale)
    if group > 1 and length == 1:  # one new token: the group's queries become the rows of one small product
        q = q.reshape(batch, k.shape[1], group, -1)
        group = 1
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=visible == "causal", scale=scale, enable_gqa=group > 1)
    return y.reshape(batch, heads, length, -1).transpose(1, 2).flatten(2)


def _short(q: Tensor, k: Tensor) -> bool:
    """Whether torch's fused attention loses to three plain products: its backward pass does, measured on 2 cores with
    AMX, four times at 64 tokens and 1.7 times at 256, in bfloat16 on a CPU; in float32, or from 512 tokens on, it wins.
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and max(q.shape[2], k.shape[2]) <= 256


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, visible: Visible, dropout: Dropout | None, scale: float | None
) -> Hidden:
    """Compute `attend` written out, each head with its own keys. Scores are masked and scaled by their product itself,
    so that between two products there is the softmax alone."""
    batch, heads, length, head_dim = q.shape
    hidden = torch.zeros((), dtype=q.dtype, device=q.device)  # what is added to the scores: -inf where nothing is seen
    if visible == "causal":
        hidden = torch.full((length, k.shape[2]), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    elif isinstance(visible, Tensor):
        hidden = hidden.where(visible, -torch.inf).expand(batch, heads, -1, -1).flatten(0, 1)
    alpha = head_dim**-0.5 if scale is None else scale
    scores = torch.baddbmm(hidden, q.flatten(0, 1), k.mT.flatten(0, 1), alpha=alpha)
    weights = scores.softmax(-1).unflatten(0, (batch, heads))
    weights = weights if dropout is None else dropout(weights)
    return (weights @ v).transpose(1, 2).flatten(2)


@runtime_checkable
class Cache(Protocol):
    """Interface of a layer's keys and values of earlier tokens: `attend` adds those of new ones and attends to all."""

    def attend(
        self, q: Float[Tensor, "batch heads length head_dim"], keys: Float[Tensor, "batch kv_heads length head_dim"],
        values: Float[Tensor, "batch kv_heads length head_dim"], window: int | None, dropout: Dropout | None,
        scale: float | None,
    ) -> Hidden: ...  # fmt: skip


class Attention(nn.Module):
    """Self-attention (Vaswani et al., 2017, section 3.2): multi-head; grouped-query (Ainslie et al., 2023) with fewer
    `n_kv_heads` than `n_heads`; multi-query (Shazeer, 2019) with one. What may be seen is the mask's business.

    `window` limits each query to the last `window` tokens, itself included (Mistral, Jiang et al., 2023); the cost then
    grows with the window. `scale` is what the products are multiplied with, 1 / √head_dim where it is None. `rotary`
    turns queries and keys by their positions. `qk_norm` are the norms of queries and of keys [..., heads, head_dim],
    applied before the rotation (Henry et al., 2020): of each head (Qwen3, Gemma 3) or of all heads together (OLMo 2).
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
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_kv_heads ({n_kv_heads}) must divide n_heads ({n_heads}).")
        if head_dim is None and dim % n_heads:
            raise UserError(f"n_heads ({n_heads}) must divide dim ({dim}); choose another number or give head_dim.")
        inner, kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.qkv = JoinedLinear(dim, (inner, kv, kv), bias)
        self.out = Linear(inner, dim, bias if out_bias is None else out_bias)
        self.rotary = rotary
        self.q_norm, self.k_norm = qk_norm or (None, None)

    def forward(
        self, x: Hidden, mask: Mask | None = None, positions: Positions | None = None, cache: Cache | None = None
    ) -> Hidden:
        """With a cache `x` are new tokens, which see those before; otherwise `mask` says what is seen (None: all)."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        qk, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split([self.n_heads, self.n_kv_heads], 2)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], 2)
        if self.rotary is not None and positions is not None:
            qk = positions.rotation(self.rotary).apply(qk)
        q, k, v = qk[:, :, : self.n_heads].transpose(1, 2), qk[:, :, self.n_heads :].transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            return self.out(cache.attend(q, k, v, self.window, self.dropout, self.scale))
        visible = None if mask is None else mask.visible(k.shape[2], self.window)
        return self.out(attend(q, k, v, visible, self.dropout, self.scale))

    @property
    def residual_weights(self) -> list[Tensor]:
        """Return the matrices whose outputs are added to the residual stream."""
        return [self.out.weight]


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another (Vaswani et al., 2017, section 3.2.3)."""

    def __init__(
        self, dim: int, n_heads: int, context_dim: int | None = None, bias: bool = True, dropout: float = 0.0,
        out_bias: bool | None = None,
    ):  # fmt: skip
        super().__init__()
        if dim % n_heads:
            raise UserError(f"n_heads ({n_heads}) must divide dim ({dim}); choose another number.")
        self.n_heads, self.dropout = n_heads, Dropout(dropout)
        self.q, self.kv = Linear(dim, dim, bias), JoinedLinear(context_dim or dim, (dim, dim), bias)
        self.out = Linear(dim, dim, bias if out_bias is None else out_bias)

    def project(self, context: Float[Tensor, "batch seen context_dim"]) -> tuple[Tensor, Tensor]:
        """Keys and values of a context, [batch, heads, seen, head_dim] each: made once, used at every step."""
        k, v = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in self.kv(context).chunk(2, -1))
        return k, v

    def forward(self, x: Hidden, keys_values: tuple[Tensor, Tensor], mask: Mask) -> Hidden:
        k, v = keys_values
        q = self.q(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        return self.out(attend(q, k, v, mask.visible(k.shape[2], None), self.dropout))

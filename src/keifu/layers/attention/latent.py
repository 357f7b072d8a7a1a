"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1): one latent per token yields the keys and values of all
heads.

Axes: batch, length, dim, heads; rank = size of the latent, plain = numbers of a head without positions, turned = those
with rotary positions, value_dim = size of a head of values.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keifu.layers.attention.attention import Cache, CacheShape, Hidden, Scoring, attend
from keifu.layers.attention.masks import Mask
from keifu.layers.attention.positions import Positions, Rotary
from keifu.layers.dropout import Dropout
from keifu.layers.linear import Linear
from keifu.layers.normalisation import RMSNorm


class LowRankLinear(nn.Module):
    """Linear map through a bottleneck of `rank` numbers: up(norm(down(x)))."""

    def __init__(self, dim: int, rank: int, out_dim: int, bias: bool = False):
        super().__init__()
        self.down, self.norm, self.up = Linear(dim, rank, bias), RMSNorm(rank, 1e-6), Linear(rank, out_dim, False)

    def forward(self, x: Hidden) -> Float[Tensor, "batch length out_dim"]:
        return self.up(self.norm(self.down(x)))


class LatentAttention(nn.Module):
    """Attention that caches one latent for each token instead of keys and values of each head.

    Without a cache, keys and values are computed from the latents. With a cache, queries and results are multiplied
    with the matrices instead ("absorbed"), so that the latents serve as keys and values of a single head.

    q: computes the queries of all heads, heads · (plain + turned) numbers. scale: factor of the scores.
    """

    window = None

    def __init__(
        self, dim: int, n_heads: int, q: nn.Module, rank: int, plain: int, value_dim: int, rotary: Rotary,
        bias: bool = False, dropout: float = 0.0, scale: float | None = None,
    ):  # fmt: skip
        super().__init__()
        self.n_heads, self.rank, self.plain, self.value_dim = n_heads, rank, plain, value_dim
        self.q, self.rotary, self.dropout = q, rotary, Dropout(dropout)
        self.latent = Linear(dim, rank + rotary.head_dim, bias)
        self.latent_norm = RMSNorm(rank, 1e-6)
        self.kv = Linear(rank, n_heads * (plain + value_dim), bias=False)
        self.out = Linear(n_heads * value_dim, dim, bias)
        self.scale = (plain + rotary.head_dim) ** -0.5 if scale is None else scale

    def forward(
        self, x: Hidden, mask: Mask | None = None, positions: Positions | None = None, cache: Cache | None = None
    ) -> Hidden:
        """Attend. With a cache, `x` are new tokens, which also see the earlier ones. Otherwise `mask` determines what
        is visible (None: all)."""
        turned = self.rotary.head_dim
        q, q_turned = self.q(x).unflatten(-1, (self.n_heads, -1)).split([self.plain, turned], -1)
        latent, k_turned = self.latent(x)[:, :, None].split([self.rank, turned], -1)
        latent = self.latent_norm(latent)
        if positions is not None:
            rotation = positions.rotation(self.rotary)
            q_turned, k_turned = rotation.apply(q_turned), rotation.apply(k_turned)
        scoring = Scoring(self.dropout, self.scale)
        if cache is not None:
            to_keys, to_values = self._matrices(latent)
            queries = torch.cat([torch.einsum("blhp,hpr->blhr", q, to_keys), q_turned], -1).transpose(1, 2)
            keys = torch.cat([latent, k_turned], -1).transpose(1, 2)
            attended = cache.attend(queries, keys, None, None, scoring).unflatten(-1, (self.n_heads, -1))
            return self.out(torch.einsum("blhr,hvr->blhv", attended[..., : self.rank], to_values).flatten(-2))
        k, v = self.kv(latent[:, :, 0]).unflatten(-1, (self.n_heads, -1)).split([self.plain, self.value_dim], -1)
        k = torch.cat([k, k_turned.expand(-1, -1, self.n_heads, -1)], -1).transpose(1, 2)
        visible = None if mask is None else mask.visible(x.shape[1], None)
        queries = torch.cat([q, q_turned], -1).transpose(1, 2)
        return self.out(attend(queries, k, v.transpose(1, 2), visible, scoring))

    def _matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matrices from latents to keys (heads, plain, rank) and to values (heads, value_dim, rank).

        If `kv` was replaced, for example by a layer with adapters, its matrix is computed as the output for the
        identity.
        """
        if type(self.kv) is Linear:
            weight = self.kv.weight
        else:
            weight = self.kv(torch.eye(self.rank, dtype=like.dtype, device=like.device)).mT
        to_keys, to_values = weight.unflatten(0, (self.n_heads, -1)).split([self.plain, self.value_dim], 1)
        return to_keys, to_values

    @property
    def cache_shape(self) -> CacheShape:
        """Return the shape of the cached values of a token: its latent and the part with positions, once."""
        return CacheShape(1, self.rank + self.rotary.head_dim, 0)

    @property
    def residual_weights(self) -> list[Tensor]:
        """Return the matrices whose outputs are added to the residual stream."""
        return [self.out.weight]

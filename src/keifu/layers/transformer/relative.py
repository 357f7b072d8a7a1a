"""Encoder-decoder Transformer with relative position biases and a norm before each sublayer (T5, Raffel et al., 2020).

Axes: batch, length = queries, seen = keys, heads, dim, vocab; source_length = tokens of the source.
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.attention import Attention, attend
from keifu.layers.attention.masks import Biases, Mask
from keifu.layers.attention.positions import Positions
from keifu.layers.dropout import Dropout
from keifu.layers.feedforward import GatedFeedForward
from keifu.layers.linear import linear
from keifu.layers.transformer.encoder_decoder import (
    EncoderDecoderState,
    Hidden,
    Logits,
    Source,
    SourceMask,
    Target,
    write_target,
)


class RelativeBias(nn.Embedding):
    """Learned number for each head and bucket of distances between a query and a key (section 2.1).

    Half of the buckets are single distances; the others grow with the logarithm of the distance up to max_distance.
    both_sides: whether keys after the query have buckets of their own, as in the encoder.
    """

    def __init__(self, n_buckets: int, n_heads: int, max_distance: int, both_sides: bool):
        super().__init__(n_buckets, n_heads)
        self.max_distance, self.both_sides = max_distance, both_sides

    def biases(self, start: int, length: int, n_keys: int) -> Float[Tensor, "1 heads length seen"]:
        """Return the biases of `length` queries from position `start` on for the keys before position `n_keys`."""
        offsets = torch.arange(-(start + length - 1), n_keys - start, device="cpu")  # key minus query
        buckets = self._buckets(offsets)
        if int(buckets.min()) < 0:
            raise UserError(
                f"Relative positions with {self.num_embeddings} buckets and a largest distance of {self.max_distance} "
                f"have no bucket for {int(offsets.abs().max())} tokens: the distance must exceed half of the buckets."
            )
        values = F.embedding(buckets.to(self.weight.device), self.weight).T
        queries, keys = (torch.arange(n, device=values.device) for n in (length, n_keys))
        return values[:, keys[None] + (length - 1 - queries[:, None])][None]

    def _buckets(self, offsets: Int[Tensor, " offsets"]) -> Int[Tensor, " offsets"]:
        """Return the bucket of each offset, computed in float32 as in the released code, so that limits agree."""
        count, first = self.num_embeddings, torch.zeros_like(offsets)
        if self.both_sides:
            count //= 2
            first, distances = (offsets > 0).long() * count, offsets.abs()
        else:
            distances = (-offsets).clamp(min=0)
        exact = count // 2
        span = math.log(self.max_distance / exact)
        far = exact + ((distances.float() / exact).log() / span * (count - exact)).long()
        return first + torch.where(distances < exact, distances, far.clamp(max=count - 1))


class BiasedMask:
    """Biases of one pass, with -inf where a key is not visible. One object serves all layers of the pass."""

    def __init__(self, biases: Biases, visible: Bool[Tensor, "#batch 1 #length seen"] | None):
        self.biases = biases if visible is None else biases.masked_fill(~visible, -torch.inf)

    def visible(self, n_keys: int, window: int | None) -> Biases:
        return self.biases


class RelativeAttention(Attention):
    """Self-attention without a scale of the scores, to which the mask adds relative biases."""

    def __init__(self, dim: int, n_heads: int, head_dim: int, dropout: float = 0.0):
        super().__init__(dim, n_heads, head_dim=head_dim, bias=False, dropout=dropout, scale=1.0)

    def forward(
        self, x: Hidden, mask: Mask | None = None, positions: Positions | None = None, cache: Any = None
    ) -> Hidden:
        """Attend to the keys that the mask shows. With a cache, `x` are new tokens, which are added to it."""
        assert mask is not None, "relative biases are in the mask"
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out(attend(q, k, v, mask.visible(k.shape[2], None), self.scoring))


class DroppedGatedFeedForward(GatedFeedForward):
    """Gated network with dropout of the hidden units."""

    def __init__(self, dim: int, hidden_dim: int, activation: Any, dropout: float):
        super().__init__(dim, hidden_dim, activation)
        self.dropout = Dropout(dropout)

    def inner(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch hidden"]:
        return self.dropout(super().inner(x))


class RelativeEncoderDecoder(nn.Module):
    """Embedding, two stacks with their biases and final norms, and a head.

    head: None ties it to the embedding. scale: factor of the hidden states before the head.
    """

    def __init__(
        self, embedding: nn.Embedding, stacks: tuple[Sequence[nn.Module], Sequence[nn.Module]],
        biases: tuple[RelativeBias, RelativeBias], norms: tuple[nn.Module, nn.Module], head: nn.Linear | None,
        scale: float, dropout: float, config: Any,
    ):  # fmt: skip
        super().__init__()
        self.embedding, self.head, self.scale, self.config = embedding, head, scale, config
        self.encoder, self.decoder = map(nn.ModuleList, stacks)
        self.encoder_bias, self.decoder_bias = biases
        self.encoder_norm, self.norm = norms
        self.source_dropout, self.target_dropout = Dropout(dropout), Dropout(dropout)
        self.memory_dropout, self.output_dropout = Dropout(dropout), Dropout(dropout)

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse a method of other libraries' models, with the name of keifu's function."""
        raise UserError("A model of keifu has no generate: call keifu.inference.text.translation.translate_texts.")

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the blocks of both stacks."""
        return [*self.encoder, *self.decoder]

    def forward(self, source: Source, target: Target, source_mask: SourceMask | None = None) -> Logits:
        """Return logits of the token after each of the target. `source_mask` is True on real tokens."""
        return self.logits(self.hidden(target, self.start(source, source_mask)))

    def start(
        self, source: Source, source_mask: SourceMask | None = None, capacity: int | None = None
    ) -> EncoderDecoderState:
        """Read the sources, and return the state before the targets, with this capacity."""
        length = source.shape[1]
        visible = None if source_mask is None else source_mask[:, None, None]
        mask = BiasedMask(self.encoder_bias.biases(0, length, length), visible)
        x = self.source_dropout(self.embedding(source))
        for block in self.encoder:
            x = block(x, mask=mask)
        x, blocks = self.memory_dropout(self.encoder_norm(x)), list[Any](self.decoder)
        return EncoderDecoderState([b.cross_attention.project(x) for b in blocks], source_mask, blocks, capacity)

    def hidden(self, target: Target, state: EncoderDecoderState) -> Hidden:
        """Return the hidden states that predict the next token at each position. With a capacity, pass only the new
        tokens."""
        if len(target) != state.rows:
            raise ValueError(f"The state is for {state.rows} targets and was given tokens of {len(target)}.")
        first, length = state.length, target.shape[1]
        n_keys = first + length
        causal = torch.ones(length, n_keys, dtype=torch.bool, device=target.device).tril(first)[None, None]
        mask = BiasedMask(self.decoder_bias.biases(first, length, n_keys), causal)
        x = write_target(self.target_dropout(self.embedding(target)), state, self.decoder, mask)
        return self.output_dropout(self.norm(x)) * self.scale

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Apply only the head."""
        return linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        """The matrix of the head, for losses that do not need all logits at once."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> None:
        """Return None: the logits of this model have no bias."""
        return None

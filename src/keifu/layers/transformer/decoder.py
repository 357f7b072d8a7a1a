"""Decoder-only Transformer: a causal language model composed of the parts it is given.

Axes: batch, length = tokens, dim, vocab.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.kv_cache import Cache
from keifu.layers.attention.masks import CausalMask, DocumentMask, positions_in
from keifu.layers.attention.positions import LearnedPositions, Positions
from keifu.layers.dropout import Dropout
from keifu.layers.linear import linear

Hidden = Float[Tensor, "batch length dim"]


class ScaledEmbedding(nn.Embedding):
    """Embeddings times a number, √dim in Gemma; a head tied to them has them without it."""

    def __init__(self, vocab_size: int, dim: int, scale: float):
        super().__init__(vocab_size, dim)
        self.scale = scale

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:  # noqa: A002
        rows = super().forward(input)
        return rows * torch.tensor(self.scale, dtype=rows.dtype, device=rows.device)  # rounded as the rows are


class DecoderLM(nn.Module):
    """Embedding, blocks, norm, head. `head=None` ties the head to the embedding; `config` is what it was built from."""

    def __init__(
        self,
        embedding: nn.Embedding,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        positions: LearnedPositions | None = None,
        head: nn.Linear | None = None,
        dropout: float = 0.0,
        config: Any = None,
    ):
        super().__init__()
        self.embedding, self.blocks, self.norm = embedding, nn.ModuleList(blocks), norm
        self.positions, self.head = positions, head
        self.dropout = Dropout(dropout)
        self.config = config

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        caches: Sequence[Cache] | None = None,
        padding: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch length vocab"]:
        """Logits of the token after each. `caches` hold earlier tokens; `padding` counts each row's left padding."""
        return self.logits(self.hidden(tokens, caches, padding))

    def hidden(
        self,
        tokens: Int[Tensor, "batch length"],
        caches: Sequence[Cache] | None = None,
        padding: Int[Tensor, " batch"] | None = None,
        documents: Int[Tensor, "batch length"] | None = None,
    ) -> Hidden:
        """The last hidden states, after the last norm; positions count from each row's first real token.

        `documents` numbers the document of each token where a row holds several: none sees or counts another's.
        """
        start, length = caches[0].length if caches else 0, tokens.shape[1]
        positions = torch.arange(start, start + length, device=tokens.device)
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)
        if documents is not None:
            positions = positions_in(documents)
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(self._within(positions, start + length))
        x = self.dropout(x)
        context = {
            "mask": CausalMask(start, length, padding, tokens.device) if documents is None else DocumentMask(documents),
            "positions": Positions(positions),
        }
        for i, block in enumerate(self.blocks):
            x = block(x, **context, cache=caches[i] if caches else None)
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """The head alone, so that a prompt's last position can be had without the others."""
        return self.head(hidden) if self.head is not None else linear(hidden, self.embedding.weight)

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        """The matrix of the head, for losses that do not want all logits at once."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_caches(self, batch: int, capacity: int) -> list[Cache]:
        """Empty caches, one a block, for `capacity` tokens (padding included) in `batch` rows."""
        blocks: list[Any] = list(self.blocks)
        return [block.attention.new_cache(batch, capacity, self.embedding.weight) for block in blocks]

    def _within(self, positions: Tensor, length: int) -> Tensor:
        room = self.positions.num_embeddings if self.positions else length
        if length > room and int(positions.max()) >= room:
            raise UserError(
                f"{length} tokens do not fit the {room} positions that this model has learned; shorten them."
            )
        return positions

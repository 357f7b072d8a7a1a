"""Decoder-only Transformer: a causal language model composed of given parts.

Axes: batch, length = tokens, dim, vocab.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.attention import Cache, CacheShape
from keifu.layers.attention.kv_cache import KVState
from keifu.layers.attention.masks import CausalMask, DocumentMask, Mask, positions_in
from keifu.layers.attention.positions import LearnedPositions, Lengths, Positions
from keifu.layers.dropout import Dropout
from keifu.layers.linear import Linear, linear
from keifu.layers.losses.head import Head, SoftCappedHead
from keifu.layers.normalisation import PlainRMSNorm

Tokens = Int[Tensor, "batch length"]
Hidden = Float[Tensor, "batch length dim"]


class Inserted(NamedTuple):
    """Embeddings that replace those of tokens, such as a picture's. indices: their rows in the flattened batch."""

    indices: Int[Tensor, " count"]
    embeddings: Float[Tensor, "count dim"]

    def into(self, x: Hidden) -> Hidden:
        """Return the embeddings x of tokens with these inserted."""
        return x.flatten(0, 1).index_copy(0, self.indices, self.embeddings.to(x.dtype)).view_as(x)


class NormedEmbedding(nn.Embedding):
    """Embedding followed by a norm without weights (nanochat, 2025). A head tied to it uses the matrix without the
    norm."""

    def __init__(self, vocab_size: int, dim: int, eps: float):
        super().__init__(vocab_size, dim)
        self.scale = PlainRMSNorm(dim, eps)

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:  # noqa: A002
        return self.scale(super().forward(input))


class ScaledEmbedding(nn.Embedding):
    """Embedding times a constant, √dim in Gemma. A head tied to it uses the matrix without the constant."""

    def __init__(self, vocab_size: int, dim: int, scale: float):
        super().__init__(vocab_size, dim)
        self.scale = scale

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:  # noqa: A002
        rows = super().forward(input)
        return rows * rows.new_full((), self.scale)  # the constant is rounded to the embeddings' dtype


@runtime_checkable
class State(Protocol):
    """Interface of the state of earlier tokens: `positions` begins a pass, each layer uses its `layer`, `advance` ends
    the pass.

    `KVState` (attention/kv_cache.py) and `PagedState` (inference/text/paged) implement it; see `Cache`.

    longest: the largest number of tokens in a row. sequence_lengths: length of each token's sequence; None: the last
    position of the row + 1.
    """

    @property
    def longest(self) -> int: ...

    @property
    def sequence_lengths(self) -> Lengths: ...

    def positions(self, length: int, padding: Int[Tensor, " batch"] | None) -> Int[Tensor, "*batch length"]: ...

    def layer(self, index: int) -> Cache: ...

    def advance(self) -> None: ...


class DecoderLM(nn.Module):
    """Language model: embedding, blocks, norm, head. head: None ties the head to the embedding. config: the Config that
    the model was built from."""

    def __init__(
        self, embedding: nn.Embedding, blocks: Sequence[nn.Module], norm: nn.Module,
        positions: LearnedPositions | None = None, head: nn.Linear | None = None, dropout: float = 0.0,
        config: Any = None,
    ):  # fmt: skip
        super().__init__()
        self.embedding, self.blocks, self.norm = embedding, nn.ModuleList(blocks), norm
        self.positions, self.head = positions, head
        self.dropout = Dropout(dropout)
        self.config = config

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse a method of other libraries' models, with the name of keifu's function."""
        raise UserError("A model of keifu has no generate: call keifu.generate(model, tokenizer, prompt).")

    @classmethod
    def of(
        cls, config: Any, blocks: Sequence[nn.Module], norm: nn.Module, positions: LearnedPositions | None = None,
        embedding: nn.Embedding | None = None,
    ) -> "DecoderLM":  # fmt: skip
        """Build the model of a Config, which has the vocabulary size, the width, the dropout rate and whether the head
        is tied."""
        embedding = embedding or nn.Embedding(config.vocab_size, config.dim)
        head = None if config.tied else Linear(config.dim, config.vocab_size, bias=False)
        return cls(embedding, blocks, norm, positions, head, config.dropout, config)

    def forward(
        self, tokens: Tokens, state: State | None = None, padding: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch length vocab"]:
        """Return logits of the token after each. state: the state of earlier tokens. padding: number of left padding
        tokens of each row."""
        return self.logits(self.hidden(tokens, state, padding))

    def hidden(
        self, tokens: Tokens, state: State | None = None, padding: Int[Tensor, " batch"] | None = None,
        documents: Tokens | None = None, inserted: Inserted | None = None,
    ) -> Hidden:  # fmt: skip
        """Return the hidden states after the final norm. Positions count from each row's first real token.

        documents: document number of each token, for rows with several documents. Attention and positions stay within a
        document. inserted: embeddings that replace those of some tokens.
        """
        x = self.embedding(tokens) if inserted is None else inserted.into(self.embedding(tokens))
        if state is not None:
            return self._hidden(x, state.positions(tokens.shape[1], padding), state=state)
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device)
        if documents is not None:
            return self._hidden(x, positions_in(documents), mask=DocumentMask(documents))
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)
        return self._hidden(x, positions, mask=CausalMask(0, length, padding, tokens.device))

    def _hidden(self, x: Hidden, positions: Tensor, state: State | None = None, mask: Mask | None = None) -> Hidden:
        if self.positions is not None:
            x = x + self.positions(self._within(positions, x.shape[1] + (state.longest if state else 0)))
        x = self.dropout(x)
        shared = Positions(positions, None if state is None else state.sequence_lengths)
        for i, block in enumerate(self.blocks):
            x = block(x, mask=mask, positions=shared, cache=None if state is None else state.layer(i))
        if state is not None:
            state.advance()
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Apply only the head, so that logits of a prompt's last position need no others."""
        return self.head(hidden) if self.head is not None else linear(hidden, self.embedding.weight)

    @property
    def head_weight(self) -> Head:
        """The matrix of the head, for losses that do not need all logits at once."""
        return self.embedding.weight if self.head is None else self.head.weight

    def new_state(self, rows: int, capacity: int) -> KVState:
        """Return an empty key-value cache for `capacity` tokens in each of `rows` rows."""
        return KVState(self.cache_layers, rows, capacity, self.embedding.weight)

    @property
    def cache_layers(self) -> list[CacheShape]:
        """Return the shape of each layer's cache."""
        blocks: list[Any] = list(self.blocks)
        return [block.attention.cache_shape for block in blocks]

    def _within(self, positions: Tensor, longest: int) -> Tensor:
        room = self.positions.num_embeddings if self.positions else longest
        if longest > room and (longest := int(positions.max()) + 1) > room:
            raise UserError(f"{longest} tokens do not fit the {room} positions that this model learned; shorten them.")
        return positions


class SoftCappedLM(DecoderLM):
    """`DecoderLM` whose logits are limited to -c and c by c · tanh(logits / c), where c is `config.logit_cap` (Gemma 2,
    2024)."""

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Apply the head and the cap."""
        cap = self.config.logit_cap
        return cap * (super().logits(hidden) / cap).tanh()

    @property
    def head_weight(self) -> SoftCappedHead:
        """The matrix of the head, with its cap."""
        layer = self.embedding if self.head is None else self.head
        return SoftCappedHead(layer.weight, self.config.logit_cap)

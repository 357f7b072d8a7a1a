"""Encoder-decoder Transformer composed of given parts: the encoder reads a source, the decoder writes a target.

Axes: batch, length = tokens of the target, source_length, dim, vocab. A batch may have several rows for one source
(beams), which are then adjacent.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.kv_cache import KVState
from keifu.layers.attention.masks import CausalMask, Mask, PaddingMask
from keifu.layers.attention.positions import SinusoidalPositions
from keifu.layers.dropout import Dropout
from keifu.layers.linear import linear

Source = Int[Tensor, "batch source_length"]
SourceMask = Bool[Tensor, "batch source_length"]
Target = Int[Tensor, "batch length"]
Hidden = Float[Tensor, "batch length dim"]
Logits = Float[Tensor, "batch length vocab"]


class EncoderDecoderState:
    """State of the decoder: keys and values of the sources for each block, and those of the target so far.

    The rows of one source share its keys and values, as long as every source has the same number of rows and they are
    adjacent. decoder: the blocks. capacity: the most tokens of a target; None: a whole target is passed at once and not
    stored.
    """

    def __init__(
        self, memory: Sequence[tuple[Tensor, Tensor]], source_mask: Bool[Tensor, "sources source_length"] | None,
        decoder: Iterable[Any], capacity: int | None,
    ):  # fmt: skip
        shapes, keys = [block.attention.cache_shape for block in decoder], memory[0][0]
        self.memory, self.mask = memory, PaddingMask(source_mask)
        self.targets = None if capacity is None else KVState(shapes, len(keys), capacity, keys)
        self._source_mask = source_mask
        self._owners = torch.arange(len(memory[0][0]), device="cpu")  # index of each row's source

    @property
    def rows(self) -> int:
        """The number of targets."""
        return len(self._owners)

    @property
    def length(self) -> int:
        """The number of target tokens in the state; 0 without a capacity."""
        return 0 if self.targets is None else self.targets.longest

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows, in this order. A row may be repeated."""
        if self.targets is not None:
            self.targets.select(rows)
        owners = self._owners[rows.cpu()]
        owner_rows, counts = owners.unique_consecutive(return_counts=True)
        if len(counts) and bool((counts != counts[0]).any()):
            owner_rows = owners
        indices = torch.arange(len(owner_rows), device=owner_rows.device)
        if len(owner_rows) != len(self.memory[0][0]) or not torch.equal(owner_rows, indices):
            owner_indices = owner_rows.to(self.memory[0][0].device)
            self.memory = [(keys[owner_indices], values[owner_indices]) for keys, values in self.memory]
            self._source_mask = None if self._source_mask is None else self._source_mask[owner_indices]
            self.mask = PaddingMask(self._source_mask)
        self._owners = indices.repeat_interleave(len(rows) // max(len(owner_rows), 1))


def read_source(
    x: Hidden, source_mask: SourceMask | None, encoder: Iterable[nn.Module], cross_attention: Iterable[Any]
) -> list[tuple[Tensor, Tensor]]:
    """Return the keys and values of embedded sources, a pair for each block of the decoder."""
    mask = PaddingMask(source_mask)
    for block in encoder:
        x = block(x, mask=mask)
    return [attention.project(x) for attention in cross_attention]


def write_target(
    x: Hidden, state: EncoderDecoderState, decoder: Iterable[nn.Module], mask: Mask | None = None
) -> Hidden:
    """Run the decoder's blocks on embedded tokens. With a capacity, the tokens follow those in the state. mask: of the
    decoder's self-attention; None: causal."""
    mask, before = mask or CausalMask(0, x.shape[1], None, x.device), state.targets
    if before is not None:
        before.positions(x.shape[1])
    for i, block in enumerate(decoder):
        cache = None if before is None else before.layer(i)
        x = block(x, memory=state.memory[i], memory_mask=state.mask, mask=mask, cache=cache)
    if before is not None:
        before.advance()
    return x


class EncoderDecoder(nn.Module):
    """Embeddings, positions, encoder, decoder, head.

    embeddings: one for both languages, or the source's and the target's. head: None ties it to the target's embedding.
    scale: factor of the embeddings, before positions are added. config: the Config that the model was built from.
    """

    logits_bias: Tensor

    def __init__(
        self, embeddings: Sequence[nn.Embedding], encoder: Sequence[nn.Module], decoder: Sequence[nn.Module],
        positions: SinusoidalPositions, head: nn.Linear | None = None, scale: float = 1.0, dropout: float = 0.0,
        config: Any = None,
    ):  # fmt: skip
        super().__init__()
        self.embedding = embeddings[0] if len(embeddings) == 1 else None
        self.source_embedding, self.target_embedding = embeddings if len(embeddings) == 2 else (None, None)
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.positions, self.head, self.scale = positions, head, scale
        self.source_dropout, self.target_dropout = Dropout(dropout), Dropout(dropout)
        self.config = config
        self.register_buffer("logits_bias", torch.zeros(1, embeddings[-1].num_embeddings))

    def generate(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse a method of other libraries' models, with the name of keifu's function."""
        raise UserError("A model of keifu has no generate: call keifu.inference.text.translation.translate_texts.")

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the blocks of both stacks."""
        return [*self.encoder, *self.decoder]

    def forward(self, source: Source, target: Target, source_mask: SourceMask | None = None) -> Logits:
        """Return logits of the token after each of the target. `source_mask` is True on real tokens; padding is at the
        end."""
        return self.logits(self.hidden(target, self.start(source, source_mask)))

    def start(
        self, source: Source, source_mask: SourceMask | None = None, capacity: int | None = None
    ) -> EncoderDecoderState:
        """Read the sources, and return the state before the targets, with this capacity."""
        x = self.source_dropout(self._embedded(self.source_table, source, 0))
        blocks: list[Any] = list(self.decoder)
        memory = read_source(x, source_mask, self.encoder, [block.cross_attention for block in blocks])
        return EncoderDecoderState(memory, source_mask, blocks, capacity)

    def hidden(self, target: Target, state: EncoderDecoderState) -> Hidden:
        """Return the hidden states that predict the next token at each position. With a capacity, pass only the new
        tokens."""
        if len(target) != state.rows:
            raise ValueError(f"The state is for {state.rows} targets and was given tokens of {len(target)}.")
        x = self.target_dropout(self._embedded(self._of(self.target_embedding), target, state.length))
        return write_target(x, state, self.decoder)

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Apply only the head."""
        return linear(hidden, self.head_weight, self.head_bias)

    @property
    def source_table(self) -> nn.Embedding:
        """The embedding of the source."""
        return self._of(self.source_embedding)

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        """The matrix of the head, for losses that do not need all logits at once."""
        return self._of(self.target_embedding).weight if self.head is None else self.head.weight

    @property
    def head_bias(self) -> Float[Tensor, " vocab"]:
        """Return the bias of the logits. It is not learned; it is zero unless a checkpoint sets it."""
        return self.logits_bias[0]

    def _of(self, separate: nn.Embedding | None) -> nn.Embedding:
        """Return a side's separate embedding, or the shared one."""
        embedding = self.embedding if separate is None else separate
        assert embedding is not None
        return embedding

    def _embedded(self, embedding: nn.Embedding, tokens: Tensor, start: int) -> Hidden:
        x = embedding(tokens) * self.scale
        return x + self.positions(start, tokens.shape[1], x)

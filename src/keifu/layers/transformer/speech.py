"""Encoder-decoder for speech: convolutions over log-mel frames, an encoder, and a decoder that writes tokens.

Axes: batch, mels = frequency bands, frames = of the window, heard = frames / 2, length = tokens of the target, dim,
vocab.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.positions import LearnedPositions
from keifu.layers.dropout import Dropout
from keifu.layers.linear import linear
from keifu.layers.transformer.encoder_decoder import EncoderDecoderState, Hidden, read_source, write_target

Features = Float[Tensor, "batch mels frames"]
Tokens = Int[Tensor, "batch length"]


class ConvStem(nn.Module):
    """Two convolutions of width 3 over time; the second halves the number of frames (Whisper, section 2.2)."""

    def __init__(self, mels: int, dim: int):
        super().__init__()
        self.conv1 = nn.Conv1d(mels, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)

    def forward(self, features: Features) -> Float[Tensor, "batch heard dim"]:
        return F.gelu(self.conv2(F.gelu(self.conv1(features.to(self.conv1.weight.dtype))))).transpose(1, 2)


def spaced_sinusoids(length: int, dim: int) -> Float[Tensor, "length dim"]:
    """Return sines, then cosines, with wavelengths from 2π to exactly 10,000 · 2π (the code released with Whisper).

    The Transformer's last wavelength is one step shorter. The numbers are computed on the CPU, even if the model is
    built without memory.
    """
    rates = 10_000.0 ** -(torch.arange(dim // 2, device="cpu") / (dim // 2 - 1))
    angles = torch.arange(length, device="cpu")[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


Memory = list[tuple[Tensor, Tensor]]  # keys and values of the sound, for each block of the decoder


def check_window(features: Features, heard: int) -> None:
    """Raise UserError for sound of another length than the model's window, which has `heard` positions after
    the stem."""
    if features.shape[-1] != 2 * heard:
        raise UserError(f"A window of this model has {2 * heard} frames, and this sound has {features.shape[-1]}.")


class SpeechRecognizer(nn.Module):
    """Stem, positions, encoder and norm for sound; embedding, positions, decoder and norm for text; a tied head.

    lengths: positions of a window after the stem, and the most tokens of a target.
    """

    source_positions: Tensor

    def __init__(
        self, stem: nn.Module, embedding: nn.Embedding, stacks: tuple[Sequence[nn.Module], Sequence[nn.Module]],
        norms: tuple[nn.Module, nn.Module], lengths: tuple[int, int], dropout: float = 0.0, config: Any = None,
    ):  # fmt: skip
        super().__init__()
        heard, context_length = lengths
        self.stem, self.embedding, self.config = stem, embedding, config
        self.encoder, self.decoder = map(nn.ModuleList, stacks)
        self.encoder_norm, self.norm = norms
        self.positions = LearnedPositions(context_length, embedding.embedding_dim)
        sinusoids = spaced_sinusoids(heard, embedding.embedding_dim)
        self.register_buffer("source_positions", sinusoids.to(embedding.weight.device))
        self.source_dropout, self.target_dropout = Dropout(dropout), Dropout(dropout)

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the blocks of both stacks."""
        return [*self.encoder, *self.decoder]

    def forward(self, features: Features, target: Tokens) -> Float[Tensor, "batch length vocab"]:
        """Return logits of the token after each of the target."""
        return self.logits(self.hidden(target, self.listen(features)))

    def listen(self, features: Features, capacity: int | None = None) -> EncoderDecoderState:
        """Encode windows of sound. capacity: the most tokens of a target, for decoding in steps."""
        return self.begin(self.encode(features), capacity)

    def encode(self, features: Features) -> Memory:
        """Return the keys and values of windows of sound, for each block of the decoder."""
        check_window(features, len(self.source_positions))
        x = self.source_dropout(self.stem(features) + self.source_positions)
        blocks: list[Any] = list(self.decoder)
        for block in self.encoder:
            x = block(x)
        return read_source(self.encoder_norm(x), None, (), [block.cross_attention for block in blocks])

    def begin(self, memory: Memory, capacity: int | None = None) -> EncoderDecoderState:
        """Return the state before the first token of the targets; see `listen`."""
        return EncoderDecoderState(memory, None, self.decoder, capacity)

    def hidden(self, target: Tokens, state: EncoderDecoderState) -> Hidden:
        """Return hidden states that predict the token after each. With a capacity, pass only the new tokens."""
        start, stop = state.length, state.length + target.shape[1]
        if stop > self.positions.num_embeddings:
            raise UserError(f"{stop} tokens do not fit the {self.positions.num_embeddings} that this model writes.")
        x = self.embedding(target) + self.positions.weight[start:stop]
        return self.norm(write_target(self.target_dropout(x), state, self.decoder))

    def write(
        self, target: Tokens, state: EncoderDecoderState, positions: Sequence[int]
    ) -> Float[Tensor, "batch wanted vocab"]:
        """Return the logits after the new tokens at these positions."""
        return self.logits(self.hidden(target, state)[:, list(positions)])

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocab"]:
        """Apply only the head."""
        return linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        """The matrix of the head, which is the embedding."""
        return self.embedding.weight

    @property
    def head_bias(self) -> None:
        """Return None: the logits of this model have no bias."""
        return None

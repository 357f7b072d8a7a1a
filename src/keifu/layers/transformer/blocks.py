"""Transformer blocks: attention and feed-forward on the residual stream, with norms before or after them.

Axes: batch, length, dim. A block passes all other arguments to its attention.
"""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.layers.dropout import Dropout

Stream = Float[Tensor, "batch length dim"]
TwoNorms = tuple[nn.Module, nn.Module]


class _TwoSublayers(nn.Module):
    """Attention, then feed-forward, each with a norm. The subclass determines where the norms are applied."""

    def __init__(self, attention: nn.Module, feedforward: nn.Module, norms: TwoNorms, dropout: float = 0.0):
        super().__init__()
        self.attention, self.feedforward = attention, feedforward
        self.attention_norm, self.feedforward_norm = norms
        self.attention_dropout, self.feedforward_dropout = Dropout(dropout), Dropout(dropout)


class PreNorm(_TwoSublayers):
    """Block x + attention(norm(x)), then x + feedforward(norm(x)): GPT-2 and most later models (Radford et al.,
    2019)."""

    def forward(self, x: Stream, **context: Any) -> Stream:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), **context))
        return x + self.feedforward_dropout(self.feedforward(self.feedforward_norm(x)))


class AdaptiveNormZero(_TwoSublayers):
    """Block x + gate · attention(norm(x) · (1 + scale) + shift), then the same with the feed-forward network:
    AdaLN-zero (DiT, Peebles and Xie, 2022, section 3.2).

    `modulation` computes shift, scale and gate of both from a condition. Its weights start at zero, so that the block
    starts as the identity.
    """

    def __init__(
        self, attention: nn.Module, feedforward: nn.Module, norms: TwoNorms, modulation: nn.Module, dropout: float = 0.0
    ):
        super().__init__(attention, feedforward, norms, dropout)
        self.modulation = modulation

    def forward(self, x: Stream, condition: Float[Tensor, "batch dim"], **context: Any) -> Stream:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        attended = self.attention(modulate(self.attention_norm(x), shift1, scale1), **context)
        x = x + gate1 * self.attention_dropout(attended)
        return x + gate2 * self.feedforward(modulate(self.feedforward_norm(x), shift2, scale2))


def modulate(x: Stream, shift: Float[Tensor, "batch 1 dim"], scale: Float[Tensor, "batch 1 dim"]) -> Stream:
    """Return x · (1 + scale) + shift. For a normalised x this is adaptive layer norm."""
    return x * (1 + scale) + shift


class ScaledPreNorm(_TwoSublayers):
    """Block x + scale · attention(norm(x)), then x + scale · feedforward(norm(x)) (Granite, 2024; from µP)."""

    def __init__(self, *layers: Any, scale: float):
        super().__init__(*layers)
        self.scale = scale

    def forward(self, x: Stream, **context: Any) -> Stream:
        x = x + self.scale * self.attention_dropout(self.attention(self.attention_norm(x), **context))
        return x + self.scale * self.feedforward_dropout(self.feedforward(self.feedforward_norm(x)))


class ReorderedNorm(_TwoSublayers):
    """Block x + norm(attention(x)), then x + norm(feedforward(x)) (Swin Transformer V2, Liu et al., 2021; OLMo 2,
    2024)."""

    def forward(self, x: Stream, **context: Any) -> Stream:
        x = x + self.attention_dropout(self.attention_norm(self.attention(x, **context)))
        return x + self.feedforward_dropout(self.feedforward_norm(self.feedforward(x)))


class _WithSource(_TwoSublayers):
    """Block with cross-attention to a source, with its own norm, between its two sublayers."""

    def __init__(
        self, attention: nn.Module, cross_attention: nn.Module, feedforward: nn.Module,
        norms: tuple[nn.Module, nn.Module, nn.Module], dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(attention, feedforward, (norms[0], norms[2]), dropout)
        self.cross_attention: nn.Module = cross_attention
        self.cross_attention_norm = norms[1]
        self.cross_attention_dropout = Dropout(dropout)

    def _look(self, x: Stream, memory: tuple[Tensor, Tensor], memory_mask: Any) -> Stream:
        """Attend to the source. Rows of one source are adjacent; they are joined to one longer row."""
        by_source = x.reshape(len(memory[0]), -1, x.shape[-1])
        return self.cross_attention_dropout(self.cross_attention(by_source, memory, memory_mask).reshape(x.shape))


class CrossPreNorm(_WithSource, PreNorm):
    """`PreNorm` with cross-attention between its two sublayers (latent diffusion: Rombach et al., 2022, E.2.1; Whisper:
    Radford et al., 2022)."""

    def forward(self, x: Stream, memory: tuple[Tensor, Tensor], memory_mask: Any, **context: Any) -> Stream:
        """Return the stream after the block. memory: keys and values of the source, from `cross_attention.project`."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), **context))
        x = x + self._look(self.cross_attention_norm(x), memory, memory_mask)
        return x + self.feedforward_dropout(self.feedforward(self.feedforward_norm(x)))


class SandwichNorm(nn.Module):
    """Block x + norm(attention(norm(x))), then x + norm(feedforward(norm(x))) (CogView, Ding et al., 2021; Gemma 2 and
    3)."""

    def __init__(
        self, attention: nn.Module, feedforward: nn.Module, norms: tuple[nn.Module, nn.Module, nn.Module, nn.Module],
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.attention, self.feedforward = attention, feedforward
        self.attention_norm, self.post_attention_norm, self.feedforward_norm, self.post_feedforward_norm = norms
        self.attention_dropout, self.feedforward_dropout = Dropout(dropout), Dropout(dropout)

    def forward(self, x: Stream, **context: Any) -> Stream:
        x = x + self.attention_dropout(self.post_attention_norm(self.attention(self.attention_norm(x), **context)))
        return x + self.feedforward_dropout(self.post_feedforward_norm(self.feedforward(self.feedforward_norm(x))))


class PostNorm(_TwoSublayers):
    """Block norm(x + attention(x)), then norm(x + feedforward(x)): the Transformer of 2017, GPT-1, BERT."""

    def forward(self, x: Stream, **context: Any) -> Stream:
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, **context)))
        return self.feedforward_norm(x + self.feedforward_dropout(self.feedforward(x)))


class CrossPostNorm(_WithSource, PostNorm):
    """`PostNorm` with cross-attention between its two sublayers: the decoder's block of the Transformer of 2017."""

    def forward(self, x: Stream, memory: tuple[Tensor, Tensor], memory_mask: Any, **context: Any) -> Stream:
        """Return the stream after the block. memory: keys and values of the source, from `cross_attention.project`."""
        x = self.attention_norm(x + self.attention_dropout(self.attention(x, **context)))
        x = self.cross_attention_norm(x + self._look(x, memory, memory_mask))
        return self.feedforward_norm(x + self.feedforward_dropout(self.feedforward(x)))


class Parallel(nn.Module):
    """Block x + attention(norm(x)) + feedforward(norm(x)), with one norm for both: GPT-J, PaLM (Chowdhery et al.,
    2022)."""

    def __init__(self, attention: nn.Module, feedforward: nn.Module, norm: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.attention, self.feedforward, self.norm = attention, feedforward, norm
        self.attention_dropout, self.feedforward_dropout = Dropout(dropout), Dropout(dropout)

    def forward(self, x: Stream, **context: Any) -> Stream:
        normed = self.norm(x)
        x = x + self.attention_dropout(self.attention(normed, **context))
        return x + self.feedforward_dropout(self.feedforward(normed))

"""The encoder-decoder with attention (Bahdanau, Cho and Bengio, 2014, "Neural Machine Translation by Jointly Learning
to Align and Translate"), and the earlier ones without attention (Cho et al., 2014; Sutskever et al., 2014).

New: the source is not one vector of fixed size but one state per token, from a bidirectional encoder. Before each word
the decoder takes a weighted mean of these states: attention. The weights are a softmax of the scores of a small
network, so that alignment is learned together with translation.

The paper is ambiguous about the state and the context in the output. Section 3.1 has g(y_{i-1}, s_i, c_i), the appendix
U_o s_{i-1} + V_o E y_{i-1} + C_o c_i (copies differ in the index of c). This file follows the appendix with c_i, the
context computed from s_{i-1}, so that y_{i-1} is combined with the current context. The paper's formulas have no
biases; here the recurrent layers, s_0 and the output's pairs have them. The reset gate is applied as in torch: see
`keifu.layers.recurrent.gru`.

Axes: batch, length = tokens of the target, source_length, dim = a state, width = a source token's state, vocab.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError, require_known
from keifu.layers.dropout import Dropout
from keifu.layers.initialisation import normal_
from keifu.layers.linear import Linear, linear
from keifu.layers.recurrent.attention_decoder import (
    AttentiveDecoder,
    DecoderState,
    DecoderSteps,
    FixedContextDecoder,
    PlainDecoder,
)
from keifu.layers.recurrent.gru import ENCODERS
from keifu.ranges import BelowOne, Count, Natural

Tokens = Int[Tensor, "batch length"]
Source = Int[Tensor, "batch source_length"]
SourceMask = Bool[Tensor, "batch source_length"]
Embedded = Float[Tensor, "batch length m"]


@dataclass(frozen=True)
class Config:
    """The defaults are RNNsearch-50 (section A.2.3). The paper calls `dim` n, `embedding_dim` m, `maxout_dim` l,
    `attention_dim` n'.

    encoder: "bidirectional", or "forward" as before this paper. context: the part of the source that the decoder reads
    at a step: "attention", "fixed" (Cho et al.: the encoder's final states at every step) or "none" (Sutskever et al.:
    only the decoder's first state). output: "maxout" of pairs, or "state", the new state itself. start_id, end_id,
    pad_id: ids of the tokens that begin a target, end either side and pad a row. context_length: that of the training.
    """

    vocab_size: Count = 30_000  # tokens in the vocabulary
    context_length: Count = 50  # longest training sequence in tokens
    dim: Count = 1000  # width n of the recurrent states
    embedding_dim: Count = 620  # width m of the token embeddings
    attention_dim: Count = 1000  # width n' of the attention
    maxout_dim: Count = 500  # width l of the maxout output
    encoder: str = "bidirectional"  # bidirectional or forward
    context: str = "attention"  # attention, fixed or none: what the decoder reads of the source
    output: str = "maxout"  # output layer: maxout or state
    head_bias: bool = False  # whether the head has a bias
    dropout: BelowOne = 0.0  # share of dropped activations
    target_vocab_size: Count | None = None  # tokens in the target's vocabulary; None: as vocab_size
    start_id: Natural = 0  # token that begins a target
    end_id: Natural = 1  # token that ends either side
    pad_id: Natural = 2  # token that pads shorter sequences

    def __post_init__(self) -> None:
        for field, known_names in (("encoder", ENCODERS), ("context", CONTEXTS), ("output", OUTPUTS)):
            require_known(field, vars(self)[field], known_names)


class Maxout(nn.Module):
    """Maxout over pairs of sums of the state, the previous word and the context (A.2.2)."""

    def __init__(self, config: Config, context_dim: int):
        super().__init__()
        self.dim = config.maxout_dim
        self.pairs = Linear(config.dim + config.embedding_dim + context_dim, 2 * config.maxout_dim)

    def forward(self, steps: DecoderSteps, embedded: Embedded) -> Float[Tensor, "batch length l"]:
        sums = self.pairs(torch.cat([steps.before, embedded, *steps.context], -1))
        return sums.unflatten(-1, (-1, 2)).amax(-1)


class LastState(nn.Module):
    """The decoder's new state itself, after it has read the previous word (Sutskever et al., 2014)."""

    def __init__(self, config: Config, context_dim: int):
        super().__init__()
        self.dim = config.dim

    def forward(self, steps: DecoderSteps, embedded: Embedded) -> Float[Tensor, "batch length dim"]:
        return steps.after


OUTPUTS = {"maxout": Maxout, "state": LastState}

CONTEXTS: dict[str, Callable[[Config, int], nn.Module]] = {
    "attention": lambda c, width: AttentiveDecoder(c.embedding_dim, c.dim, width, c.attention_dim),
    "fixed": lambda c, width: FixedContextDecoder(c.embedding_dim, c.dim, width),
    "none": lambda c, width: PlainDecoder(c.embedding_dim, c.dim),
}

_FORWARD_FIXED: dict[str, Any] = {"encoder": "forward", "context": "fixed"}
SIZES = {
    "rnnsearch-50": Config(),
    "rnnsearch-30": Config(context_length=30),
    "rnnencdec-50": Config(**_FORWARD_FIXED),
    "rnnencdec-30": Config(context_length=30, **_FORWARD_FIXED),
    # Park and Kim (2019): a word's letters to its phonemes. The context length is ours: the package allows any length.
    "g2p-en": Config(
        vocab_size=29, target_vocab_size=74, context_length=64, dim=256, embedding_dim=256, encoder="forward",
        context="none", output="state", head_bias=True, start_id=3, end_id=2, pad_id=0,
    ),
}  # fmt: skip


class Seq2Seq(nn.Module):
    """Embeddings, encoder, decoder, output and head; the Config selects their kinds."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        vocabularies = config.vocab_size, config.target_vocab_size or config.vocab_size
        self.source_embedding, self.target_embedding = (nn.Embedding(n, config.embedding_dim) for n in vocabularies)
        self.encoder = ENCODERS[config.encoder](config.embedding_dim, config.dim)
        self.decoder: Any = CONTEXTS[config.context](config, self.encoder.width)
        self.output: Any = OUTPUTS[config.output](config, self.decoder.context_dim)
        self.head = Linear(self.output.dim, vocabularies[1], config.head_bias)
        self.source_dropout, self.target_dropout = Dropout(config.dropout), Dropout(config.dropout)
        self.output_dropout = Dropout(config.dropout)

    def forward(
        self, source: Source, target: Tokens, source_mask: SourceMask | None = None
    ) -> Float[Tensor, "batch length vocab"]:
        """Return logits of the token after each of the target. `source_mask` is True on real tokens; padding is at the
        end."""
        return self.logits(self.hidden(target, self.start(source, source_mask)))

    def start(self, source: Source, source_mask: SourceMask | None = None, capacity: int | None = None) -> DecoderState:
        """Encode the sources and return the state of the decoder. Raises UserError for an empty source.

        capacity: the most target tokens in the state, for decoding in steps. None: a whole target is passed at once.
        """
        mask = torch.ones_like(source, dtype=torch.bool) if source_mask is None else source_mask
        reading = self.encoder(self.source_dropout(self.source_embedding(source)), mask)
        memory, hidden = self.decoder.start(reading)
        return DecoderState(memory, hidden, capacity)

    def hidden(self, target: Tokens, state: DecoderState) -> Float[Tensor, "batch length hidden"]:
        """Return hidden states that predict the next token. With a capacity, pass only the new tokens."""
        embedded = self.target_dropout(self.target_embedding(target))
        return self.output_dropout(self.output(self._steps(embedded, state), embedded))

    def alignment(
        self, source: Source, target: Tokens, source_mask: SourceMask | None = None
    ) -> Float[Tensor, "batch length source_length"]:
        """Return the attention weights of the source tokens for each prediction of a next target token (figure 3).

        Raises UserError for a model without attention.
        """
        weights = self._steps(self.target_embedding(target), self.start(source, source_mask)).weights
        if weights is None:
            raise UserError(f"A model whose context is {self.config.context!r} weighs no source tokens.")
        return weights

    def logits(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        """Apply only the head."""
        return linear(hidden, self.head.weight, self.head.bias)

    @property
    def head_weight(self) -> Float[Tensor, "vocab hidden"]:
        """The matrix of the head, for losses that compute logits in chunks."""
        return self.head.weight

    @property
    def head_bias(self) -> Float[Tensor, " vocab"] | None:
        """Return the bias of the logits."""
        return self.head.bias

    def _steps(self, embedded: Embedded, state: DecoderState) -> DecoderSteps:
        if len(embedded) != len(state.hidden):
            raise ValueError(f"The state is for {len(state.hidden)} targets and was given tokens of {len(embedded)}.")
        steps = self.decoder(embedded, state.memory, state.hidden)
        state.advance(steps.after[:, -1], embedded.shape[1])
        return steps


def build(config: Config) -> Seq2Seq:
    """Build a model with the paper's initialisation (appendix B.1): recurrent matrices orthogonal, W_a and U_a from
    N(0, 0.001²), v_a and all biases 0, other weights from N(0, 0.01²)."""
    model = Seq2Seq(config)
    normal_(model, std=0.01)
    for name, parameter in model.named_parameters():
        if name.endswith(".recurrent.weight"):
            for matrix in parameter.detach().split(config.dim):
                nn.init.orthogonal_(matrix)
        elif ".attention." in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.001)
    return model

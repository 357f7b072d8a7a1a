"""A pretrained decoder with a task head: fine-tuning as in GPT-1 (Radford et al., 2018, sections 3.2 and 3.3).

The decoder is unchanged. New are the embeddings of a few special tokens, and one matrix, which reads the hidden state
of a sequence's last token.

Axes: batch = examples, sequences = of one example, length = tokens, padded on the right, dim, answers = the logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import require_known
from keifu.layers.dropout import Dropout
from keifu.layers.initialisation import normal_
from keifu.layers.linear import Linear
from keifu.layers.losses.head import Head
from keifu.layers.transformer.decoder import DecoderLM

Tokens = Int[Tensor, "batch sequences length"]
Mask = Bool[Tensor, "batch sequences length"]
Extracted = Float[Tensor, "batch sequences dim"]


@dataclass(frozen=True)
class Config:
    """Config of a decoder with a task head.

    decoder: the decoder's Config. form: the input transformation (GPT-1, figure 1), which determines the head. labels:
    of a head for labels; empty if each example has its own answers. start_id, delimiter_id, extract_id: tokens around
    and between the parts of a sequence; None if none is added. bias: added to every logit; it matters for scores (a
    reward model's).
    """

    decoder: Any
    form: str = "classification"
    labels: tuple[str, ...] = ()
    start_id: int | None = None
    delimiter_id: int | None = None
    extract_id: int | None = None
    classifier_dropout: float = 0.1
    bias: float = 0.0

    @property
    def vocab_size(self) -> int:
        """The decoder's vocabulary size."""
        return self.decoder.vocab_size

    @property
    def context_length(self) -> int:
        """The decoder's context length."""
        return self.decoder.context_length

    @property
    def tied(self) -> bool:
        """Whether the decoder's head is its embedding."""
        return self.decoder.tied


class LabelHead(nn.Module):
    """Logits of labels, from the sum of the states of an example's sequences. There are two sequences if two texts have
    no order (similarity). No bias, as in the paper's equation 3."""

    def __init__(self, dim: int, labels: int):
        super().__init__()
        self.project = Linear(dim, labels, bias=False)

    def forward(self, extracted: Extracted, there: Bool[Tensor, "batch sequences"]) -> Float[Tensor, "batch answers"]:
        return self.project((extracted * there[..., None]).sum(1))


class AnswerHead(nn.Module):
    """A logit for each sequence, which ends in one of the answers; -inf for missing answers.

    The bias changes no probability; it exists because published weights have one.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.project = Linear(dim, 1)

    def forward(self, extracted: Extracted, there: Bool[Tensor, "batch sequences"]) -> Float[Tensor, "batch answers"]:
        return self.project(extracted).squeeze(-1).masked_fill(~there, -torch.inf)


class ScoreHead(nn.Module):
    """A score for each sequence, or for every position of one."""

    def __init__(self, dim: int):
        super().__init__()
        self.project = Linear(dim, 1, bias=False)

    def forward(
        self, hidden: Float[Tensor, "*batch dim"], there: Bool[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch"]:
        return self.project(hidden).squeeze(-1)


class ModelWithHead(nn.Module):
    """A decoder and a task head."""

    def __init__(self, decoder: DecoderLM, head: nn.Module, config: Config):
        super().__init__()
        self.decoder, self.task_head, self.config = decoder, head, config
        self.dropout = Dropout(config.classifier_dropout)

    def classify(self, tokens: Tokens, mask: Mask) -> Float[Tensor, "batch answers"]:
        """Return logits of the labels, or of an example's own answers. mask: True on real tokens, which come first."""
        return self.judge(self.hidden(tokens), mask)

    forward = classify

    def hidden(self, tokens: Tokens) -> Float[Tensor, "batch sequences length dim"]:
        """Return hidden states. Padding on the right does not affect real tokens, since attention is causal."""
        return self.decoder.hidden(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])

    def judge(self, hidden: Float[Tensor, "batch sequences length dim"], mask: Mask) -> Float[Tensor, "batch answers"]:
        """Return the head's logits from each sequence's last real token."""
        last = (mask.sum(-1) - 1).clamp(min=0)[..., None, None]
        extracted = hidden.gather(2, last.expand(-1, -1, -1, hidden.shape[-1])).squeeze(2)
        return self.task_head(self.dropout(extracted), mask.any(-1)) + self.config.bias

    def scores_along(self, tokens: Tokens) -> Float[Tensor, "batch sequences length"]:
        """Return the score at every token, of the sequence up to it. Only for score heads."""
        return self.task_head(self.hidden(tokens)) + self.config.bias

    @property
    def head_weight(self) -> Head:
        """The matrix of the decoder's head, for its language-modelling loss."""
        return self.decoder.head_weight


# form → builder of the head from the decoder's dim and the number of labels
HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "classification": LabelHead,
    "entailment": LabelHead,
    "similarity": LabelHead,
    "choice": lambda dim, labels: AnswerHead(dim),
    "score": lambda dim, labels: ScoreHead(dim),
}


def add_head(decoder: DecoderLM, config: Config) -> ModelWithHead:
    """Build a decoder with a new head, initialised from N(0, 0.02²)."""
    require_known("form", config.form, HEADS)
    head = HEADS[config.form](decoder.embedding.embedding_dim, len(config.labels))
    normal_(head, std=0.02)
    return ModelWithHead(decoder, head, config)


def builder(build: Callable[[Any], DecoderLM]) -> Callable[[Config], ModelWithHead]:
    """Return a function that builds a decoder with a head. build: builds the decoder."""
    return lambda config: add_head(build(config.decoder), config)


@torch.no_grad()
def shift(model: ModelWithHead, by: float) -> None:
    """Add the number `by` to every score of a model with a score head, in place.

    If the decoder's last norm has a bias, this bias is changed along the head's one row: so files in the published
    classes, whose head has no bias, include the shift. Otherwise the Config's bias is changed.
    """
    bias, row = getattr(model.decoder.norm, "bias", None), next(model.task_head.parameters())[0]
    if bias is None:
        model.config = replace(model.config, bias=model.config.bias + by)
    else:
        bias.add_(row.to(bias.dtype) * (by / row.float().square().sum()))


@torch.no_grad()
def grow_vocabulary(decoder: DecoderLM, vocab_size: int, fresh: Sequence[int]) -> None:
    """Grow the embedding and head of a decoder to at least `vocab_size` tokens. The tokens in `fresh` are initialised
    from N(0, 0.02²)."""
    table, head = decoder.embedding, decoder.head
    table.weight = _grow_rows(table.weight, vocab_size, fresh)
    table.num_embeddings = len(table.weight)
    if head is not None:
        head.weight = _grow_rows(head.weight, vocab_size, fresh)
        head.out_features = len(head.weight)
    decoder.config = replace(decoder.config, vocab_size=len(table.weight))


def _grow_rows(rows: Tensor, size: int, fresh: Sequence[int]) -> nn.Parameter:
    grown = torch.cat([rows, rows.new_zeros(max(0, size - len(rows)), rows.shape[1])])
    grown[list(fresh)] = 0.02 * torch.randn(len(fresh), rows.shape[1]).to(rows)
    return nn.Parameter(grown)

"""ln p of the tokens of answers, which every method that learns from answers of its own asks for; knows no reward.

Axes: batch = answers, length = tokens of a prompt and its answer, n = tokens of all answers, row by row.
"""

from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from keifu.layers.log_probabilities import token_log_probabilities
from keifu.training.protocols import Batch

Tokens = Float[Tensor, " n"]
TARGETS = ("advantage", "share")  # numbers of an answer that are no figures


class Chosen(NamedTuple):
    """Of each token of all answers: ln p, the entropy there in nats, and the answer that it is of."""

    logs: Tokens
    entropy: Tokens
    rows: Int[Tensor, " n"]


def answer_log_probabilities(model: Any, batch: Batch, temperature: float = 1.0) -> Chosen:
    """Of the tokens of batch["tokens"] [batch, length] that batch["mask"] marks, row by row.

    The model offers `hidden(tokens)` and `head_weight`.
    """
    tokens, mask = batch["tokens"], batch["mask"][:, 1:]
    hidden = model.hidden(tokens[:, :-1])[mask]
    found, entropy = token_log_probabilities(hidden, model.head_weight, tokens[:, 1:][mask], temperature)
    return Chosen(found, entropy, mask.nonzero()[:, 0])


def figures_of(batch: Batch) -> dict[str, Tensor]:
    """The sums of what a batch holds of each answer, a number each, to be told; and of the answers' lengths."""
    told = {name: each.sum() for name, each in batch.items() if each.dim() == 1 and name not in TARGETS}
    return told | {"length": batch["mask"].sum().float()}

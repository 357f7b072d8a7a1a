"""What BERT is pretrained to do, as a function of a model and a batch: fill in words, tell neighbours; knows no model.

Axes: row, place = tokens of a row, masked = the places of a row that are to be filled in, vocab.
"""

from typing import Any

import torch
from torch import Tensor

from keifu.layers.losses import IGNORED, cross_entropy, smoothed_linear_cross_entropy
from keifu.training.protocols import Batch, Outcome


def masked(model: Any, batch: Batch) -> Outcome:
    """The mean loss of the masked words plus that of the sentence pairs (Devlin et al., 2018, appendix A.2), in nats.

    A batch is what `keifu.data.masking.MaskedText` makes; without "random_next" there are words alone. The two means
    have two denominators, and the loop divides by one, the number of tokens: "word_weight" and "pair_weight" are that
    number by each of the two, for the whole batch that this may be a part of. The model offers `encode`, `pool`,
    `next_sentence`, `word_states`, `head_weight` and `head_bias`; only hidden words get logits. How many words are
    right is counted in evaluation mode alone, for it needs their logits again.
    """
    hidden = model.encode(batch["tokens"], batch.get("segments"), batch["mask"])
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    states, targets = model.word_states(hidden[rows, batch["places"]]), batch["targets"]
    head = model.head_weight, model.head_bias
    total = batch["word_weight"][0] * smoothed_linear_cross_entropy(states, *head, targets)[0]
    figures = {"word_loss": total}
    if not model.training:
        right = (torch.nn.functional.linear(states, *head).argmax(-1) == targets) & (targets != IGNORED)
        figures["word_accuracy"] = batch["word_weight"][0] * right.sum()
    if "random_next" in batch:
        loss, right = _pairs(model.next_sentence(model.pool(hidden)), batch["random_next"])
        figures |= {"pair_loss": batch["pair_weight"][0] * loss, "pair_accuracy": batch["pair_weight"][0] * right}
        total = total + figures["pair_loss"]
    return Outcome(total, batch["mask"].sum(), figures)


def _pairs(logits: Tensor, random_next: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of the pairs, and how many are right."""
    return cross_entropy(logits, random_next), (logits.argmax(-1) == random_next).sum()

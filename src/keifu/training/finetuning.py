"""What a decoder is fine-tuned to do, as a function of a model and a batch: a task, and beside it to go on writing.

It knows no loop and no particular model. Axes: batch = examples, sequences = of one example, length = tokens.
"""

from typing import Any

import torch
from torch import Tensor

from keifu.layers.losses import cross_entropy, linear_cross_entropy
from keifu.training.protocols import Batch, Outcome

LM_WEIGHT = 0.5  # of the paper (section 4.1)


def finetuning(model: Any, batch: Batch, lm_weight: float = LM_WEIGHT) -> Outcome:
    """-log p of the right label or answer batch["targets"] [batch], plus `lm_weight` times the loss of the words.

    (Radford et al., 2018, equations 4 and 5.) The loss of the words is that of each next token, special ones included,
    as a mean over a sequence's tokens and then over an example's sequences, as in the released code. batch["tokens"]
    and batch["mask"], True on real tokens, are [batch, sequences, length]. The model offers `hidden(tokens)`,
    `judge(hidden, mask)` and `head_weight`.
    """
    tokens, mask, targets = batch["tokens"], batch["mask"], batch["targets"]
    hidden = model.hidden(tokens)
    logits = model.judge(hidden, mask)
    task = total = cross_entropy(logits, targets)
    figures = {"accuracy": (logits.argmax(-1) == targets).sum(), "task_loss": task}
    if lm_weight:
        figures["lm_loss"] = _words(model.head_weight, hidden, tokens, mask)
        total = task + lm_weight * figures["lm_loss"]
    return Outcome(total, len(targets), figures)


def _words(head_weight: Tensor, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """The sum over examples of the mean loss of their words."""
    predicted = mask[..., 1:]
    counted = predicted.sum(-1, keepdim=True).clamp(min=1) * mask.any(-1).sum(-1)[:, None, None].clamp(min=1)
    shares = torch.where(predicted, 1.0 / counted, 0.0)
    return linear_cross_entropy(hidden[:, :, :-1], head_weight, tokens[..., 1:], mask=predicted, shares=shares)

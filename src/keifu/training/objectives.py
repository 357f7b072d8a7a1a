"""What a model is trained to do, as functions of a model and a batch; they know no loop and no particular model.

Axes: batch, length = tokens; each function gives sums over the elements that count.
"""

from typing import Any

from keifu.layers.losses import IGNORED, linear_cross_entropy
from keifu.training.protocols import Batch, Outcome


def causal(model: Any, batch: Batch) -> Outcome:
    """Next-token prediction: -log p of each token of batch["tokens"] [batch, length + 1] given those before it.

    The model offers `hidden(tokens)` and `head_weight`, so that never all logits exist. Where batch["mask"]
    [batch, length + 1] is there, only tokens for which it is True are predicted.
    """
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    if "mask" in batch:
        targets = targets.masked_fill(~batch["mask"][:, 1:], IGNORED)
    total = linear_cross_entropy(model.hidden(inputs), model.head_weight, targets)
    return Outcome(total, (targets != IGNORED).sum() if "mask" in batch else targets.numel())

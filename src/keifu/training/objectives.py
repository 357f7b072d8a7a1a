"""What a model is trained to do, as functions of a model and a batch; they know no loop and no particular model.

Axes: batch, length = tokens; each function gives sums over the elements that count.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor

from keifu.layers.losses import IGNORED, linear_cross_entropy
from keifu.training.protocols import Batch, Outcome


@runtime_checkable
class CausalModel(Protocol):
    """What a causal model offers to its loss."""

    head_weight: Tensor

    def hidden(self, tokens: Tensor) -> Tensor: ...


def causal(model: CausalModel, batch: Batch) -> Outcome:
    """Next-token prediction: -log p of each token of batch["tokens"] [batch, length + 1] given those before it.

    Where batch["mask"] [batch, length + 1] is there, only tokens for which it is True are predicted.
    """
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    if "mask" in batch:
        targets = targets.masked_fill(~batch["mask"][:, 1:], IGNORED)
    total = linear_cross_entropy(model.hidden(inputs), model.head_weight, targets)
    return Outcome(total, (targets != IGNORED).sum() if "mask" in batch else targets.numel())

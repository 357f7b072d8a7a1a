"""What a model is trained to do, as functions of a model and a batch; they know no loop and no particular model.

Axes: batch, length = tokens; each function gives sums over the elements that count.
"""

from typing import Any

from keifu.layers.losses import IGNORED, cross_entropy, smoothed_linear_cross_entropy
from keifu.training.protocols import Batch, Outcome


def causal(model: Any, batch: Batch, z_loss: float = 0.0) -> Outcome:
    """Next-token prediction: -log p of each token of batch["tokens"] [batch, length + 1] given those before it.

    The model offers `hidden(tokens)` and `head_weight`, so that never all logits exist. Where batch["mask"]
    [batch, length + 1] is there, only tokens for which it is True are predicted; where batch["documents"] is, none sees
    another document of its row. `z_loss` · log²Z a token, Z being the softmax's normaliser (PaLM, section 5), is for
    training mode alone, where the figure `nats` is the loss without it.
    """
    inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    if "mask" in batch:
        targets = targets.masked_fill(~batch["mask"][:, 1:], IGNORED)
    z_loss = z_loss if model.training else 0.0
    apart = {"documents": batch["documents"][:, :-1]} if "documents" in batch else {}
    hidden = model.hidden(inputs, **apart)
    total, nats = smoothed_linear_cross_entropy(hidden, model.head_weight, None, targets, z_loss=z_loss)
    figures = {"nats": nats} if z_loss else {}
    return Outcome(total, (targets != IGNORED).sum() if "mask" in batch else targets.numel(), figures)


def classification(model: Any, batch: Batch) -> Outcome:
    """-log p of the label batch["targets"] [batch] of each row of batch["tokens"] [batch, length].

    batch["mask"] [batch, length] is True on real tokens. The model offers `classify(tokens, segments, mask)`.
    """
    logits, targets = model.classify(batch["tokens"], None, batch["mask"]), batch["targets"]
    return Outcome(cross_entropy(logits, targets), len(targets), {"accuracy": (logits.argmax(-1) == targets).sum()})


def translation(model: Any, batch: Batch, label_smoothing: float = 0.0) -> Outcome:
    """Prediction of each token of batch["target"] [batch, length + 1] after its first, given those before it and
    batch["source"]; masks are True on real tokens.

    The model offers `start`, `hidden`, `head_weight` and `head_bias`, so that never all logits exist. Label smoothing
    (Szegedy et al., 2016) is for training mode alone, where the figure `nats` is the loss without it.
    """
    inputs, mask = batch["target"][:, :-1], batch["source_mask"]
    targets = batch["target"][:, 1:].masked_fill(~batch["target_mask"][:, 1:], IGNORED)
    whole = mask.device.type == "cpu" and bool(mask.all())  # a GPU would be waited for
    hidden = model.hidden(inputs, model.start(batch["source"], None if whole else mask))
    smoothing = label_smoothing if model.training else 0.0
    total, nats = smoothed_linear_cross_entropy(
        hidden, model.head_weight, model.head_bias, targets, label_smoothing=smoothing
    )
    return Outcome(total, (targets != IGNORED).sum(), {"nats": nats} if model.training else {})

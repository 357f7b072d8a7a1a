"""Losses as sums over elements, and their weights; knows no model and no loop.

Axes: `...` any leading axes, vocab = classes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED = -100  # the target of a position that does not count


def cross_entropy(
    logits: Float[Tensor, "*batch vocab"],
    targets: Int[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch"] | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """Sum over positions of -log p(target), in nats, computed in float32.

    `mask` is True where a position counts; targets equal to -100 never count. `label_smoothing` mixes the target with
    the uniform distribution (Szegedy et al., 2016, section 7). `z_loss` adds z_loss · log²Z per position, Z being the
    softmax's normaliser (PaLM, section 5).
    """
    logits, targets = logits.flatten(0, -2).float(), targets.flatten()
    if mask is not None:
        targets = targets.masked_fill(~mask.flatten(), IGNORED)
    total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing)
    if z_loss:
        log_z = logits.logsumexp(-1)
        total = total + z_loss * (log_z.square() * (targets != IGNORED)).sum()
    return total


def categorical_cross_entropy(
    logits: Float[Tensor, "batch classes"], targets: Float[Tensor, "batch classes"]
) -> Float[Tensor, ""]:
    """Sum over rows of -Σ target · log softmax(logits), in nats; each row of targets is a distribution (one-hot)."""
    return F.cross_entropy(logits, targets, reduction="sum")


def binary_cross_entropy(
    logits: Float[Tensor, "batch outputs"], targets: Float[Tensor, "batch outputs"]
) -> Float[Tensor, ""]:
    """Sum over rows of the mean over outputs of -t log σ(logit) - (1 - t) log(1 - σ(logit)), in nats."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1).sum()


def mean_squared_error(
    outputs: Float[Tensor, "batch outputs"], targets: Float[Tensor, "batch outputs"]
) -> Float[Tensor, ""]:
    """Sum over rows of the mean over outputs of (output - target)²."""
    return (outputs - targets).square().mean(-1).sum()


def mean_absolute_error(
    outputs: Float[Tensor, "batch outputs"], targets: Float[Tensor, "batch outputs"]
) -> Float[Tensor, ""]:
    """Sum over rows of the mean over outputs of |output - target|."""
    return (outputs - targets).abs().mean(-1).sum()


LOSSES = {  # of the rows of a network's outputs; divide by the number of rows for the mean
    "cross_entropy": categorical_cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mean_squared_error": mean_squared_error,
    "mean_absolute_error": mean_absolute_error,
}

"""Cross-entropy as a sum over positions: from logits, or from a head's inputs without all logits in memory.

Axes: `...` any leading axes, n = positions, dim, vocab = classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from keifu.layers.linear import product_dtype, triton_kernels
from keifu.layers.losses import head
from keifu.layers.losses.head import Head, SoftCappedHead, WithGradients, cap_, gradients_by_rows, slices

IGNORED = -100  # the target of a position that does not count


class Vocabulary(NamedTuple):
    """This rank's classes of a head that is split over several ranks.

    first: index of the rank's first class. total: number of classes of all ranks. gather: stacks a tensor of every rank
    along a new first axis.
    """

    first: int
    total: int
    gather: Callable[[Tensor], Tensor]


def cross_entropy(
    logits: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"], mask: Bool[Tensor, "*batch"] | None = None,
    label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the sum over positions of -log p(target), in nats, computed in float32.

    mask: True on positions that count; targets equal to -100 never count. label_smoothing: mixes the target with the
    uniform distribution (Szegedy et al., 2016, section 7). z_loss: adds z_loss · log²Z per position, where Z is the
    softmax's normaliser (PaLM, section 5).
    """
    logits, targets = logits.flatten(0, -2).float(), targets.flatten()
    if mask is not None:
        targets = targets.masked_fill(~mask.flatten(), IGNORED)
    total = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED, label_smoothing=label_smoothing)
    if z_loss:
        total = total + z_loss * (logits.logsumexp(-1).square() * (targets != IGNORED)).sum()
    return total


def linear_cross_entropy(
    hidden: Float[Tensor, "*batch dim"], weight: Head, bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, "*batch"], mask: Bool[Tensor, "*batch"] | None = None, label_smoothing: float = 0.0,
    z_loss: float = 0.0, shares: Float[Tensor, "*batch"] | None = None, vocabulary: Vocabulary | None = None,
    soft_cap: float = math.inf,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:  # fmt: skip
    """Return `cross_entropy(hidden @ weight.T + bias, ...)`, with few logits in memory at a time, and the sum of -log
    p(target). The forward pass computes the gradients.

    The second result has no gradient and no cost: it compares runs with different smoothing. Under autocast, matrix
    multiplications use its dtype; probabilities are always in float32. shares: factor of each position's loss; None: 1.
    vocabulary: this rank's classes, if weight and bias are split over ranks; the gradient of `hidden` is then this
    rank's part of a sum.
    """
    if isinstance(weight, SoftCappedHead):
        weight, soft_cap = weight
    if has_torch_function_unary(weight):  # a tensor subclass with its own implementation, as in torch's functions
        arguments = hidden, weight, bias, targets, mask, label_smoothing, z_loss, shares
        return handle_torch_function(linear_cross_entropy, (weight,), *arguments)
    targets = targets.flatten()
    if mask is not None:
        targets = targets.masked_fill(~mask.flatten(), IGNORED)
    dtype = product_dtype(weight)
    counts = targets != IGNORED if shares is None else shares.flatten() * (targets != IGNORED)
    rates = label_smoothing, z_loss
    inputs = hidden.flatten(0, -2), weight, bias
    needs_gradient = [tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in inputs]
    with torch.no_grad():
        if torch.compiler.is_compiling() and vocabulary is None:
            total, plain, *gradients = _operator(*inputs, targets, counts, *rates, dtype, needs_gradient, soft_cap)
        else:
            total, plain, *gradients = _gradients(
                *inputs, targets, counts, *rates, dtype, needs_gradient, soft_cap, vocabulary
            )
    return WithGradients.apply(total, tuple(gradients), *inputs), plain


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, counts: Tensor, label_smoothing: float,
    z_loss: float, dtype: torch.dtype, needs_gradient: Sequence[bool], soft_cap: float,
    vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, the sum of -log p, and the loss's gradients with respect to hidden, weight and bias; each is
    empty if not wanted."""

    def to_gradient(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        slopes = cap_(logits, soft_cap)
        sums = _to_gradient(logits, targets[part], counts[part], label_smoothing, z_loss, vocabulary)
        if slopes is not None:
            logits.mul_(slopes)
        return sums

    return gradients_by_rows(hidden, weight, bias, dtype, needs_gradient, to_gradient)


# torch.compile calls it unchanged; its own version would keep everything in float32
_operator = torch.library.custom_op(
    "keifu::linear_cross_entropy", _gradients, mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor counts, float label_smoothing, "
    "float z_loss, ScalarType dtype, bool[] wanted, float soft_cap) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@_operator.register_fake
def _shapes(hidden: Tensor, weight: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return empty tensors with the shapes and dtypes of the results of `_gradients`."""
    *_, dtype, needs_gradient, _soft_cap = settings
    by_parts = needs_gradient[1] and len(hidden) > max(1, head.LOGITS_AT_A_TIME // len(weight))
    total = hidden.new_empty((), dtype=torch.float32)
    full = hidden.shape, weight.shape, weight.shape[:1]
    shapes = [shape if is_used else (0,) for shape, is_used in zip(full, needs_gradient, strict=True)]
    types = dtype, weight.dtype if by_parts else dtype, torch.float32
    grads = [hidden.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, types, strict=True)]
    return total, torch.empty_like(total), grads[0], grads[1], grads[2]


def _to_gradient(
    logits: Tensor, targets: Tensor, counts: Tensor, label_smoothing: float, z_loss: float, classes: Vocabulary | None
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of these rows and the sum of -log p. Overwrite each logit with its gradient.

    counts: True for each row that counts, or its factor in the sum. A CPU computes a few rows at a time, whose
    probabilities fit its cache. Other devices, and ranks that each have some classes, compute all rows at once, in one
    kernel with Triton.
    """
    kernels = triton_kernels(logits.device)
    if kernels is not None and classes is None and logits.is_contiguous():
        loss, nats = kernels.cross_entropy_(logits, targets, counts, label_smoothing, z_loss)
        return loss.sum(), nats.sum()
    on_cpu = logits.device.type == "cpu"
    every = on_cpu and not torch.compiler.is_compiling() and counts.dtype == torch.bool and bool(counts.all())
    in_cache = on_cpu and classes is None
    parts = []
    for part in slices(len(logits), max(1, head.LOGITS_IN_CACHE // logits.shape[1])) if in_cache else [slice(None)]:
        rows = logits[part]
        loss, nats, gradient = _loss_and_gradient(rows, targets[part], label_smoothing, z_loss, classes)
        rows.copy_(gradient if every else gradient.mul_(counts[part, None]))
        parts.append((loss, nats))
    loss, nats = (torch.cat(values) * counts[:, None] for values in zip(*parts, strict=True))
    return loss.sum(), nats.sum()


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, classes: Vocabulary | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each row, -log p, and the loss's gradient with respect to the logits, all in float32."""
    right = targets.clamp(min=0)[:, None]
    gradient = torch.softmax(logits, -1, dtype=torch.float32)
    # the largest probability is never 0
    log_z = logits.amax(-1, keepdim=True).float() - gradient.amax(-1, keepdim=True).log()
    total, step = logits.shape[-1], torch.full_like(log_z, label_smoothing - 1)
    if classes is None:
        target_logits = logits.gather(-1, right).float()
        mean = logits.mean(-1, keepdim=True, dtype=torch.float32) if label_smoothing else target_logits
    else:
        local_z, total = log_z, classes.total
        inside = (right >= classes.first) & (right < classes.first + logits.shape[-1])
        right, step = (right - classes.first).where(inside, 0), step * inside
        mine = logits.gather(-1, right) * inside, logits.sum(-1, keepdim=True, dtype=torch.float32)
        gathered = classes.gather(torch.stack([local_z, *mine]))
        log_z, target_logits, mean = gathered[:, 0].logsumexp(0), gathered[:, 1].sum(0), gathered[:, 2].sum(0) / total
        gradient *= (local_z - log_z).exp()
    nats = loss = log_z - target_logits
    if z_loss:
        loss = loss + z_loss * log_z.square()
        gradient *= 1 + 2 * z_loss * log_z
    if label_smoothing:
        loss = loss + label_smoothing * (log_z - mean - nats)
        gradient -= label_smoothing / total
    gradient.scatter_add_(-1, right, step)
    return loss, nats, gradient

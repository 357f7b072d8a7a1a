"""Divergence of a student's distribution of the next token from a teacher's, without all logits in memory.

Axes: n = positions, dim, vocab = classes.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from keifu.layers.linear import linear, product_dtype
from keifu.layers.losses import head
from keifu.layers.losses.head import WithGradients, gradients_by_rows, slices


def linear_divergence(
    hidden: Float[Tensor, "n dim"], weight: Float[Tensor, "vocab dim"], teacher: Float[Tensor, "n teacher_dim"],
    teacher_weight: Float[Tensor, "vocab teacher_dim"] | None, beta: float, temperature: float = 1.0,
) -> Float[Tensor, ""]:  # fmt: skip
    """Return the sum over positions of the divergence of the student's softmax(hidden @ weight.T / temperature) from
    the teacher's softmax(teacher @ teacher_weight.T / temperature), in nats. The forward pass computes the gradients.

    teacher_weight: None if `teacher` is the teacher's logits. Let p be the teacher's distribution, q the student's, and
    M = beta p + (1 - beta) q. The result is beta KL(p | M) + (1 - beta) KL(q | M), the generalised Jensen-Shannon
    divergence (Agarwal et al., 2023, equation 1). beta 0 is KL(p | q), forward; 1 is KL(q | p), reverse. The teacher
    has no gradient.
    """
    dtype = product_dtype(weight)
    matrix = None if teacher_weight is None else teacher_weight.detach().to(dtype)
    theirs = teacher.detach() if matrix is None else teacher.detach().to(dtype)

    def to_gradient(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        teacher_logits = theirs[part] if matrix is None else linear(theirs[part], matrix)
        return (total := _divergence_to_gradient(logits, teacher_logits, beta, temperature)), total

    needs_gradient = [tensor.requires_grad and torch.is_grad_enabled() for tensor in (hidden, weight)]
    with torch.no_grad():
        total, _, *gradients = gradients_by_rows(hidden, weight, None, dtype, [*needs_gradient, False], to_gradient)
    return WithGradients.apply(total, tuple(gradients[:2]), hidden, weight)


def _divergence_to_gradient(logits: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Return the summed divergence of these rows. Overwrite each of the student's logits with its gradient. A CPU
    computes a few rows at a time, whose probabilities fit its cache."""
    size = max(1, head.LOGITS_IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    total = logits.new_zeros((), dtype=torch.float32)
    for part in slices(len(logits), max(1, size)):
        mine, theirs = (F.log_softmax(scores[part].float() / temperature, -1) for scores in (logits, teacher))
        loss, gradient = _divergence(mine, theirs, beta)
        logits[part] = gradient.div_(temperature).to(logits.dtype)
        total = total + loss
    return total


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the sum over rows of the divergence of log-probabilities, and its gradient with respect to the student's
    logits."""
    if beta == 0:
        shares, guesses = teacher.exp(), student.exp()
        return (shares * (teacher - student)).sum(), guesses.sub_(shares)
    share = 1.0 if beta == 1 else 1 - beta
    mixture = teacher if beta == 1 else torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    guesses = student.exp()
    gaps = guesses * (student - mixture)
    kl = gaps.sum(-1, keepdim=True)
    loss = share * kl.sum()
    if beta != 1:
        loss = loss + beta * (teacher.exp() * (teacher - mixture)).sum()
    return loss, share * gaps.sub_(guesses.mul_(kl))

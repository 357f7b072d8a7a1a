"""Multiplication with an output head's matrix, and the gradients of a loss, with the logits of only some rows in
memory.

Axes: n = positions, dim, vocab = classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.layers.linear import linear, product

LOGITS_AT_A_TIME = 2**26  # 256 MiB in float32
_CLASSES_AT_A_TIME = 2**14  # oneDNN is a fifth slower if it multiplies 50,257 columns at once
LOGITS_IN_CACHE = 2**20  # 4 MiB of float32 probabilities


class SoftCappedHead(NamedTuple):
    """A head's matrix whose logits are soft_cap · tanh(logits / soft_cap) (Gemma 2, 2024)."""

    weight: Float[Tensor, "vocab dim"]
    soft_cap: float


Head = Float[Tensor, "vocab dim"] | SoftCappedHead


def cap_(logits: Tensor, soft_cap: float) -> Tensor | None:
    """Replace the logits by soft_cap · tanh(logits / soft_cap), in place. Return the slopes, or None without a cap."""
    if soft_cap == math.inf:
        return None
    shares = logits.div_(soft_cap).tanh_()
    slopes = 1 - shares.square()
    shares.mul_(soft_cap)
    return slopes


def slices(length: int, size: int) -> list[slice]:
    """Return the parts of `length` rows, of at most `size` rows each."""
    return [slice(start, start + size) for start in range(0, length, size)]


def gradients_by_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, needs_gradient: Sequence[bool],
    to_gradient: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return two sums of `to_gradient` over all rows, and the gradients of the first one with respect to hidden, weight
    and bias; an output that is not wanted is empty.

    to_gradient: gets the logits of some rows, overwrites them with their gradient, and returns two sums. So only the
    logits of some rows are in memory. Gradients have the dtype of the matrix multiplications, but the weight's has the
    weight's dtype if it is a sum over several parts.
    """
    low, matrix, added = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    d_hidden = torch.empty_like(low) if needs_gradient[0] else low.new_empty(0)
    # without rows, the loop does not write it
    d_weight = low.new_empty(0) if len(low) or not needs_gradient[1] else torch.zeros_like(matrix)
    classes = 0 if len(low) or not needs_gradient[2] else len(weight)
    total, plain, d_bias = (low.new_zeros(shape, dtype=torch.float32) for shape in ((), (), classes))
    for part in slices(len(low), max(1, LOGITS_AT_A_TIME // len(weight))):
        logits = linear(low[part], matrix, added)
        loss, nats = to_gradient(logits, part)
        total, plain = total + loss, plain + nats
        if needs_gradient[0]:
            d_hidden[part] = product(logits, matrix)
        if needs_gradient[1]:
            change = torch.empty_like(matrix)
            for some in slices(len(matrix), _CLASSES_AT_A_TIME):
                change[some] = product(logits[:, some].T, low[part])
            d_weight = d_weight.to(weight.dtype).add_(change) if part.start else change
        if needs_gradient[2]:
            sums = logits.sum(0, dtype=torch.float32)
            d_bias = d_bias.add_(sums) if part.start else sums
    return total, plain, d_hidden, d_weight, d_bias


class WithGradients(torch.autograd.Function):
    """The loss, with gradients that are already computed."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.types = [None if tensor is None else tensor.dtype for tensor in inputs]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.types, ctx.needs_input_grad[2:], strict=True)
        return (
            None,
            None,
            *(gradient.to(dtype) * upstream[0] if is_needed else None for gradient, dtype, is_needed in pairs),
        )

"""Losses as sums over elements with their weights, and log-probabilities of given tokens, without all logits in memory.

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

from keifu.layers.linear import linear, product, triton_kernels

Outputs = Float[Tensor, "batch outputs"]

IGNORED = -100  # the target of a position that does not count
_LOGITS_AT_A_TIME = 2**26  # 256 MiB in float32
_CLASSES_AT_A_TIME = 2**14  # oneDNN multiplies 50,257 columns at once by a fifth slower
_LOGITS_IN_CACHE = 2**20  # 4 MiB of float32 probabilities


class SoftCappedHead(NamedTuple):
    """A head's matrix whose logits are soft_cap · tanh(logits / soft_cap) (Gemma 2, 2024)."""

    weight: Float[Tensor, "vocab dim"]
    soft_cap: float


Head = Float[Tensor, "vocab dim"] | SoftCappedHead


class Vocabulary(NamedTuple):
    """The classes of a head of which each of several processes has some.

    first: the number of this process's first one. total: of all processes. gather: gives the same tensor of every
    process, one behind the other along a new first axis.
    """

    first: int
    total: int
    gather: Callable[[Tensor], Tensor]


def cross_entropy(
    logits: Float[Tensor, "*batch vocab"], targets: Int[Tensor, "*batch"], mask: Bool[Tensor, "*batch"] | None = None,
    label_smoothing: float = 0.0, z_loss: float = 0.0,
) -> Float[Tensor, ""]:  # fmt: skip
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


def linear_cross_entropy(
    hidden: Float[Tensor, "*batch dim"], weight: Head, bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, "*batch"], mask: Bool[Tensor, "*batch"] | None = None, label_smoothing: float = 0.0,
    z_loss: float = 0.0, shares: Float[Tensor, "*batch"] | None = None, vocabulary: Vocabulary | None = None,
    soft_cap: float = math.inf,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:  # fmt: skip
    """`cross_entropy(hidden @ weight.T + bias, ...)` with its gradient made on the way, so that few logits exist at a
    time, and the sum of -log p(target).

    The second has no gradient and costs nothing: runs with different smoothing are compared by it. Where autocast is
    on, the products are in its type; probabilities are in float32 either way. `shares` are what each position's loss is
    multiplied with, 1 where None. vocabulary: where weight and bias are those of some classes alone; the gradient of
    `hidden` is then this process's part of a sum.
    """
    if isinstance(weight, SoftCappedHead):
        weight, soft_cap = weight
    if has_torch_function_unary(weight):  # a tensor that says itself how, as torch's own functions ask
        given = hidden, weight, bias, targets, mask, label_smoothing, z_loss, shares
        return handle_torch_function(linear_cross_entropy, (weight,), *given)
    targets = targets.flatten()
    if mask is not None:
        targets = targets.masked_fill(~mask.flatten(), IGNORED)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    counts = targets != IGNORED if shares is None else shares.flatten() * (targets != IGNORED)
    rates = label_smoothing, z_loss
    inputs = hidden.flatten(0, -2), weight, bias
    wanted = [tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in inputs]
    with torch.no_grad():
        if torch.compiler.is_compiling() and vocabulary is None:
            total, plain, *gradients = _operator(*inputs, targets, counts, *rates, dtype, wanted, soft_cap)
        else:
            given = targets, counts, *rates, dtype, wanted, soft_cap, vocabulary
            total, plain, *gradients = _gradients(*inputs, *given)
    return _WithGradients.apply(total, tuple(gradients), *inputs), plain


def _gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, counts: Tensor, label_smoothing: float,
    z_loss: float, dtype: torch.dtype, wanted: Sequence[bool], soft_cap: float, vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, the sum of -log p, and the loss's gradients by hidden, weight and bias, each empty where not
    wanted."""

    def to_gradient(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        slopes = cap_(logits, soft_cap)
        sums = _to_gradient(logits, targets[part], counts[part], label_smoothing, z_loss, vocabulary)
        if slopes is not None:
            logits.mul_(slopes)
        return sums

    return _gradients_by_rows(hidden, weight, bias, dtype, wanted, to_gradient)


def cap_(logits: Tensor, soft_cap: float) -> Tensor | None:
    """Put soft_cap · tanh(logits / soft_cap) in the logits' place; return the slopes, or None without a cap."""
    if soft_cap == math.inf:
        return None
    shares = logits.div_(soft_cap).tanh_()
    slopes = 1 - shares.square()
    shares.mul_(soft_cap)
    return slopes


def _gradients_by_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, wanted: Sequence[bool],
    to_gradient: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return two sums of `to_gradient`, and the first one's gradients by hidden, weight and bias, each empty where not
    wanted.

    They are made while the logits of some rows are at hand, so that these are never all kept: `to_gradient` makes the
    gradient of the logits in their place. The type is that of the matrix multiplications, but the weight's own where a
    gradient is the sum of several.
    """
    low, matrix, added = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    d_hidden = torch.empty_like(low) if wanted[0] else low.new_empty(0)
    d_weight = low.new_empty(0) if len(low) or not wanted[1] else torch.zeros_like(matrix)  # no part writes it
    classes = 0 if len(low) or not wanted[2] else len(weight)
    total, plain, d_bias = (low.new_zeros(shape, dtype=torch.float32) for shape in ((), (), classes))
    for part in _slices(len(low), max(1, _LOGITS_AT_A_TIME // len(weight))):
        logits = linear(low[part], matrix, added)
        loss, nats = to_gradient(logits, part)
        total, plain = total + loss, plain + nats
        if wanted[0]:
            d_hidden[part] = product(logits, matrix)
        if wanted[1]:
            change = torch.empty_like(matrix)
            for some in _slices(len(matrix), _CLASSES_AT_A_TIME):
                change[some] = product(logits[:, some].T, low[part])
            d_weight = d_weight.to(weight.dtype).add_(change) if part.start else change
        if wanted[2]:
            sums = logits.sum(0, dtype=torch.float32)
            d_bias = d_bias.add_(sums) if part.start else sums
    return total, plain, d_hidden, d_weight, d_bias


_operator = torch.library.custom_op(  # torch.compile calls it as it is: its own form would keep all in float32
    "keifu::linear_cross_entropy", _gradients, mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor counts, float label_smoothing, "
    "float z_loss, ScalarType dtype, bool[] wanted, float soft_cap) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip


@_operator.register_fake
def _shapes(hidden: Tensor, weight: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the shapes and types of `_gradients`, without numbers."""
    *_, dtype, wanted, _soft_cap = given
    several = wanted[1] and len(hidden) > max(1, _LOGITS_AT_A_TIME // len(weight))
    total = hidden.new_empty((), dtype=torch.float32)
    full = hidden.shape, weight.shape, weight.shape[:1]
    shapes = [shape if used else (0,) for shape, used in zip(full, wanted, strict=True)]
    types = dtype, weight.dtype if several else dtype, torch.float32
    made = [hidden.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, types, strict=True)]
    return total, torch.empty_like(total), made[0], made[1], made[2]


class _WithGradients(torch.autograd.Function):
    """The loss, of which the gradients are known."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.types = [None if tensor is None else tensor.dtype for tensor in inputs]
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.types, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(gradient.to(dtype) * upstream[0] if needed else None for gradient, dtype, needed in pairs)


def _to_gradient(
    logits: Tensor, targets: Tensor, counts: Tensor, label_smoothing: float, z_loss: float, classes: Vocabulary | None
) -> tuple[Tensor, Tensor]:
    """Return the summed loss of these rows and that of -log p alone; each logit becomes the loss's gradient by it.

    `counts` is how much each row counts: yes and no, or a number. A CPU computes a few rows at a time, whose
    probabilities its cache holds. Other devices compute all at once, without a wait, and so do processes that exchange
    their parts; with Triton in one kernel.
    """
    kernels = triton_kernels(logits.device)
    if kernels is not None and classes is None and logits.is_contiguous():
        loss, nats = kernels.cross_entropy_(logits, targets, counts, label_smoothing, z_loss)
        return loss.sum(), nats.sum()
    on_cpu = logits.device.type == "cpu"
    every = on_cpu and not torch.compiler.is_compiling() and counts.dtype == torch.bool and bool(counts.all())
    in_cache = on_cpu and classes is None
    parts = []
    for part in _slices(len(logits), max(1, _LOGITS_IN_CACHE // logits.shape[1])) if in_cache else [slice(None)]:
        rows = logits[part]
        loss, nats, gradient = _loss_and_gradient(rows, targets[part], label_smoothing, z_loss, classes)
        rows.copy_(gradient if every else gradient.mul_(counts[part, None]))
        parts.append((loss, nats))
    loss, nats = (torch.cat(values) * counts[:, None] for values in zip(*parts, strict=True))
    return loss.sum(), nats.sum()


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, label_smoothing: float, z_loss: float, classes: Vocabulary | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of each row, -log p alone, and the loss's gradient by the logits, all in float32."""
    right = targets.clamp(min=0)[:, None]
    gradient = torch.softmax(logits, -1, dtype=torch.float32)
    log_z = logits.amax(-1, keepdim=True).float() - gradient.amax(-1, keepdim=True).log()  # the highest one is never 0
    total, step = logits.shape[-1], torch.full_like(log_z, label_smoothing - 1)
    if classes is None:
        chosen = logits.gather(-1, right).float()
        mean = logits.mean(-1, keepdim=True, dtype=torch.float32) if label_smoothing else chosen
    else:
        local_z, total = log_z, classes.total
        inside = (right >= classes.first) & (right < classes.first + logits.shape[-1])
        right, step = (right - classes.first).where(inside, 0), step * inside
        mine = logits.gather(-1, right) * inside, logits.sum(-1, keepdim=True, dtype=torch.float32)
        gathered = classes.gather(torch.stack([local_z, *mine]))
        log_z, chosen, mean = gathered[:, 0].logsumexp(0), gathered[:, 1].sum(0), gathered[:, 2].sum(0) / total
        gradient *= (local_z - log_z).exp()
    nats = loss = log_z - chosen
    if z_loss:
        loss = loss + z_loss * log_z.square()
        gradient *= 1 + 2 * z_loss * log_z
    if label_smoothing:
        loss = loss + label_smoothing * (log_z - mean - nats)
        gradient -= label_smoothing / total
    gradient.scatter_add_(-1, right, step)
    return loss, nats, gradient


def linear_divergence(
    hidden: Float[Tensor, "n dim"], weight: Float[Tensor, "vocab dim"], teacher: Float[Tensor, "n teacher_dim"],
    teacher_weight: Float[Tensor, "vocab teacher_dim"] | None, beta: float, temperature: float = 1.0,
) -> Float[Tensor, ""]:  # fmt: skip
    """Sum over positions of the divergence of the student's softmax(hidden @ weight.T / temperature) from the teacher's
    softmax(teacher @ teacher_weight.T / temperature), in nats, with its gradient made on the way.

    Without `teacher_weight` the teacher's logits are given. With p of the teacher, q of the student and M = beta p +
    (1 - beta) q, it is beta KL(p | M) + (1 - beta) KL(q | M), the generalised Jensen-Shannon divergence (Agarwal et
    al., 2023, equation 1). beta 0 is KL(p | q), forward; 1 is KL(q | p), reverse. The teacher has no gradient.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    matrix = None if teacher_weight is None else teacher_weight.detach().to(dtype)
    theirs = teacher.detach() if matrix is None else teacher.detach().to(dtype)

    def to_gradient(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        given = theirs[part] if matrix is None else linear(theirs[part], matrix)
        return (total := _divergence_to_gradient(logits, given, beta, temperature)), total

    wanted = [tensor.requires_grad and torch.is_grad_enabled() for tensor in (hidden, weight)]
    with torch.no_grad():
        total, _, *gradients = _gradients_by_rows(hidden, weight, None, dtype, [*wanted, False], to_gradient)
    return _WithGradients.apply(total, tuple(gradients[:2]), hidden, weight)


def _divergence_to_gradient(logits: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """Return the summed divergence of these rows; each logit becomes its gradient. A CPU computes a few rows at a time,
    whose probabilities its cache holds."""
    size = max(1, _LOGITS_IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    total = logits.new_zeros((), dtype=torch.float32)
    for part in _slices(len(logits), max(1, size)):
        mine, theirs = (F.log_softmax(scores[part].float() / temperature, -1) for scores in (logits, teacher))
        loss, gradient = _divergence(mine, theirs, beta)
        logits[part] = gradient.div_(temperature).to(logits.dtype)
        total = total + loss
    return total


def _divergence(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the sum over rows of the divergence of log-probabilities, and its gradient by the student's logits."""
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


def categorical_cross_entropy(
    logits: Float[Tensor, "batch classes"], targets: Float[Tensor, "batch classes"]
) -> Float[Tensor, ""]:
    """Sum over rows of -Σ target · log softmax(logits), in nats; each row of targets is a distribution (one-hot)."""
    return F.cross_entropy(logits, targets, reduction="sum")


def binary_cross_entropy(logits: Outputs, targets: Outputs) -> Float[Tensor, ""]:
    """Sum over rows of the mean over outputs of -t log σ(logit) - (1 - t) log(1 - σ(logit)), in nats."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1).sum()


def mean_squared_error(outputs: Outputs, targets: Outputs) -> Float[Tensor, ""]:
    """Sum over rows of the mean over outputs of (output - target)²."""
    return (outputs - targets).square().mean(-1).sum()


def mean_absolute_error(outputs: Outputs, targets: Outputs) -> Float[Tensor, ""]:
    """Sum over rows of the mean over outputs of |output - target|."""
    return (outputs - targets).abs().mean(-1).sum()


LOSSES = {  # of the rows of a network's outputs; divide by the number of rows for the mean
    "cross_entropy": categorical_cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mean_squared_error": mean_squared_error,
    "mean_absolute_error": mean_absolute_error,
}


_ROWS = 128  # no fewer at a time, each of which reads all weights


def token_log_probabilities(
    hidden: Float[Tensor, "n dim"], weight: Head, tokens: Int[Tensor, " n"],
    temperature: float = 1.0, soft_cap: float = math.inf,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:  # fmt: skip
    """ln softmax(hidden @ weight.T / temperature)[token] of each position, and the entropy there, in nats.

    The entropy has no gradient. Logits are made twice, some positions at a time: in the backward pass once more. Where
    autocast is on, products are in its type; probabilities are in float32 either way.
    """
    if isinstance(weight, SoftCappedHead):
        weight, soft_cap = weight
    if has_torch_function_unary(weight):
        return handle_torch_function(token_log_probabilities, (weight,), hidden, weight, tokens, temperature)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _TokenLogProbabilities.apply(hidden, weight, tokens, temperature, dtype, soft_cap)


class _TokenLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, dtype: torch.dtype,
        soft_cap: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.settings = temperature, dtype, soft_cap
        parts = [hidden.new_zeros(0, dtype=torch.float32)], [hidden.new_zeros(0, dtype=torch.float32)]
        for part in _slices(len(hidden), _rows_at_a_time(weight)):
            logs, _ = _log_softmax(hidden[part], weight, *ctx.settings)
            parts[0].append(logs.gather(-1, tokens[part, None]).squeeze(-1))
            parts[1].append(-(logs.exp() * logs).sum(-1))
        chosen, entropy = map(torch.cat, parts)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens = ctx.saved_tensors
        temperature, dtype, _ = ctx.settings
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in _slices(len(hidden), _rows_at_a_time(weight)):
            logs, slopes = _log_softmax(hidden[part], weight, *ctx.settings)
            d_logits = logs.exp_().neg_()
            d_logits.scatter_add_(-1, tokens[part, None], torch.ones_like(d_logits[:, :1]))
            d_logits = d_logits.mul_(upstream[0][part, None] / temperature)
            d_logits = (d_logits if slopes is None else d_logits * slopes).to(dtype)
            d_hidden[part] = product(d_logits, weight.to(dtype))
            if d_weight is not None:
                d_weight += product(d_logits.T, hidden[part].to(dtype))
        return d_hidden, d_weight, None, None, None, None


def _rows_at_a_time(weight: Tensor) -> int:
    """Return the number of positions whose logits a processor's cache holds, or a GPU's memory."""
    if weight.device.type == "cpu":
        return max(_ROWS, _LOGITS_IN_CACHE // len(weight))
    return max(1, _LOGITS_AT_A_TIME // len(weight))


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, length, size)]


def _log_softmax(
    hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype, soft_cap: float
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probabilities, and the slopes of a soft cap."""
    logits = linear(hidden.to(dtype), weight.to(dtype)).float()
    slopes = cap_(logits, soft_cap)
    return F.log_softmax(logits if temperature == 1 else logits / temperature, -1), slopes

"""Losses as sums over elements with their weights, and log-probabilities of given tokens, without all logits in memory.

Axes: `...` any leading axes, n = positions, dim, vocab = classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from keifu.layers.linear import linear, product

Outputs = Float[Tensor, "batch outputs"]

IGNORED = -100  # the target of a position that does not count
_LOGITS_AT_A_TIME = 2**26  # 256 MiB of float32 probabilities


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
    hidden: Float[Tensor, "*batch dim"], weight: Float[Tensor, "vocab dim"], targets: Int[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch"] | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0,
    shares: Float[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """`cross_entropy(hidden @ weight.T, ...)` with its gradient made on the way, so that few logits exist at a time.

    Where autocast is on, the products are in its type; probabilities are in float32 either way. `shares` are what each
    position's loss is multiplied with, 1 where None.
    """
    return smoothed_linear_cross_entropy(hidden, weight, None, targets, mask, label_smoothing, z_loss, shares)[0]


def smoothed_linear_cross_entropy(
    hidden: Float[Tensor, "*batch dim"], weight: Float[Tensor, "vocab dim"], bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, "*batch"], mask: Bool[Tensor, "*batch"] | None = None, label_smoothing: float = 0.0,
    z_loss: float = 0.0, shares: Float[Tensor, "*batch"] | None = None, vocabulary: Vocabulary | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:  # fmt: skip
    """The loss of `linear_cross_entropy`, of a head that may have a bias, and beside it the sum of -log p(target).

    The second has no gradient and costs nothing: runs with different smoothing are compared by it. vocabulary: where
    weight and bias are those of some classes alone; the gradient of `hidden` is then this process's part of a sum.
    """
    if has_torch_function_unary(weight):  # a tensor that says itself how, as torch's own functions ask
        given = hidden, weight, bias, targets, mask, label_smoothing, z_loss, shares
        return handle_torch_function(smoothed_linear_cross_entropy, (weight,), *given)
    targets = targets.flatten()
    if mask is not None:
        targets = targets.masked_fill(~mask.flatten(), IGNORED)
    device = hidden.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    counts = targets != IGNORED if shares is None else shares.flatten() * (targets != IGNORED)
    rates = label_smoothing, z_loss
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, bias, targets, counts, rates, kind, vocabulary)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients while the logits of some rows are at hand, so that they are never all kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, counts: Tensor,
        rates: tuple[float, float], kind: torch.dtype, vocabulary: Vocabulary | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        low, matrix, added = hidden.to(kind), weight.to(kind), None if bias is None else bias.to(kind)
        d_hidden, d_weight = torch.empty_like(low), None
        d_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        total, plain = (hidden.new_zeros((), dtype=torch.float32) for _ in range(2))
        rows = max(1, _LOGITS_AT_A_TIME // weight.shape[0])
        for start in range(0, len(low), rows):
            part = slice(start, start + rows)
            logits = linear(low[part], matrix, added)
            loss, nats, d_logits = _loss_and_gradient(logits, targets[part], counts[part], *rates, vocabulary)
            total, plain = total + loss, plain + nats
            if not any(ctx.needs_input_grad):
                continue
            d_hidden[part] = product(d_logits, matrix)
            change = product(d_logits.T, low[part])
            d_bias = None if d_bias is None else d_bias.add_(d_logits.sum(0, dtype=torch.float32))
            d_weight = change.to(weight.dtype) if d_weight is None else d_weight.add_(change)
        if d_weight is not None:
            ctx.save_for_backward(d_hidden.to(hidden.dtype), d_weight, d_bias)
        ctx.mark_non_differentiable(plain)
        return total, plain

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = (None if each is None else each * upstream[0] for each in ctx.saved_tensors)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, counts: Tensor, label_smoothing: float, z_loss: float, classes: Vocabulary | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss of these rows, that of -log p alone, and the loss's gradient by the logits, in their type.

    `counts` is how much each row counts: yes and no, or a number.
    """
    counts, right = counts[:, None], targets.clamp(min=0)[:, None]
    gradient = torch.softmax(logits, -1, dtype=torch.float32)
    highest, at = logits.max(-1, keepdim=True)
    log_z = highest.float() - gradient.gather(-1, at).log()  # the highest probability is never 0
    total, step = logits.shape[-1], torch.full_like(log_z, label_smoothing - 1)
    if classes is None:
        chosen = logits.gather(-1, right).float()
        mean = logits.mean(-1, keepdim=True, dtype=torch.float32) if label_smoothing else chosen
    else:
        own, total = log_z, classes.total
        inside = (right >= classes.first) & (right < classes.first + logits.shape[-1])
        right, step = (right - classes.first).where(inside, 0), step * inside
        mine = logits.gather(-1, right) * inside, logits.sum(-1, keepdim=True, dtype=torch.float32)
        each = classes.gather(torch.stack([own, *mine]))
        log_z, chosen, mean = each[:, 0].logsumexp(0), each[:, 1].sum(0), each[:, 2].sum(0) / total
        gradient *= (own - log_z).exp()
    nats = loss = log_z - chosen
    if z_loss:
        loss = loss + z_loss * log_z.square()
        gradient *= 1 + 2 * z_loss * log_z
    if label_smoothing:
        loss = loss + label_smoothing * (log_z - mean - nats)
        gradient -= label_smoothing / total
    gradient.scatter_add_(-1, right, step)
    if torch.compiler.is_compiling() or counts.dtype != torch.bool or not counts.all():  # a compiled form has no branch
        gradient *= counts
    return (loss * counts).sum(), (nats * counts).sum(), gradient.to(logits.dtype)


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


_LOGITS_IN_CACHE, _ROWS = (
    2**20,
    128,
)  # logits at a time, 4 MiB of float32; but no fewer rows, each of which reads all weights


def token_log_probabilities(
    hidden: Float[Tensor, "n dim"],
    weight: Float[Tensor, "vocab dim"],
    tokens: Int[Tensor, " n"],
    temperature: float = 1.0,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """ln softmax(hidden @ weight.T / temperature)[token] of each position, and the entropy there, in nats.

    The entropy has no gradient. Logits are made twice, some positions at a time: in the backward pass once more. Where
    autocast is on, products are in its type; probabilities are in float32 either way.
    """
    if has_torch_function_unary(weight):
        return handle_torch_function(token_log_probabilities, (weight,), hidden, weight, tokens, temperature)
    device = hidden.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _TokenLogProbabilities.apply(hidden, weight, tokens, temperature, kind)


class _TokenLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, kind: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.temperature, ctx.kind = temperature, kind
        found = [hidden.new_zeros(0, dtype=torch.float32)], [hidden.new_zeros(0, dtype=torch.float32)]
        for part in _parts(len(hidden), len(weight)):
            logs = _log_softmax(hidden[part], weight, temperature, kind)
            found[0].append(logs.gather(-1, tokens[part, None]).squeeze(-1))
            found[1].append(-(logs.exp() * logs).sum(-1))
        chosen, entropy = map(torch.cat, found)
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in _parts(len(hidden), len(weight)):
            d_logits = _log_softmax(hidden[part], weight, ctx.temperature, ctx.kind).exp_().neg_()
            d_logits.scatter_add_(-1, tokens[part, None], torch.ones_like(d_logits[:, :1]))
            d_logits = d_logits.mul_(upstream[0][part, None] / ctx.temperature).to(ctx.kind)
            d_hidden[part] = product(d_logits, weight.to(ctx.kind))
            if d_weight is not None:
                d_weight += product(d_logits.T, hidden[part].to(ctx.kind))
        return d_hidden, d_weight, None, None, None


def _parts(rows: int, vocab: int) -> list[slice]:
    size = max(_ROWS, _LOGITS_IN_CACHE // vocab)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float, kind: torch.dtype) -> Tensor:
    logits = linear(hidden.to(kind), weight.to(kind)).float()
    return F.log_softmax(logits if temperature == 1 else logits / temperature, -1)

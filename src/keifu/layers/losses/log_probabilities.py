"""Log-probabilities of given tokens and the entropy at their positions, without all logits in memory.

Axes: n = positions, dim, vocab = classes.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from keifu.layers.linear import linear, product, product_dtype
from keifu.layers.losses import head
from keifu.layers.losses.head import Head, SoftCappedHead, cap_, slices

_ROWS = 128  # the least positions at a time, since each pass reads all weights


def token_log_probabilities(
    hidden: Float[Tensor, "n dim"], weight: Head, tokens: Int[Tensor, " n"],
    temperature: float = 1.0, soft_cap: float = math.inf,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:  # fmt: skip
    """Return ln softmax(hidden @ weight.T / temperature)[token] of each position, and the entropy there, in nats.

    The entropy has no gradient. Logits are computed twice, for some positions at a time: in the forward and in the
    backward pass. Under autocast, matrix multiplications use its dtype; probabilities are always in float32.
    """
    if isinstance(weight, SoftCappedHead):
        weight, soft_cap = weight
    if has_torch_function_unary(weight):
        return handle_torch_function(token_log_probabilities, (weight,), hidden, weight, tokens, temperature)
    return _TokenLogProbabilities.apply(hidden, weight, tokens, temperature, product_dtype(weight), soft_cap)


class _TokenLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, dtype: torch.dtype,
        soft_cap: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.settings = temperature, dtype, soft_cap
        parts = [hidden.new_zeros(0, dtype=torch.float32)], [hidden.new_zeros(0, dtype=torch.float32)]
        for part in slices(len(hidden), _rows_at_a_time(weight)):
            logs, _ = _log_softmax(hidden[part], weight, *ctx.settings)
            parts[0].append(logs.gather(-1, tokens[part, None]).squeeze(-1))
            parts[1].append(-(logs.exp() * logs).sum(-1))
        target_logs, entropy = map(torch.cat, parts)
        ctx.mark_non_differentiable(entropy)
        return target_logs, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens = ctx.saved_tensors
        temperature, dtype, _ = ctx.settings
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in slices(len(hidden), _rows_at_a_time(weight)):
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
    """Return the number of positions whose logits fit a CPU's cache, or a GPU's memory."""
    if weight.device.type == "cpu":
        return max(_ROWS, head.LOGITS_IN_CACHE // len(weight))
    return max(1, head.LOGITS_AT_A_TIME // len(weight))


def _log_softmax(
    hidden: Tensor, weight: Tensor, temperature: float, dtype: torch.dtype, soft_cap: float
) -> tuple[Tensor, Tensor | None]:
    """Return the log-probabilities, and the slopes of a soft cap."""
    logits = linear(hidden.to(dtype), weight.to(dtype)).float()
    slopes = cap_(logits, soft_cap)
    return F.log_softmax(logits if temperature == 1 else logits / temperature, -1), slopes

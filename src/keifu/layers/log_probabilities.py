"""ln p of chosen tokens, one number each and with a gradient, without all logits; knows no model and no loss.

Axes: n = positions, dim, vocab.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_LOGITS_AT_A_TIME = 2**25  # 128 MiB of float32


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
            d_logits = (d_logits * (upstream[0][part, None] / ctx.temperature)).to(ctx.kind)
            d_hidden[part] = (d_logits @ weight.to(ctx.kind)).to(hidden.dtype)
            if d_weight is not None:
                d_weight += d_logits.T @ hidden[part].to(ctx.kind)
        return d_hidden, d_weight, None, None, None


def _parts(rows: int, vocab: int) -> list[slice]:
    size = max(1, _LOGITS_AT_A_TIME // vocab)
    return [slice(start, start + size) for start in range(0, rows, size)]


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float, kind: torch.dtype) -> Tensor:
    return F.log_softmax(F.linear(hidden.to(kind), weight.to(kind)).float() / temperature, -1)

"""Logits processors: penalties, temperature and filters of unlikely tokens, on all rows at once.

Every function is pure and takes one parameter per row. They are applied in the order of transformers: repetition
penalty; presence and frequency penalty (as in OpenAI's API and vLLM); logit bias; temperature; top-n-sigma; top-k;
top-p; min-p. Each gets the result of the previous one. The function of a setting has the name of its row in
`sampling_params`. Equally likely tokens are kept or removed together, so that the result does not depend on how a sort
breaks ties.

Axes: rows = independent distributions, vocab. A parameter has one value for each row, or one for all.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.layers.wide import wide

SHORTLIST = 256  # number of tokens in a shortlist

Logits = Float[Tensor, "rows vocab"]
Parameter = Float[Tensor, " #rows"]


def repetition_penalty(logits: Logits, is_seen: Bool[Tensor, "rows vocab"], penalty: Parameter) -> Logits:
    """Return the logits with those of seen tokens changed: positive ones / penalty, negative ones · penalty (CTRL,
    section 4.1)."""
    factor = torch.where(logits < 0, penalty[:, None], 1 / penalty[:, None])
    return torch.where(is_seen, logits * factor, logits)


def presence_penalty(logits: Logits, counts: Float[Tensor, "rows vocab"], penalty: Parameter) -> Logits:
    """Subtract the penalty from the logit of every token that the output contains."""
    return logits - penalty[:, None] * (counts > 0)


def frequency_penalty(logits: Logits, counts: Float[Tensor, "rows vocab"], penalty: Parameter) -> Logits:
    """Subtract the penalty from a token's logit as many times as the output contains the token."""
    return logits - penalty[:, None] * counts


def logit_bias(logits: Logits, tokens: Int[Tensor, "#rows biased"], bias: Float[Tensor, "#rows biased"]) -> Logits:
    """Add a bias to the logits of each row's `tokens`. Rows with fewer tokens are padded with a bias of 0."""
    return logits.scatter_add(1, tokens.expand(len(logits), -1), bias.expand(len(logits), -1))


def temperature(logits: Logits, t: Parameter) -> Logits:
    """Return the logits / t. Values below 1 make likely tokens more likely."""
    return logits / t[:, None]


def top_n_sigma(logits: Logits, n: Parameter) -> Logits:
    """Return -inf for tokens whose logit is more than n standard deviations below the largest (Top-nσ, Tang et al.,
    2024); n = 0 keeps all.

    The deviation is that of the finite logits: a constraint's -inf counts for nothing. A temperature changes nothing,
    because it scales distance and deviation alike. Sums are cumulative, so that they do not depend on other rows.
    """
    finite = logits.isfinite()
    count = finite.sum(-1, keepdim=True)

    def mean(values: Tensor) -> Tensor:
        total = wide(values.masked_fill(~finite, 0)).cumsum(-1, dtype=torch.float64)[:, -1:]
        return (total / wide(count)).to(logits)

    deviation = mean((logits - mean(logits)).square()).sqrt()
    unlikely = logits < logits.amax(-1, keepdim=True) - n[:, None] * deviation
    return logits.masked_fill(unlikely & (n[:, None] > 0), -torch.inf)


def top_k(logits: Logits, k: Int[Tensor, " #rows"]) -> Logits:
    """Return -inf for all but the k likeliest tokens and those equal to the last of them (Fan et al., 2018); k = 0
    keeps all."""
    vocab = logits.shape[1]
    last = torch.where(k > 0, k.clamp(max=vocab), vocab) - 1
    smallest = _descending(logits).gather(1, last.expand(len(logits))[:, None])
    return logits.masked_fill(logits < smallest, -torch.inf)


def top_p(logits: Logits, p: Parameter) -> Logits:
    """Return -inf for all but the smallest set of likeliest tokens whose mass is at least p (Holtzman et al., 2020)."""
    values = _descending(logits)
    mass = wide(values.softmax(-1)).cumsum(-1, dtype=torch.float64)
    last = (mass < wide(p)[:, None]).sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1).to(logits.device)
    return logits.masked_fill((logits < values.gather(1, last)) & (p[:, None] < 1), -torch.inf)


def min_p(logits: Logits, fraction: Parameter) -> Logits:
    """Return -inf for tokens less than `fraction` times as likely as the likeliest (Nguyen et al., 2024)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + fraction[:, None].log(), -torch.inf)


def shortlist(
    logits: Logits, k: Int[Tensor, " #rows"], p: Parameter, every: bool
) -> tuple[Float[Tensor, "rows few"], Int[Tensor, "rows few"], Bool[Tensor, " rows"]]:
    """Apply `top_k`, then `top_p`, to only the likeliest tokens of each row.

    Return their logits (-inf if removed), their ids in ascending order, and for each row whether no other token passes
    the filters. Sorting whole rows would take longer than a step of a small model. The number of examined tokens is the
    same for all rows, so that a row's sums do not depend on another row's k. every: whether all k are above 0, so that
    the device need not be read.
    """
    values, tokens = logits.topk(min(SHORTLIST, logits.shape[1]))
    last = torch.where(k > 0, k.clamp(max=values.shape[1]), values.shape[1]).expand(len(values)) - 1
    values_in_order = values.masked_fill(values < values.gather(1, last[:, None]), -torch.inf)
    shares = values_in_order.softmax(-1)
    if not every:
        shares = torch.where((k > 0)[:, None], shares, logits.softmax(-1).gather(1, tokens))
    mass = wide(shares).cumsum(-1, dtype=torch.float64)
    last = (mass < wide(p)[:, None]).sum(-1, keepdim=True).clamp(max=values.shape[1] - 1).to(logits.device)
    values_in_order = values_in_order.masked_fill(
        (values_in_order < values_in_order.gather(1, last)) & (p[:, None] < 1), -torch.inf
    )
    names, order = tokens.sort(-1)
    limited = torch.where(k > 0, k < values.shape[1], p < 1)
    is_complete = values_in_order[:, -1].isneginf() & limited  # tokens outside are no likelier than the last one
    return values_in_order.gather(1, order), names, is_complete


def likeliest(logits: Logits) -> Logits:
    """Return -inf for all but one likeliest token, for greedy decoding."""
    best = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, logits.argmax(-1, keepdim=True), True)
    return logits.masked_fill(~best, -torch.inf)


def log_probability(logits: Logits, tokens: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return the log-probability of each row's token under softmax(logits)."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def _descending(logits: Logits) -> Logits:
    """Return each row's values, largest first."""
    # torch's sort also sorts indices; NumPy's does not and takes a twentieth of the time on a CPU
    if logits.device.type == "cpu":
        return torch.from_numpy(np.sort(logits.detach().numpy(), axis=-1)).flip(-1)
    return logits.sort(-1, descending=True).values

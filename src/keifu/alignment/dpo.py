"""Direct preference optimisation, DPO (Rafailov et al., 2023): learning from pairs of answers without a reward model.

Axes: batch = pairs, 2 = the better answer and the worse, length = tokens.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from keifu.generation.text.model import evaluation_mode
from keifu.layers.losses import token_log_probabilities
from keifu.training.protocols import Batch, LossOutput, Objective

Loss = Literal["dpo", "ipo", "normalised", "robust"]
Each = Float[Tensor, "batch 2"]


def sequence_log_probabilities(model: Any, batch: Batch) -> Each:
    """Return the log-probability of each answer: the sum over the tokens of batch["tokens"] [batch, 2, length] that
    batch["mask"] marks.

    The model offers `hidden(tokens)` and `head_weight`.
    """
    tokens, mask = batch["tokens"].flatten(0, 1), batch["mask"].flatten(0, 1)[:, 1:]
    found, _ = token_log_probabilities(model.hidden(tokens[:, :-1])[mask], model.head_weight, tokens[:, 1:][mask])
    rows = mask.nonzero()[:, 0]
    return found.new_zeros(len(tokens)).index_add(0, rows, found).view(-1, 2)


def losses(
    ratios: Each, lengths: Each, loss: Loss, beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " batch"]:
    """Return the loss of each pair, from ln p(answer) - ln p_reference(answer) and the answers' lengths in tokens.

    Δ is the difference of the two ratios, the better answer's minus the worse one's. dpo: -ln σ(β Δ) (equation 7);
    `label_smoothing` is the assumed share of pairs with swapped labels (conservative DPO, Mitchell, 2023). robust: the
    same, unbiased (Chowdhury et al., 2024). ipo: (Δ / length - 1 / 2β)² (Azar et al., 2023, equation 17, averaged over
    tokens, as its authors do). normalised: dpo of Δ / length.
    """
    better, worse = (ratios / lengths if loss in ("ipo", "normalised") else ratios).unbind(1)
    margin = better - worse
    if loss == "ipo":
        return (margin - 1 / (2 * beta)).square()
    right, wrong = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    if loss == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def dpo(loss: Loss, beta: float, label_smoothing: float = 0.0) -> Objective:
    """Return the objective for the training loop; its batches also hold "reference" [batch, 2], the log-probabilities
    under the reference model.

    Figures: `accuracy`, how often the better answer has the higher reward β ln(p / p_reference), and both rewards.
    """
    return partial(_loss, loss, beta, label_smoothing)


def _loss(loss: Loss, beta: float, label_smoothing: float, model: Any, batch: Batch) -> LossOutput:
    ratios = sequence_log_probabilities(model, batch) - batch["reference"]
    lengths = batch["mask"][..., 1:].sum(-1).clamp(min=1)
    total = losses(ratios, lengths.to(ratios.dtype), loss, beta, label_smoothing).sum()
    better, worse = (beta * ratios.detach()).unbind(1)
    figures = {"accuracy": (better > worse).sum(), "reward_of_better": better.sum(), "reward_of_worse": worse.sum()}
    return LossOutput(total, len(ratios), {name: value.float() for name, value in figures.items()})


@torch.no_grad()
def reference(model: Any, batch: Batch) -> Each:
    """Return the log-probabilities for "reference" of a batch (see `dpo`), under a model as it is now."""
    with evaluation_mode(model):
        return sequence_log_probabilities(model, batch)

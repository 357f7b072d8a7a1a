"""Direct preference optimisation, DPO (Rafailov et al., 2023): learning from pairs of answers without a reward model.
Its relatives SimPO and ORPO need no reference model, and KTO needs no pairs.

Axes: batch = pairs, 2 = the better answer and the worse, length = tokens.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.alignment.rollouts import positions_of, take
from keifu.data.chat.preferences import PreferencePairs
from keifu.inference.text.model import device_of, evaluation_mode
from keifu.layers.losses.log_probabilities import token_log_probabilities
from keifu.training.loader import on_device
from keifu.training.protocols import Batch, LossOutput, StatelessBatches

Loss = Literal["dpo", "ipo", "normalised", "robust", "simpo", "orpo", "kto"]
WITHOUT_REFERENCE = ("simpo", "orpo")
Each = Float[Tensor, "batch 2"]
Scores = Float[Tensor, "batch answers"]


def sequence_log_probabilities(model: Any, batch: Batch) -> Scores:
    """Return the log-probability of each answer: the sum over the tokens of batch["tokens"] (batch, answers, length)
    where batch["mask"] is True.

    The model has `hidden(tokens)` and `head_weight`.
    """
    tokens, mask = batch["tokens"].flatten(0, 1), batch["mask"].flatten(0, 1)[:, 1:]
    positions = positions_of(mask)
    hidden = take(model.hidden(tokens[:, :-1]), positions)
    logs, _ = token_log_probabilities(hidden, model.head_weight, take(tokens[:, 1:], positions))
    rows = positions // mask.shape[1]
    return logs.new_zeros(len(tokens)).index_add(0, rows, logs).view(batch["tokens"].shape[:2])


def losses(
    ratios: Each, lengths: Each, loss: Loss, beta: float, label_smoothing: float = 0.0, margin: float = 0.0
) -> Float[Tensor, " batch"]:
    """Return the loss of each pair, from ln p(answer) - ln p_reference(answer) and the answers' lengths in tokens.

    Δ is the difference of the two ratios, better minus worse.
    - dpo: -ln σ(β Δ) (equation 7). `label_smoothing` is the assumed share of pairs with swapped labels (conservative
      DPO, Mitchell, 2023).
    - robust: the same, unbiased (Chowdhury et al., 2024).
    - ipo: (Δ / length - 1 / 2β)² (Azar et al., 2023, equation 17, averaged over tokens, as its authors do).
    - normalised: dpo of Δ / length.
    - simpo: -ln σ(β Δ / length - margin) (Meng et al., 2024, equation 6).
    - orpo: -ln p(better) / length - β ln σ(the difference of the log-odds of ln p / length) (Hong et al., 2024,
      equation 6).

    simpo and orpo use ln p(answer) without a reference.
    """
    better, worse = (ratios if loss in ("dpo", "robust") else ratios / lengths).unbind(1)
    gap = better - worse
    if loss == "ipo":
        return (gap - 1 / (2 * beta)).square()
    if loss == "orpo":
        complements = [(-log.clamp(max=-1e-7).expm1()).log() for log in (better, worse)]  # ln(1 - p)
        return -better - beta * F.logsigmoid(gap - complements[0] + complements[1])
    right, wrong = -F.logsigmoid(beta * gap - margin), -F.logsigmoid(margin - beta * gap)
    if loss == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def dpo(
    model: Any, batch: Batch, loss: Loss, beta: float, label_smoothing: float = 0.0, margin: float = 0.0
) -> LossOutput:
    """Return the sum of the losses of the pairs: an objective. The batch also has "reference" (batch, 2), the
    log-probabilities of the reference model.

    Figures: `accuracy`, how often the better answer has the higher reward β ln(p / p_reference), and both rewards.
    """
    ratios = sequence_log_probabilities(model, batch) - batch["reference"]
    lengths = batch["mask"][..., 1:].sum(-1).clamp(min=1).to(ratios.dtype)
    total = losses(ratios, lengths, loss, beta, label_smoothing, margin).sum()
    better, worse = (beta * ratios.detach() / (lengths if loss in WITHOUT_REFERENCE else 1)).unbind(1)
    figures = {"accuracy": (better > worse).sum(), "reward_of_better": better.sum(), "reward_of_worse": worse.sum()}
    return LossOutput(total, len(ratios), {name: value.float() for name, value in figures.items()})


def kto_losses(
    ratios: Float[Tensor, " batch"], good: Float[Tensor, " batch"], kl: Float[Tensor, " batch"], beta: float
) -> Float[Tensor, " batch"]:
    """Return 1 - σ(β (r - kl)) of each good answer (1) and 1 - σ(β (kl - r)) of each bad one (0), where r is the
    log-ratio of policy and reference: Kahneman-Tversky optimisation (Ethayarajh et al., 2024, equations 7 and 8)."""
    return torch.sigmoid(-beta * (2 * good - 1) * (ratios - kl))


def kto(model: Any, batch: Batch, beta: float) -> LossOutput:
    """Return the sum of the losses of a batch of `MarkedAnswers`: an objective.

    Figures: `accuracy`, how often a good answer's log-ratio is above the reference point and a bad one's below; and
    `kl`, this reference point.
    """
    ratios = sequence_log_probabilities(model, batch)[:, 0] - batch["reference"][:, 0]
    good, kl = batch["good"], batch["kl"]
    figures = {"accuracy": ((ratios > kl) == (good > 0)).sum().float(), "kl": kl.sum()}
    return LossOutput(kto_losses(ratios, good, kl, beta).sum(), len(good), figures)


@torch.no_grad()
def reference(model: Any, batch: Batch) -> Scores:
    """Return the log-probabilities of a batch under the current model. `dpo` reads them as "reference"."""
    with evaluation_mode(model):
        return sequence_log_probabilities(model, batch)


class MarkedAnswers(PreferencePairs, StatelessBatches):
    """Training data for KTO: "tokens" and "mask" (row, 1, position), "reference" (row, 1), "good" (row), 1 or 0, and
    "kl" (row).

    `pairs` consist of an answer and of the answer to another prompt, appended to this one's prompt. kl is the mean over
    the batch of the log-ratio of the current policy and the reference for the latter, at least 0 (section 4.1).
    """

    def __init__(self, policy: nn.Module, good: tuple[Tensor, Tensor], *pairs: Any):
        super().__init__(*pairs)
        self.policy, self.good = policy, good
        self.fingerprint += "".join(str(int(mark)) for part in good for mark in part)

    def make_batch(self, validating: bool, items: np.ndarray) -> dict[str, Tensor]:
        """Return some of the answers with their marks and the reference point."""
        both = super().make_batch(validating, items)
        pair, other = ({name: tensor[:, part] for name, tensor in both.items()} for part in (slice(1), slice(1, 2)))
        recomputed = reference(self.policy, on_device(other, device_of(self.policy))).cpu()
        kl = (recomputed - other["reference"]).mean().clamp(min=0)
        return pair | {"good": self.good[validating][items], "kl": kl.expand(len(items))}

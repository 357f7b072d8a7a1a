"""Group relative policy optimisation, GRPO (Shao et al., 2024, DeepSeekMath): the advantage of an answer is its reward
relative to the other answers to the same prompt, so no value model is needed. Its variants: Dr. GRPO (Liu et al.,
2025), DAPO (Yu et al., 2025) and GSPO (Zheng et al., 2025).

Axes: batch = answers, group = answers to one prompt, length = tokens of a prompt and its answer, n = tokens of answers.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from keifu.alignment.monitor import Healthy
from keifu.alignment.rollouts import Rollouts, Tokens, answer_log_probabilities, response_statistics, take
from keifu.inference.text.model import evaluation_mode
from keifu.training.protocols import Batch, LossOutput

Variant = Literal["grpo", "dr-grpo", "dapo", "gspo"]
EPSILON = 1e-4  # added to a group's standard deviation: if all rewards are equal, every advantage is 0


class GRPOTerms(NamedTuple):
    """For each token: the loss, the KL divergence from the reference (k3), and whether the ratio is clipped."""

    loss: Tokens
    kl: Tokens
    clipped: Bool[Tensor, " n"]


def advantages(rewards: Float[Tensor, "prompts group"], scaled: bool = True) -> Float[Tensor, "prompts group"]:
    """Return (r - mean) / (standard deviation + 1e-4) within each group; the deviation divides by n - 1, as in TRL. If
    not `scaled` (Dr. GRPO): r - mean."""
    rewards = rewards.double()
    deviation = rewards.std(1, keepdim=True) + EPSILON if scaled else 1.0
    return ((rewards - rewards.mean(1, keepdim=True)) / deviation).float()


def token_shares(mask: Bool[Tensor, "batch length"], variant: Variant, max_tokens: int) -> Float[Tensor, " batch"]:
    """Return the weight of each token of an answer. grpo, gspo: 1 / the answer's length, so that the loss is a mean
    over answers. dr-grpo: 1 / `max_tokens`, so that a long answer counts more. dapo: the same weight for all tokens of
    the batch.
    """
    lengths = mask.sum(-1).float()
    if variant == "dr-grpo":
        return torch.full_like(lengths, 1 / max_tokens)
    return torch.full_like(lengths, len(lengths) / float(lengths.sum())) if variant == "dapo" else 1 / lengths


def sequence_ratios(log_ratios: Tokens, rows: Int[Tensor, " n"], lengths: Float[Tensor, " batch"]) -> Tokens:
    """Return for each token the mean log-ratio of its answer (GSPO, equation 7)."""
    return (torch.zeros_like(lengths).index_add(0, rows, log_ratios) / lengths)[rows]


def terms(
    logs: Tokens, log_ratio: Tokens, reference: Tokens, advantage: Tokens, clip: tuple[float, float], beta: float
) -> GRPOTerms:
    """Return -min(ratio A, clip(ratio) A) + β KL of each token (equation 3); log_ratio = ln p - ln p_old.

    clip: the ratio is limited to 1 - clip[0] and 1 + clip[1]. KL is Schulman's estimator k3 = p_ref/p - ln(p_ref/p) - 1
    (equation 4), which is unbiased and never negative.
    """
    ratio = log_ratio.exp()
    log_ratio = reference - logs
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    kl = log_ratio.exp() - log_ratio - 1
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    return GRPOTerms(beta * kl - surrogate, kl.detach(), (clipped * advantage < ratio * advantage).detach())


def grpo(
    model: Any, batch: Batch, clip: tuple[float, float], beta: float, variant: Variant, temperature: float = 1.0
) -> LossOutput:
    """Return the weighted sum over the tokens of all answers: an objective.

    The batch has "tokens", "mask" (True on the answers), "old" and "reference" (log-probabilities under the sampling
    policy and the reference; without "reference" kl is 0), all (batch, length); and for each answer "advantage",
    "share" (see `token_shares`) and figures to report (batch). Figures: these, kl, entropy, clip_fraction and length.
    Dropout is off, so that ratios compare the same function. For gspo the ratio is that of the whole answer.
    """
    with evaluation_mode(model):
        logs, entropy, rows, positions = answer_log_probabilities(model, batch, temperature)
    mask = batch["mask"][:, 1:]
    reference = take(batch["reference"][:, 1:], positions) if "reference" in batch else logs.detach()
    lengths = mask.sum(-1).to(logs.dtype)
    ratio = logs - take(batch["old"][:, 1:], positions)
    ratio = sequence_ratios(ratio, rows, lengths) if variant == "gspo" else ratio
    losses = terms(logs, ratio, reference, batch["advantage"][rows], clip, beta)
    means = {"kl": losses.kl, "entropy": entropy, "clip_fraction": losses.clipped}
    figures = {name: (value / lengths[rows]).sum() for name, value in means.items()}
    total = (losses.loss * batch["share"][rows]).sum()
    return LossOutput(total, len(mask), figures | response_statistics(batch))


@dataclass(eq=False)
class GRPOBatches(Rollouts):
    """Training data: rollouts with "advantage", "share" and "varied" for each answer. "varied" is 1 if the answer's
    group has different rewards; otherwise nothing is learned from it.

    "length_of_right" and "length_of_wrong" are the mean lengths of the rollout's answers with a reward above 0.5, and
    of the others; 0 if there are none. rounds: the most rollouts sampled to replace groups whose rewards are all equal
    (DAPO's dynamic sampling).
    """

    variant: Variant = "grpo"
    rounds: int = 1

    def _generate_rollout(self, number: int) -> Batch:
        plan, batches = self.plan, list[Batch]()
        for extra in range(self.rounds):
            batches.append(super()._generate_rollout(number * self.rounds + extra))
            varied = torch.cat([batch["varied"] for batch in batches])
            if varied.sum() >= plan.answers or self.rounds == 1:
                break
        if len(batches) == 1:
            return batches[0]
        order = torch.argsort(varied, descending=True, stable=True)[: plan.answers]
        rollout = {name: _stack([batch[name] for batch in batches])[order] for name in batches[0]}
        return rollout | {"share": token_shares(rollout["mask"], self.variant, plan.max_tokens)}

    def _targets(self, rollout: Batch, group: int) -> Batch:
        rewards, mask = rollout["reward"], rollout["mask"]
        groups = rewards.view(-1, group)
        scaled = self.variant != "dr-grpo"
        targets = {
            "advantage": advantages(groups, scaled).flatten() if group > 1 else torch.zeros_like(rewards),
            "share": token_shares(mask, self.variant, self.plan.max_tokens),
            "varied": (groups != groups[:, :1]).any(1).float().repeat_interleave(group),
        }
        sides = {"length_of_right": rewards > 0.5, "length_of_wrong": rewards <= 0.5}
        for name, side in sides.items():
            mean = (mask.sum(-1) * side).sum() / side.sum().clamp(min=1)
            targets[name] = mean.expand(len(rewards)).clone()
        return targets

    def _zero_targets(self, rows: int) -> Batch:
        names = ("advantage", "share", "varied", "length_of_right", "length_of_wrong")
        return dict.fromkeys(names, torch.zeros(rows))


def _stack(tensors: list[Tensor]) -> Tensor:
    """Join tensors along their rows, padded on the right to the same length."""
    if tensors[0].dim() == 1:
        return torch.cat(tensors)
    return pad_sequence([row for tensor in tensors for row in tensor], batch_first=True)


NORMAL = {
    "varied": Healthy(
        0.001, 1.0, "no group has answers with different rewards, so nothing is learned: look at the reward"
    ),
    "finished": Healthy(0.5, 1.0, "most answers are cut off: more --max-tokens, or a model that has learned to end"),
    "kl": Healthy(0.0, 0.5, "the policy moves far from the reference model: a lower learning rate or more --beta"),
    "entropy": Healthy(
        0.01, float("inf"), "the policy always writes the same: a higher --temperature or a lower learning rate"
    ),
    "clip_fraction": Healthy(0.0, 0.2, "many tokens are clipped: a lower learning rate or fewer updates for a rollout"),
    "length": Healthy(0.33, 3.0, "answers are much shorter or longer than at first: look at the reward", True),
}

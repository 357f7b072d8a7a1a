"""Group relative policy optimisation, GRPO (Shao et al., 2024, DeepSeekMath): the advantage of an answer is its reward
relative to the other answers to the same prompt, so no value model is needed.

Axes: batch = answers, group = answers to one prompt, length = tokens of a prompt and its answer, n = tokens of answers.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from keifu.alignment.monitor import Range
from keifu.alignment.rollouts import Rollouts, Tokens, answer_log_probabilities, response_statistics
from keifu.generation.text.model import evaluation_mode
from keifu.training.protocols import Batch, LossOutput, Objective

EPSILON = 1e-4  # added to a group's standard deviation; where all rewards are equal, every advantage is 0


class GRPOTerms(NamedTuple):
    """For each token: the loss, the KL divergence from the reference (k3), and whether the ratio is clipped."""

    loss: Tokens
    kl: Tokens
    clipped: Bool[Tensor, " n"]


def advantages(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """(r - mean) / (standard deviation + 1e-4) within each group; the deviation divides by n - 1, as in TRL."""
    rewards = rewards.double()
    deviation = rewards.std(1, keepdim=True) + EPSILON
    return ((rewards - rewards.mean(1, keepdim=True)) / deviation).float()


def terms(logs: Tokens, old: Tokens, reference: Tokens, advantage: Tokens, clip: float, beta: float) -> GRPOTerms:
    """-min(ratio A, clip(ratio) A) + β KL of each token (equation 3), ratio = p / p_old.

    KL is Schulman's estimator k3 = p_ref/p - ln(p_ref/p) - 1 (equation 4): never negative, unbiased.
    """
    ratio = (logs - old).exp()
    log_ratio = reference - logs
    clipped = ratio.clamp(1 - clip, 1 + clip)
    kl = log_ratio.exp() - log_ratio - 1
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    return GRPOTerms(beta * kl - surrogate, kl.detach(), (clipped * advantage < ratio * advantage).detach())


def grpo(clip: float, beta: float, temperature: float = 1.0) -> Objective:
    """Return the objective for the training loop: the mean over answers of the mean over an answer's tokens.

    Its batches hold "tokens", "mask" (True on the answers), "old" and "reference" (log-probabilities under the sampling
    policy and the reference; without the latter kl is 0) [batch, length], and for each answer "advantage" and figures
    to report [batch]. Figures: those, kl, entropy, clip_fraction and length. Dropout is off, so that ratios compare the
    same function.
    """
    return partial(_loss, clip, beta, temperature)


def _loss(clip: float, beta: float, temperature: float, model: Any, batch: Batch) -> LossOutput:
    with evaluation_mode(model):
        logs, entropy, rows = answer_log_probabilities(model, batch, temperature)
    mask = batch["mask"][:, 1:]
    reference = batch["reference"][:, 1:][mask] if "reference" in batch else logs.detach()
    found = terms(logs, batch["old"][:, 1:][mask], reference, batch["advantage"][rows], clip, beta)
    share = 1 / mask.sum(-1)[rows]
    means = {"kl": found.kl, "entropy": entropy, "clip_fraction": found.clipped}
    figures = {name: (value * share).sum() for name, value in means.items()}
    return LossOutput((found.loss * share).sum(), len(mask), figures | response_statistics(batch))


class GRPOBatches(Rollouts):
    """The data of the training loop, with "advantage" and "varied" for each answer: whether its group has different
    rewards, without which nothing is learned from it."""

    def _targets(self, rollout: Batch, group: int) -> Batch:
        groups = rollout["reward"].view(-1, group)
        return {
            "advantage": advantages(groups).flatten() if group > 1 else torch.zeros_like(rollout["reward"]),
            "varied": (groups != groups[:, :1]).any(1).float().repeat_interleave(group),
        }

    def _zero_targets(self, rows: int) -> Batch:
        return dict.fromkeys(("advantage", "varied"), torch.zeros(rows))


NORMAL = {
    "varied": Range(
        0.001, 1.0, "no group has answers with different rewards, so nothing is learned: look at the reward"
    ),
    "finished": Range(0.5, 1.0, "most answers are cut off: more --max-tokens, or a model that has learned to end"),
    "kl": Range(0.0, 0.5, "the policy moves far from the reference model: a lower learning rate or more --beta"),
    "entropy": Range(
        0.01, float("inf"), "the policy always writes the same: a higher --temperature or a lower learning rate"
    ),
    "clip_fraction": Range(0.0, 0.2, "many tokens are clipped: a lower learning rate or fewer updates for a rollout"),
    "length": Range(0.33, 3.0, "answers are much shorter or longer than at first: look at the reward", True),
}

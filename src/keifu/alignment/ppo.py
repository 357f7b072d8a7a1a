"""Proximal policy optimisation (PPO) as in InstructGPT, with a policy, a value model and a frozen reference model.

(Schulman et al., 2017; Ouyang et al., 2022, section 3.5 and appendix C.4.) This file has the loss and the batches:
rewards with a KL penalty, advantages and returns for each token, and pretraining text in addition to the answers
(PPO-ptx).

Axes: batch or row = answers, length or position = tokens of a prompt and its answer, n = tokens of all answers, k =
windows of pretraining text for each answer.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from keifu.alignment.monitor import Healthy
from keifu.alignment.rollouts import Rollouts, Tokens, answer_log_probabilities, response_statistics, take
from keifu.data.text.packed import PackedText
from keifu.errors import UserError
from keifu.inference.text.model import evaluation_mode
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.protocols import Batch, LossOutput

Places = Float[Tensor, "batch length"]
Mask = Bool[Tensor, "batch length"]


@dataclass(frozen=True)
class PPOSettings:
    """Coefficients of PPO. The defaults are InstructGPT's, if its paper gives them.

    kl_coef: weight β of the KL penalty on each token. clip: range of the probability ratio. value_clip: largest change
    of a value from the rollout's. discount, gae_lambda: γ and λ of the advantages. value_weight: weight of the value
    loss relative to the policy's. text_weight: weight of the loss on pretraining text (PPO-ptx's γ).
    missing_eos_penalty: subtracted from the reward of a response without an end-of-text token. temperature: of
    sampling.
    """

    kl_coef: float = 0.02
    clip: float = 0.2
    value_clip: float = 0.2
    discount: float = 1.0
    gae_lambda: float = 0.95
    value_weight: float = 0.1
    text_weight: float = 27.8
    missing_eos_penalty: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if min(self.kl_coef, self.value_clip, self.value_weight, self.text_weight, self.missing_eos_penalty) < 0:
            raise UserError(f"The weights of PPO must be 0 or more: {self}.")
        if not (0 < self.clip < 1 and 0 <= self.discount <= 1 and 0 <= self.gae_lambda <= 1):
            settings = f"clip {self.clip}, discount {self.discount} and gae_lambda {self.gae_lambda}"
            raise UserError(f"clip, discount and gae_lambda must be between 0 and 1, not {settings}.")


class ActorCritic(nn.Module):
    """The trained module: a policy, which writes answers, and a value model, which predicts their return."""

    def __init__(self, policy: nn.Module, value: nn.Module):
        super().__init__()
        self.policy = policy
        self.value = value


def kl_penalized_rewards(
    scores: Float[Tensor, " batch"], old: Places, reference: Places, mask: Mask, kl_coef: float
) -> Float[Tensor, "batch length"]:
    """Return the reward of each token: -β ln(p / p_reference), plus the score of the answer at its last token."""
    rewards = torch.where(mask, kl_coef * (reference - old), 0.0)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1, keepdim=True)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def advantages(rewards: Places, values: Places, mask: Mask, discount: float = 1.0, gae_lambda: float = 0.95) -> Places:
    """Return the generalised advantage estimation, GAE (Schulman et al., 2015, equation 16), of each token in the mask;
    these tokens are consecutive.

    values: the value model's prediction before each token. The value after the last token is 0, also if an answer was
    cut off at the token limit.
    """
    values = torch.where(mask, values.double(), 0.0)
    following = torch.cat([values[:, 1:], values.new_zeros(len(mask), 1)], 1)
    errors = torch.where(mask, rewards.double() + discount * following - values, 0.0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    ahead = positions[:, None] - positions  # axes: position of the error, position whose advantage it adds to
    decay = torch.where(ahead >= 0, (discount * gae_lambda) ** ahead.clamp(min=0).double(), 0.0)
    return torch.where(mask, errors @ decay, 0.0).float()


def whiten(values: Places, mask: Mask) -> Float[Tensor, "batch length"]:
    """Return the values with mean 0 and variance 1 over the mask, and 0 elsewhere. A single value is not changed."""
    masked_values = values[mask].double()
    if len(masked_values) < 2:
        return torch.where(mask, values, 0.0)
    whitened = (values.double() - masked_values.mean()) / (masked_values.var() + 1e-8).sqrt()
    return torch.where(mask, whitened, 0.0).float()


def explained_variance(values: Places, returns: Places, mask: Mask) -> float:
    """Return 1 - Var(return - value) / Var(return): 1 for a perfect value model, 0 for a constant one."""
    predicted = values[mask].double()
    observed = returns[mask].double()
    variance = float(observed.var(correction=0))
    return 1 - float((observed - predicted).var(correction=0)) / variance if variance > 1e-12 else 0.0


class TokenTargets(NamedTuple):
    """For each token: the value prediction, the whitened advantage, and the return."""

    values: Places
    advantage: Places
    returns: Places


def token_targets(
    scores: Float[Tensor, " batch"], old: Places, reference: Places, values: Places, mask: Mask, rule: PPOSettings
) -> TokenTargets:
    """Return the targets of a rollout from its answers' scores: rewards with the KL penalty, then GAE and returns, then
    whitening of the advantages over the whole rollout."""
    rewards = kl_penalized_rewards(scores, old, reference, mask, rule.kl_coef)
    gae = advantages(rewards, values, mask, rule.discount, rule.gae_lambda)
    return TokenTargets(values, whiten(gae, mask), gae + values)


class PPOTerms(NamedTuple):
    """For each token: the policy loss, the value loss, whether the ratio is clipped, and k2, half the squared change of
    the log-probability (an estimate of the KL divergence of the update)."""

    policy: Tokens
    value: Tokens
    clipped: Bool[Tensor, " n"]
    update_kl: Tokens


def terms(
    logs: Tokens, old: Tokens, advantage: Tokens, values: Tokens, old_values: Tokens, returns: Tokens, rule: PPOSettings
) -> PPOTerms:
    """Return the clipped surrogate loss max(-A ratio, -A clip(ratio)), where ratio = p / p_old (Schulman et al., 2017,
    equation 7), and the clipped value loss: half the larger of (V - R)² and (clip(V) - R)², where clip limits V to its
    old value ± value_clip.
    """
    ratio = (logs - old).exp()
    clipped_ratio = ratio.clamp(1 - rule.clip, 1 + rule.clip)
    clipped_values = old_values + (values - old_values).clamp(-rule.value_clip, rule.value_clip)
    value = torch.maximum((values - returns).square(), (clipped_values - returns).square()) / 2
    policy = torch.maximum(-advantage * ratio, -advantage * clipped_ratio)
    clipped = (-advantage * clipped_ratio > -advantage * ratio).detach()
    return PPOTerms(policy, value, clipped, (logs - old).detach().square() / 2)


def ppo(model: Any, batch: Batch, rule: PPOSettings) -> LossOutput:
    """Return the loss of an `ActorCritic`, the mean over all tokens of a minibatch's answers, counted once for each
    answer: an objective.

    The batch has "tokens", "mask" (True on the answers), "old", "values", "advantage" and "returns" of the rollout,
    all (batch, length); for each answer "share" (the answers per token of the minibatch) and figures to report (batch);
    and optionally "pretraining" (batch, k, text length). Dropout is off, so that ratios compare the same function.
    """
    mask = batch["mask"][:, 1:]
    with evaluation_mode(model):
        logs, entropy, rows, positions = answer_log_probabilities(model.policy, batch, rule.temperature)
        values = take(model.value.scores_along(batch["tokens"][:, None, :-1])[:, 0], positions)
    names = ("old", "advantage", "values", "returns")
    old, advantage, old_values, returns = (take(batch[name][:, 1:], positions) for name in names)
    losses = terms(logs, old, advantage, values, old_values, returns, rule)
    share = batch["share"][rows]
    means = {"policy_loss": losses.policy, "value_loss": losses.value, "entropy": entropy}
    means |= {"clip_fraction": losses.clipped, "update_kl": losses.update_kl}
    figures = {name: (mean.detach() * share).sum() for name, mean in means.items()} | response_statistics(batch)
    total = ((losses.policy + rule.value_weight * losses.value) * share).sum()
    if "pretraining" in batch:
        text = causal_language_modeling(model.policy, {"tokens": batch["pretraining"].flatten(0, 1)})
        text_loss = text.total * (len(mask) / text.weight)  # the mean over tokens, counted once for each answer
        total = total + rule.text_weight * text_loss
        figures["text_loss"] = text_loss.detach()
    return LossOutput(total, len(mask), figures)


NORMAL = {
    "reward_spread": Healthy(
        1e-4, float("inf"), "all answers have the same reward, so only the KL penalty is learned: look at the reward"
    ),
    "kl": Healthy(
        -0.5,
        20.0,
        "below 0, sampling and scoring do not agree; above, the policy is far from the reference model, where the "
        "reward is less reliable: more --kl-coef, or fewer rollouts",
    ),
    "entropy": Healthy(0.01, float("inf"), "the policy has collapsed to one answer: a lower rate or more --kl-coef"),
    "clip_fraction": Healthy(0.0, 0.3, "the policy moves too far on one rollout: a lower rate or fewer epochs"),
    "update_kl": Healthy(0.0, 0.1, "the policy moves too far on one rollout: a lower rate or fewer epochs"),
    "explained_variance": Healthy(
        0.0, 1.0, "the value model predicts worse than a constant: usual at first, later a higher --value-rate"
    ),
    "finished": Healthy(0.5, 1.0, "most answers are cut off: more --max-tokens, or --missing-eos-penalty"),
    "length": Healthy(0.33, 3.0, "answers are much shorter or longer than at first: look at the reward", True),
}


@dataclass(frozen=True, eq=False)
class PretrainingMix:
    """Pretraining text (PPO-ptx): `per_answer` windows for every answer of an update."""

    text: PackedText
    per_answer: int

    def batch(self, step: int, rows: int) -> Tensor:
        """Return the windows of an update (row, k, text length)."""
        count = rows * self.per_answer
        return self._reshape(self.text.windows(step * count + np.arange(count)), rows)

    def held_out(self, start: int, rows: int) -> Tensor:
        """Return the held-out windows of the answers from number `start` on, repeated after the last window."""
        windows, k = self.text.held_out, self.per_answer
        return self._reshape(windows[(start * k + np.arange(rows * k)) % len(windows)], rows)

    def _reshape(self, windows: np.ndarray, rows: int) -> Tensor:
        return torch.from_numpy(windows.astype(np.int64)).view(rows, self.per_answer, -1)


@dataclass(eq=False, kw_only=True)
class PPOBatches(Rollouts):
    """Training data for `ppo`, which lists the content of a batch.

    For each answer a batch also has kl, ln(p / p_reference) of the whole answer, and two figures that are the same for
    all answers of a rollout: reward_spread, the standard deviation of the rewards, and explained_variance. value: the
    value model. pretraining: text that is learned in addition to the answers.
    """

    value: Any
    rule: PPOSettings
    pretraining: PretrainingMix | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of the prompts, of the settings of the rollouts, and of the pretraining text."""
        text = f" {self.pretraining.text.fingerprint} {self.pretraining.per_answer}" if self.pretraining else ""
        return hashlib.sha256(f"{super().fingerprint}{text}".encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """Return the minibatch of a step, with its pretraining text."""
        batch = _with_share(super().batch(step))
        return batch | ({"pretraining": self.pretraining.batch(step, len(batch["mask"]))} if self.pretraining else {})

    def validation(self) -> Iterator[Batch]:
        """Yield greedy answers to the held-out prompts, with held-out text."""
        start = 0
        for batch in super().validation():
            rows = len(batch["mask"])
            text = {"pretraining": self.pretraining.held_out(start, rows)} if self.pretraining else {}
            yield _with_share(batch) | text
            start += rows

    def _targets(self, rollout: Batch, group: int) -> Batch:
        old, reference, mask = rollout["old"], rollout["reference"], rollout["mask"]
        scores = rollout["reward"] - self.rule.missing_eos_penalty * (1 - rollout["finished"])
        targets = token_targets(scores, old, reference, self._predict_values(rollout), mask, self.rule)
        kl = ((old - reference) * mask).sum(1)
        of_rollout = {
            "reward_spread": float(rollout["reward"].std(correction=0)),
            "explained_variance": explained_variance(targets.values, targets.returns, mask),
        }
        figures = {name: torch.full_like(kl, value) for name, value in of_rollout.items()}
        return {**targets._asdict(), "kl": kl, **figures}

    def _zero_targets(self, rows: int) -> Batch:
        tokens = dict.fromkeys(TokenTargets._fields, torch.zeros(rows, self.longest))
        figures = dict.fromkeys(("kl", "reward_spread", "explained_variance", "share"), torch.zeros(rows))
        return tokens | figures | ({"pretraining": self.pretraining.batch(0, rows)} if self.pretraining else {})

    def _predict_values(self, rollout: Batch) -> Tensor:
        """Return the value model's prediction before each token of the answers (row, position); 0 elsewhere."""

        def values(part: Batch) -> Tensor:
            return self.value.scores_along(part["tokens"][:, None, :-1])[:, 0][part["mask"][:, 1:]]

        return self._of_answers(self.value, rollout, values)


def _with_share(batch: Batch) -> Batch:
    """Return the batch with "share", its answers per token. It makes a sum over answers a mean over tokens, for any
    split of the batch."""
    rows = len(batch["mask"])
    return batch | {"share": torch.full((rows,), rows / float(batch["mask"].sum()))}

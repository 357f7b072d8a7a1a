"""Proximal policy optimisation (PPO) as InstructGPT uses it (Schulman et al., 2017; Ouyang et al., 2022, sections 3.5
and C.4): rewards with a KL penalty, generalised advantage estimation, the clipped losses of policy and value model, and
the batches of responses that they are computed from, with pretraining text beside them (PPO-ptx).

Axes: batch, row = responses; length, position = tokens of a prompt and its response; n = tokens of responses;
k = pretraining texts for each response.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from keifu.alignment.monitor import Range
from keifu.alignment.rollouts import Rollouts, Tokens, answer_log_probabilities, response_statistics
from keifu.data.text.packed import PackedText
from keifu.errors import UserError
from keifu.generation.text.engine import evaluation_mode
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.protocols import Batch, LossOutput, Objective

Places = Float[Tensor, "batch length"]
Mask = Bool[Tensor, "batch length"]


@dataclass(frozen=True)
class PPOSettings:
    """Coefficients of PPO; the defaults are InstructGPT's where it gives them.

    kl_coef: weight β of the KL penalty on each token. clip: range of the probability ratio. value_clip: how far a value
    may move from the one of the rollout. discount, gae_lambda: γ and λ of the advantages. value_weight: of the value
    loss beside the policy's. text_weight: of the loss on pretraining text (PPO-ptx's γ). missing_eos_penalty:
    subtracted from the reward of a response without an end-of-text token. temperature: of sampling.
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
            raise UserError(f"The weights of PPO are 0 or more, and they are {self}.")
        if not (0 < self.clip < 1 and 0 <= self.discount <= 1 and 0 <= self.gae_lambda <= 1):
            told = f"clip {self.clip}, discount {self.discount} and gae_lambda {self.gae_lambda}"
            raise UserError(f"clip, discount and gae_lambda lie between 0 and 1, and they are {told}.")


class ActorCritic(nn.Module):
    """What the loop trains: a policy, which writes, and a value model, which tells what it expects of a beginning."""

    def __init__(self, policy: nn.Module, value: nn.Module):
        super().__init__()
        self.policy, self.value = policy, value


def kl_penalized_rewards(
    scores: Float[Tensor, " batch"], old: Places, reference: Places, mask: Mask, kl_coef: float
) -> Float[Tensor, "batch length"]:
    """The reward of each token: -β ln(p / p_reference), and of an answer's last one its score too."""
    rewards = torch.where(mask, kl_coef * (reference - old), 0.0)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1, keepdim=True)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def advantages(rewards: Places, values: Places, mask: Mask, discount: float = 1.0, gae_lambda: float = 0.95) -> Places:
    """Generalised advantage estimates (Schulman et al., 2015, equation 16) of the tokens that the mask marks, which
    follow each other.

    values: what was expected before each token. Behind the last token nothing is expected, also of an answer cut off.
    """
    expected = torch.where(mask, values.double(), 0.0)
    after = torch.cat([expected[:, 1:], expected.new_zeros(len(mask), 1)], 1)
    errors = torch.where(mask, rewards.double() + discount * after - expected, 0.0)
    places = torch.arange(mask.shape[1], device=mask.device)
    ahead = places[:, None] - places  # row: where an error is, column: what it counts for
    decay = torch.where(ahead >= 0, (discount * gae_lambda) ** ahead.clamp(min=0).double(), 0.0)
    return torch.where(mask, errors @ decay, 0.0).float()


def whiten(values: Places, mask: Mask) -> Float[Tensor, "batch length"]:
    """With mean 0 and variance 1 over what the mask marks; 0 elsewhere. A single value stays what it is."""
    chosen = values[mask].double()
    if len(chosen) < 2:
        return torch.where(mask, values, 0.0)
    normal = (values.double() - chosen.mean()) / (chosen.var() + 1e-8).sqrt()
    return torch.where(mask, normal, 0.0).float()


def explained_variance(values: Places, returns: Places, mask: Mask) -> float:
    """1 - Var(return - value) / Var(return): 1 of a value model that knows all, 0 of one that says always the same."""
    told, came = values[mask].double(), returns[mask].double()
    spread = float(came.var(correction=0))
    return 1 - float((came - told).var(correction=0)) / spread if spread > 1e-12 else 0.0


class PPOTerms(NamedTuple):
    """Of each token: the policy's loss, the value's, whether clipping holds the policy back, and its squared step."""

    policy: Tokens
    value: Tokens
    clipped: Bool[Tensor, " n"]
    moved: Tokens


def terms(
    logs: Tokens, old: Tokens, advantage: Tokens, values: Tokens, old_values: Tokens, returns: Tokens, rule: PPOSettings
) -> PPOTerms:
    """max(-A ratio, -A clip(ratio)), ratio = p / p_old (Schulman et al., 2017, equation 7), and half the larger of
    (V - R)² and (clip(V) - R)², V clipped around what it was in the rollout."""
    ratio = (logs - old).exp()
    kept = ratio.clamp(1 - rule.clip, 1 + rule.clip)
    near = old_values + (values - old_values).clamp(-rule.value_clip, rule.value_clip)
    value = torch.maximum((values - returns).square(), (near - returns).square()) / 2
    policy = torch.maximum(-advantage * ratio, -advantage * kept)
    clipped = (-advantage * kept > -advantage * ratio).detach()
    return PPOTerms(policy, value, clipped, (logs - old).detach().square() / 2)


def ppo(rule: PPOSettings) -> Objective:
    """The objective for the training loop, of an `ActorCritic`; the mean over all tokens of a minibatch's answers.

    Its batches hold "tokens" and "mask", True on the answers, "old", "values", "advantage" and "returns", all of the
    rollout [batch, length]; of each answer "share", answers for each token of the minibatch, and figures to be told
    [batch]; and where text is learned too, "text" [batch, k, text length]. There is no dropout: ratios compare one
    function.
    """
    return partial(_outcome, rule)


def _outcome(rule: PPOSettings, model: Any, batch: Batch) -> LossOutput:
    mask = batch["mask"][:, 1:]
    with evaluation_mode(model):
        logs, entropy, rows = answer_log_probabilities(model.policy, batch, rule.temperature)
        values = model.value.scores_along(batch["tokens"][:, None, :-1])[:, 0][mask]
    old, advantage, expected, returns = (batch[name][:, 1:][mask] for name in ("old", "advantage", "values", "returns"))
    found, share = terms(logs, old, advantage, values, expected, returns, rule), batch["share"][rows]
    means = {"policy_loss": found.policy, "value_loss": found.value, "entropy": entropy}
    means |= {"clip_fraction": found.clipped, "update_kl": found.moved}
    figures = {name: (each.detach() * share).sum() for name, each in means.items()} | response_statistics(batch)
    total = ((found.policy + rule.value_weight * found.value) * share).sum()
    if "text" in batch:
        read = causal_language_modeling(model.policy, {"tokens": batch["text"].flatten(0, 1)})
        nats = read.total * (len(mask) / read.weight)  # a mean for each answer
        total, figures["text_loss"] = total + rule.text_weight * nats, nats.detach()
    return LossOutput(total, len(mask), figures)


NORMAL = {
    "reward_spread": Range(
        1e-4, float("inf"), "all answers have one reward, so only the distance is learned: look at the reward"
    ),
    "kl": Range(
        -0.5,
        20.0,
        "below 0, sampling and scoring do not agree; above, the policy is far from what it began with, and the reward "
        "tells less there: more --kl-coef, or fewer rollouts",
    ),
    "entropy": Range(0.01, float("inf"), "the policy has collapsed to one answer: a lower rate or more --kl-coef"),
    "clip_fraction": Range(0.0, 0.3, "the policy moves too far on one rollout: a lower rate or fewer epochs"),
    "update_kl": Range(0.0, 0.1, "the policy moves too far on one rollout: a lower rate or fewer epochs"),
    "explained_variance": Range(
        0.0, 1.0, "the value model tells less than a mean would: usual at first, later a higher --value-rate"
    ),
    "finished": Range(0.5, 1.0, "most answers are cut off: more --max-tokens, or --missing-eos-penalty"),
    "length": Range(0.33, 3.0, "answers are far from as long as they were at first: look at the reward", True),
}


@dataclass(frozen=True, eq=False)
class PretrainingMix:
    """Pretraining text (PPO-ptx), and how many of its windows go with each answer of an update."""

    text: PackedText
    each: int

    def batch(self, step: int, rows: int) -> Tensor:
        """The windows of an update, [row, k, length]."""
        count = rows * self.each
        return self._shaped(self.text.windows(step * count + np.arange(count)), rows)

    def held_out(self, at: int, rows: int) -> Tensor:
        """Windows that are not learned from, all in turn."""
        held = self.text.held_out
        return self._shaped(held[(at * self.each + np.arange(rows * self.each)) % len(held)], rows)

    def _shaped(self, windows: np.ndarray, rows: int) -> Tensor:
        return torch.from_numpy(windows.astype(np.int64)).view(rows, self.each, -1)


class PPOBatches(Rollouts):
    """The training loop's data; `keifu.alignment.ppo.ppo` says what a batch holds.

    Of each answer there are also kl, ln(p / p_reference) of it whole, and of its rollout, the same for each answer,
    reward_spread, the rewards' deviation, and explained_variance.
    """

    def __init__(self, value: Any, rule: PPOSettings, beside: PretrainingMix | None, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.value, self.rule, self.beside = value, rule, beside

    @property
    def fingerprint(self) -> str:
        """A hash of the prompts, of how answers are drawn, and of the text."""
        text = f" {self.beside.text.fingerprint} {self.beside.each}" if self.beside else ""
        return hashlib.sha256(f"{super().fingerprint}{text}".encode()).hexdigest()

    def batch(self, step: int) -> dict[str, Tensor]:
        """The minibatch of a step, and the text of that step."""
        found = _shared(super().batch(step))
        return found | ({"text": self.beside.batch(step, len(found["mask"]))} if self.beside else {})

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """The likeliest answers to the held-out prompts, and held-out text."""
        at = 0
        for found in super().validation():
            rows = len(found["mask"])
            yield _shared(found) | ({"text": self.beside.held_out(at, rows)} if self.beside else {})
            at += rows

    def _rated(self, made: dict[str, Tensor], group: int) -> dict[str, Tensor]:
        mask, rule, values = made["mask"], self.rule, self._values(made)
        scores = made["reward"] - rule.missing_eos_penalty * (1 - made["finished"])
        rewards = kl_penalized_rewards(scores, made["old"], made["reference"], mask, rule.kl_coef)
        found = advantages(rewards, values, mask, rule.discount, rule.gae_lambda)
        returns = found + values
        whole = {
            "reward_spread": float(made["reward"].std(correction=0)),
            "explained_variance": explained_variance(values, returns, mask),
        }
        places = {"values": values, "advantage": whiten(found, mask), "returns": returns}
        kl = ((made["old"] - made["reference"]) * mask).sum(1)
        return places | {"kl": kl} | {name: torch.full_like(kl, value) for name, value in whole.items()}

    def _blank(self, rows: int) -> dict[str, Tensor]:
        zeros = torch.zeros(rows, self.longest)
        each = dict.fromkeys(("kl", "reward_spread", "explained_variance", "share"), torch.zeros(rows))
        text = {"text": self.beside.batch(0, rows)} if self.beside else {}
        return dict.fromkeys(("values", "advantage", "returns"), zeros) | each | text

    @torch.no_grad()
    def _values(self, made: dict[str, Tensor]) -> Tensor:
        """What was expected before each token of the answers, at the places of the tokens."""
        found = torch.zeros_like(made["old"])
        device = next(self.value.parameters()).device
        with evaluation_mode(self.value):
            for at in range(0, len(found), self.at_a_time):
                some = slice(at, at + self.at_a_time)
                tokens = made["tokens"][some, None, :-1].to(device)
                found[some, 1:] = self.value.scores_along(tokens)[:, 0].float().cpu()
        return found * made["mask"]


def _shared(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the answers for each token, so that a sum over answers is a mean over tokens, however the batch is split."""
    rows = len(found["mask"])
    return found | {"share": torch.full((rows,), rows / float(found["mask"].sum()))}

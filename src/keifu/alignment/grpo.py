"""Group relative policy optimisation (Shao et al., 2024, DeepSeekMath): answers to one prompt are compared with each
other, so no value model is needed; it knows no model by name and no reward.

Axes: batch = answers, group = answers to one prompt, length = tokens of a prompt and its answer, n = tokens of answers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.layers.log_probabilities import token_log_probabilities
from keifu.training.protocols import Batch, Objective, Outcome

EPSILON = 1e-4  # beside a group's deviation; where all rewards are equal, every advantage is 0
Tokens = Float[Tensor, " n"]


class Terms(NamedTuple):
    """Of each token: the loss, how far the policy has left the reference (k3), and whether clipping holds it back."""

    loss: Tokens
    kl: Tokens
    clipped: Bool[Tensor, " n"]


class Chosen(NamedTuple):
    """Of each token of all answers: ln p, the entropy there in nats, and the answer that it is of."""

    logs: Tokens
    entropy: Tokens
    rows: Int[Tensor, " n"]


def advantages(rewards: Float[Tensor, "prompts group"]) -> Float[Tensor, "prompts group"]:
    """(r - mean) / (deviation + 1e-4) within each group; the deviation has n - 1 below the line, as TRL's."""
    rewards = rewards.double()
    spread = rewards.std(1, keepdim=True) + EPSILON
    return ((rewards - rewards.mean(1, keepdim=True)) / spread).float()


def terms(logs: Tokens, old: Tokens, reference: Tokens, advantage: Tokens, clip: float, beta: float) -> Terms:
    """-min(ratio A, clip(ratio) A) + β KL of each token (equation 3), ratio = p / p_old.

    KL is Schulman's estimator k3 = p_ref/p - ln(p_ref/p) - 1 (equation 4): never negative, without bias.
    """
    ratio, away = (logs - old).exp(), reference - logs
    kept = ratio.clamp(1 - clip, 1 + clip)
    kl = away.exp() - away - 1
    surrogate = torch.minimum(ratio * advantage, kept * advantage)
    return Terms(beta * kl - surrogate, kl.detach(), (kept * advantage < ratio * advantage).detach())


def answer_log_probabilities(model: Any, batch: Batch, temperature: float = 1.0) -> Chosen:
    """Of the tokens of batch["tokens"] [batch, length] that batch["mask"] marks, row by row.

    The model offers `hidden(tokens)` and `head_weight`.
    """
    tokens, mask = batch["tokens"], batch["mask"][:, 1:]
    hidden = model.hidden(tokens[:, :-1])[mask]
    found, entropy = token_log_probabilities(hidden, model.head_weight, tokens[:, 1:][mask], temperature)
    return Chosen(found, entropy, mask.nonzero()[:, 0])


def grpo(clip: float, beta: float, temperature: float = 1.0) -> Objective:
    """The objective for the training loop: the mean over answers of the mean over an answer's tokens.

    Its batches hold "tokens" and "mask", True on the answers, "old" and "reference" (what policy and reference gave as
    ln p; without the latter kl is 0) [batch, length], and of each answer "advantage", "reward", "varied" (not all of
    its group have one reward) and "finished" [batch]. Figures: the last three, kl, entropy, clip_fraction and length.
    """
    return partial(_outcome, clip, beta, temperature)


def _outcome(clip: float, beta: float, temperature: float, model: Any, batch: Batch) -> Outcome:
    logs, entropy, rows = answer_log_probabilities(model, batch, temperature)
    mask = batch["mask"][:, 1:]
    reference = batch["reference"][:, 1:][mask] if "reference" in batch else logs.detach()
    found = terms(logs, batch["old"][:, 1:][mask], reference, batch["advantage"][rows], clip, beta)
    lengths = mask.sum(-1)
    share = 1 / lengths[rows]
    means = {"kl": found.kl, "entropy": entropy, "clip_fraction": found.clipped}
    figures = {name: (value * share).sum() for name, value in means.items()}
    figures |= {name: batch[name].sum() for name in ("reward", "varied", "finished")}
    return Outcome((found.loss * share).sum(), len(mask), figures | {"length": lengths.sum().float()})


NORMAL = {  # a figure's least and largest value, and what it may mean that it is outside
    "varied": (0.001, 1.0, "no group has answers with different rewards, so nothing is learned: look at the reward"),
    "finished": (0.5, 1.0, "most answers are cut off: more --max-tokens, or a model that has learned to end"),
    "kl": (0.0, 0.5, "the model moves far from what it began with: a lower learning rate or more --beta"),
    "entropy": (0.01, float("inf"), "the model says always the same: a higher --temperature or a lower learning rate"),
    "clip_fraction": (0.0, 0.2, "many tokens are clipped: sampling and training do not agree"),
}


@dataclass
class Watch:
    """Warnings where a figure leaves its normal range: one each time that it does, not one a step."""

    outside: set[str] = field(default_factory=set)

    def __call__(self, figures: Mapping[str, float]) -> Iterator[str]:
        """The warnings that these figures of a step give."""
        for name, (least, largest, meaning) in NORMAL.items():
            value = figures.get(name, least)
            inside = least - 1e-6 <= value <= largest + 1e-6
            if not inside and name not in self.outside:
                yield f"{name.replace('_', ' ')} is {value:.3g}, normal is {least:.2g} to {largest:.2g}: {meaning}."
            self.outside = self.outside - {name} if inside else self.outside | {name}

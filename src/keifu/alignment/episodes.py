"""Answers as PPO learns from them: what each token is worth beside what was expected of it, and pretraining text beside
the answers; knows no model by name and no file.

Axes: row = answers, position = tokens of a prompt and its answer, k = texts beside an answer, length = of a text.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keifu.alignment import ppo
from keifu.alignment.ppo import Rule
from keifu.alignment.rollouts import Rollouts
from keifu.data.packed import PackedText
from keifu.generation.decoding import evaluating


@dataclass(frozen=True, eq=False)
class Beside:
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


class Episodes(Rollouts):
    """The training loop's data; `keifu.alignment.ppo.ppo` says what a batch holds.

    Of each answer there are also kl, ln(p / p_reference) of it whole, and of its rollout, the same for each answer,
    reward_spread, the rewards' deviation, and explained_variance.
    """

    def __init__(self, value: Any, rule: Rule, beside: Beside | None, *given: Any, **options: Any):
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
        scores = made["reward"] - rule.cut_off * (1 - made["finished"])
        rewards = ppo.penalised(scores, made["old"], made["reference"], mask, rule.beta)
        found = ppo.advantages(rewards, values, mask, rule.discount, rule.trace)
        returns = found + values
        whole = {
            "reward_spread": float(made["reward"].std(correction=0)),
            "explained_variance": ppo.explained_variance(values, returns, mask),
        }
        places = {"values": values, "advantage": ppo.whitened(found, mask), "returns": returns}
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
        with evaluating(self.value):
            for at in range(0, len(found), self.at_a_time):
                some = slice(at, at + self.at_a_time)
                tokens = made["tokens"][some, None, :-1].to(device)
                found[some, 1:] = self.value.scores_along(tokens)[:, 0].float().cpu()
        return found * made["mask"]


def _shared(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the answers for each token, so that a sum over answers is a mean over tokens, however the batch is split."""
    rows = len(found["mask"])
    return found | {"share": torch.full((rows,), rows / float(found["mask"].sum()))}

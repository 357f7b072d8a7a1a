"""Answers that a model writes while it learns, rewarded and compared within their groups: a batch of each step is a
function of the weights, the seed and the step, so nothing of it needs saving; knows no model by name and no file.

Axes: row = answers, those to one prompt together; position = tokens of a prompt and its answer, padded on the right.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keifu.alignment.grpo import advantages, answer_log_probabilities
from keifu.alignment.scoring import Reward, score
from keifu.data.prompts import Prompt, fingerprint
from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError
from keifu.generation.decoding import causal, evaluating
from keifu.generation.generate import Completion, generate_batch
from keifu.generation.sampling import Sampling

AT_A_TIME = 64  # answers


@dataclass(frozen=True)
class Plan:
    """How answers are drawn: prompts of a step, answers to each, the tokens that one has at most."""

    prompts: int = 8
    group: int = 8
    max_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.group < 2:
            raise UserError(f"A group has 2 answers or more, which are compared, and not {self.group}.")
        if self.prompts < 1 or self.max_tokens < 1 or self.temperature <= 0:
            raise UserError("A step has at least 1 prompt, an answer 1 token, and the temperature is more than 0.")


class Rollouts:
    """The training loop's data, which it makes anew after each update; `grpo` says what a batch holds.

    `reference` is the model that the policy is held to; None holds it to none, and the figure kl is 0.
    """

    on_policy = True

    def __init__(
        self,
        models: tuple[nn.Module, nn.Module | None],
        tokenizer: Tokenizer,
        parts: tuple[Sequence[Prompt], Sequence[Prompt]],
        reward: Reward,
        plan: Plan,
    ):
        if not parts[0]:
            raise UserError("There is no prompt to learn from.")
        (self.model, self.reference), self.tokenizer = models, tokenizer
        self.parts, self.reward, self.plan = parts, reward, plan
        self.ids = tuple([tokenizer.render_chat(each.messages) for each in part] for part in parts)
        self.longest = max(len(ids) for part in self.ids for ids in part) + plan.max_tokens
        if self.longest > (room := causal(self.model).config.context_length):
            raise UserError(
                f"The longest prompt and its answer have up to {self.longest} tokens, and this model's context is "
                f"{room}: shorten the prompts, or lower --max-tokens."
            )
        total = len(parts[0])
        self._order = lru_cache(2)(lambda epoch: np.random.default_rng([plan.seed, epoch]).permutation(total))

    @property
    def fingerprint(self) -> str:
        """A hash of all prompts and what belongs to them, and of how answers are drawn."""
        prompts = [fingerprint(part) for part in self.parts]
        return hashlib.sha256(f"{self.plan} {prompts}".encode()).hexdigest()

    def batch(self, step: int) -> dict[str, Tensor]:
        """Answers of the model as it is now to the prompts of a step, counted from 0."""
        plan = self.plan
        places = step * plan.prompts + np.arange(plan.prompts)
        epochs, inside = np.divmod(places, len(self.parts[0]))
        chosen = [int(self._order(int(epoch))[place]) for epoch, place in zip(epochs, inside, strict=True)]
        rows = [row for row in chosen for _ in range(plan.group)]
        drawn = np.random.SeedSequence([plan.seed, step]).generate_state(len(rows), np.uint32)
        samplings = [
            Sampling(max_tokens=plan.max_tokens, temperature=plan.temperature, seed=int(seed), log_probabilities=True)
            for seed in drawn
        ]
        return self._made(0, rows, samplings, plan.group)

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """The likeliest answers to the held-out prompts."""
        greedy = Sampling(max_tokens=self.plan.max_tokens, temperature=0, seed=0, log_probabilities=True)
        rows = range(len(self.parts[1]))
        for at in rows[::AT_A_TIME]:
            chosen = rows[at : at + AT_A_TIME]
            yield self._made(1, chosen, [greedy] * len(chosen), 1)

    def largest(self) -> dict[str, Tensor]:
        """A batch as large as one can be, without an answer of any model in it."""
        rows = self.plan.prompts * self.plan.group
        tokens, zeros = torch.zeros(rows, self.longest, dtype=torch.long), torch.zeros(rows, self.longest)
        mask = (torch.arange(self.longest) >= self.longest - self.plan.max_tokens).expand(rows, -1).clone()
        each = dict.fromkeys(("advantage", "reward", "varied", "finished"), torch.zeros(rows))
        return {"tokens": tokens, "mask": mask, "old": zeros, "reference": zeros, **each}

    def _made(self, part: int, rows: Sequence[int], samplings: Sequence[Sampling], group: int) -> dict[str, Tensor]:
        prompts = [self.ids[part][row] for row in rows]
        answers = generate_batch(self.model, self.tokenizer, prompts, samplings, AT_A_TIME)
        made = together(prompts, answers, self.tokenizer.pad_id or 0)
        examples = [self.parts[part][row] for row in rows]
        pairs = zip(examples, answers, strict=True)
        rewards = torch.tensor([score(self.reward, p.text, answer.text, p.record) for p, answer in pairs]).float()
        groups = rewards.view(-1, group)
        made |= {
            "advantage": advantages(groups).flatten() if group > 1 else torch.zeros_like(rewards),
            "reward": rewards,
            "varied": (groups != groups[:, :1]).any(1).float().repeat_interleave(group),
            "finished": torch.tensor([float(answer.finish_reason == "stop") for answer in answers]),
        }
        return made | ({"reference": self._referred(self.reference, made)} if self.reference else {})

    @torch.no_grad()
    def _referred(self, reference: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """ln p of the answers' tokens under the reference, at the places of the tokens."""
        found = torch.zeros_like(batch["old"])
        device = next(reference.parameters()).device
        with evaluating(reference):
            for at in range(0, len(found), AT_A_TIME):
                part = {name: batch[name][at : at + AT_A_TIME].to(device) for name in ("tokens", "mask")}
                logs = answer_log_probabilities(reference, part, self.plan.temperature).logs
                found[at : at + AT_A_TIME][batch["mask"][at : at + AT_A_TIME]] = logs.cpu()
        return found


def together(prompts: Sequence[Sequence[int]], answers: Sequence[Completion], pad_id: int) -> dict[str, Any]:
    """{"tokens", "mask": True on the answers, "old": ln p when each token was drawn [row, position]}."""
    lengths = [len(prompt) + len(answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]
    shape = len(lengths), max(lengths)
    tokens, mask, old = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, : lengths[row]] = torch.tensor([*prompt, *answer.tokens])
        mask[row, len(prompt) : lengths[row]] = True
        old[row, len(prompt) : lengths[row]] = torch.tensor(answer.sampled_log_probabilities or [])
    return {"tokens": tokens, "mask": mask, "old": old}

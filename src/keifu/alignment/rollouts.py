"""Answers that a model writes while it learns, with their rewards: what is made for a step is a function of the
weights, the seed and the step; knows no model, no file and not what is made of the rewards.

A rollout serves one update, or several: its answers are then parted into minibatches, and may be gone through more than
once. Axes: row = answers, those to one prompt together; position = tokens of a prompt and its answer, padded on the
right.

ln p of the tokens of answers, which every method that learns from answers of its own asks for; knows no reward.

Axes: batch = answers, length = tokens of a prompt and its answer, n = tokens of all answers, row by row.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.alignment.rewards import Scorer
from keifu.data.chat.prompts import Prompt, fingerprint
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.text.engine import causal, evaluation_mode
from keifu.generation.text.generate import Completion, generate_batch
from keifu.generation.text.sampling_params import SamplingParams
from keifu.layers.lora import unadapted
from keifu.layers.losses import token_log_probabilities
from keifu.training.protocols import Batch

Tokens = Float[Tensor, " n"]
TARGETS = ("advantage", "share")  # numbers of an answer that are no figures


class PolicyOutput(NamedTuple):
    """Of each token of all answers: ln p, the entropy there in nats, and the answer that it is of."""

    logs: Tokens
    entropy: Tokens
    rows: Int[Tensor, " n"]


def answer_log_probabilities(model: Any, batch: Batch, temperature: float = 1.0) -> PolicyOutput:
    """Of the tokens of batch["tokens"] [batch, length] that batch["mask"] marks, row by row.

    The model offers `hidden(tokens)` and `head_weight`.
    """
    tokens, mask = batch["tokens"], batch["mask"][:, 1:]
    hidden = model.hidden(tokens[:, :-1])[mask]
    found, entropy = token_log_probabilities(hidden, model.head_weight, tokens[:, 1:][mask], temperature)
    return PolicyOutput(found, entropy, mask.nonzero()[:, 0])


def response_statistics(batch: Batch) -> dict[str, Tensor]:
    """The sums of what a batch holds of each answer, a number each, to be told; and of the answers' lengths."""
    told = {name: each.sum() for name, each in batch.items() if each.dim() == 1 and name not in TARGETS}
    return told | {"length": batch["mask"].sum().float()}


TOGETHER = 16_384  # tokens of the answers, with their prompts, that are written or read at a time
MOST = 256  # answers at a time


@dataclass(frozen=True)
class RolloutPlan:
    """How answers are drawn: prompts of a rollout, answers to each, the tokens that one has at most; and how they are
    learned from: in so many minibatches, so many times over."""

    prompts: int = 8
    group: int = 8
    max_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    minibatches: int = 1
    epochs: int = 1

    def __post_init__(self) -> None:
        if min(self.prompts, self.group, self.max_tokens, self.minibatches, self.epochs) < 1 or self.temperature <= 0:
            raise UserError(
                "A rollout has at least 1 prompt, an answer 1 token, minibatches and epochs are 1 or more, and the "
                "temperature is more than 0."
            )
        if self.answers % self.minibatches:
            raise UserError(f"{self.answers} answers do not part into {self.minibatches} minibatches of one size.")

    @property
    def answers(self) -> int:
        """Of a rollout."""
        return self.prompts * self.group

    @property
    def updates(self) -> int:
        """For each rollout."""
        return self.minibatches * self.epochs


class Rollouts:
    """The training loop's data, which it makes anew when a rollout has served its updates.

    A batch holds "tokens", "mask", True on the answers, "old", ln p when each token was drawn, and where there is a
    `reference`, the model that the policy is held to (or the policy itself, whose adapters are then left out),
    "reference", its ln p [row, position]; "reward", "finished" and what else `measured` scores [row]; and what a method
    makes of these.
    """

    on_policy = True

    def __init__(
        self,
        models: tuple[nn.Module, nn.Module | None],
        tokenizer: Tokenizer,
        parts: tuple[Sequence[Prompt], Sequence[Prompt]],
        reward: Scorer,
        plan: RolloutPlan,
        measured: Mapping[str, Scorer] | None = None,
    ):
        if not parts[0]:
            raise UserError("There is no prompt to learn from.")
        (self.model, self.reference), self.tokenizer = models, tokenizer
        self.parts, self.plan, self.scorers = parts, plan, {"reward": reward, **(measured or {})}
        self.ids = tuple([tokenizer.render_chat(each.messages) for each in part] for part in parts)
        self.longest = max(len(ids) for part in self.ids for ids in part) + plan.max_tokens
        if self.longest > (room := causal(self.model).config.context_length):
            raise UserError(
                f"The longest prompt and its answer have up to {self.longest} tokens, and this model's context is "
                f"{room}: shorten the prompts, or lower --max-tokens."
            )
        self.at_a_time = max(1, min(MOST, TOGETHER // self.longest))
        total = len(parts[0])
        self._order = lru_cache(2)(lambda epoch: np.random.default_rng([plan.seed, epoch]).permutation(total))
        self._held: dict[str, Tensor] = {}

    @property
    def fingerprint(self) -> str:
        """A hash of all prompts and what belongs to them, and of how answers are drawn."""
        prompts = [fingerprint(part) for part in self.parts]
        return hashlib.sha256(f"{self.plan} {prompts}".encode()).hexdigest()

    def batch(self, step: int) -> dict[str, Tensor]:
        """The minibatch of a step, counted from 0: of answers of the model as it is now, where a rollout begins."""
        number, place = divmod(step, self.plan.updates)
        if not place:
            self._held = self._rollout(number)
        assert self._held, "a rollout that later weights cannot make again is part of the state"
        if self.plan.updates == 1:
            return self._held
        epoch, part = divmod(place, self.plan.minibatches)
        order = np.random.default_rng([self.plan.seed, number, epoch]).permutation(self.plan.answers)
        return slice_rollouts(self._held, np.split(order, self.plan.minibatches)[part])

    def kept(self) -> dict[str, Tensor]:
        """The rollout, where later weights may ask for it."""
        return self._held if self.plan.updates > 1 else {}

    def take_up(self, kept: dict[str, Tensor]) -> None:
        """Goes on with a rollout."""
        self._held = dict(kept)

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """The likeliest answers to the held-out prompts."""
        greedy = SamplingParams(max_tokens=self.plan.max_tokens, temperature=0, seed=0, log_probabilities=True)
        rows = range(len(self.parts[1]))
        for at in rows[:: self.at_a_time]:
            chosen = rows[at : at + self.at_a_time]
            yield self._made(1, chosen, [greedy] * len(chosen), 1)

    def largest(self) -> dict[str, Tensor]:
        """A batch as large as one can be, without an answer of any model in it."""
        rows = self.plan.answers // self.plan.minibatches
        tokens, zeros = torch.zeros(rows, self.longest, dtype=torch.long), torch.zeros(rows, self.longest)
        mask = (torch.arange(self.longest) >= self.longest - self.plan.max_tokens).expand(rows, -1).clone()
        each = dict.fromkeys((*self.scorers, "finished"), torch.zeros(rows))
        return {"tokens": tokens, "mask": mask, "old": zeros, "reference": zeros, **each, **self._blank(rows)}

    def _rollout(self, number: int) -> dict[str, Tensor]:
        plan = self.plan
        places = number * plan.prompts + np.arange(plan.prompts)
        epochs, inside = np.divmod(places, len(self.parts[0]))
        chosen = [int(self._order(int(epoch))[place]) for epoch, place in zip(epochs, inside, strict=True)]
        rows = [row for row in chosen for _ in range(plan.group)]
        drawn = np.random.SeedSequence([plan.seed, number]).generate_state(len(rows), np.uint32)
        samplings = [
            SamplingParams(
                max_tokens=plan.max_tokens, temperature=plan.temperature, seed=int(seed), log_probabilities=True
            )
            for seed in drawn
        ]
        return self._made(0, rows, samplings, plan.group)

    def _made(
        self, part: int, rows: Sequence[int], samplings: Sequence[SamplingParams], group: int
    ) -> dict[str, Tensor]:
        prompts = [self.ids[part][row] for row in rows]
        answers = generate_batch(self.model, self.tokenizer, prompts, samplings, self.at_a_time)
        made = stack_responses(prompts, answers, self.tokenizer.pad_id or 0)
        examples, texts = [self.parts[part][row] for row in rows], [answer.text for answer in answers]
        made |= {name: torch.tensor(scorer(examples, texts)).float() for name, scorer in self.scorers.items()}
        made["finished"] = torch.tensor([float(answer.finish_reason == "stop") for answer in answers])
        if part == 1:  # drawn greedily, where ln p is 0
            made["old"] = self._logs(self.model, made)
        if self.reference is not None:
            with unadapted(self.reference):
                made["reference"] = self._logs(self.reference, made)
        return made | self._rated(made, group)

    def _rated(self, made: dict[str, Tensor], group: int) -> dict[str, Tensor]:
        """What a method makes of answers and rewards, by name; a row for each answer."""
        raise NotImplementedError

    def _blank(self, rows: int) -> dict[str, Tensor]:
        """What `_rated` gives, of no answers, in the shape of the longest."""
        raise NotImplementedError

    @torch.no_grad()
    def _logs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """ln p of the answers' tokens under a model, at the places of the tokens."""
        found = torch.zeros_like(batch["old"])
        device = next(model.parameters()).device
        with evaluation_mode(model):
            for at in range(0, len(found), self.at_a_time):
                some = slice(at, at + self.at_a_time)
                part = {name: batch[name][some].to(device) for name in ("tokens", "mask")}
                logs = answer_log_probabilities(model, part, self.plan.temperature).logs
                found[some][batch["mask"][some]] = logs.cpu()
        return found


def slice_rollouts(batch: dict[str, Tensor], rows: np.ndarray) -> dict[str, Tensor]:
    """Some rows, without the places that none of them reaches."""
    some = {name: tensor[torch.from_numpy(rows)] for name, tensor in batch.items()}
    reached = int(some["mask"].any(0).nonzero().max()) + 1
    return {name: tensor[:, :reached] if tensor.dim() == 2 else tensor for name, tensor in some.items()}


def stack_responses(prompts: Sequence[Sequence[int]], answers: Sequence[Completion], pad_id: int) -> dict[str, Any]:
    """{"tokens", "mask": True on the answers, "old": ln p when each token was drawn [row, position]}."""
    lengths = [len(prompt) + len(answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]
    shape = len(lengths), max(lengths)
    tokens, mask, old = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, : lengths[row]] = torch.tensor([*prompt, *answer.tokens])
        mask[row, len(prompt) : lengths[row]] = True
        old[row, len(prompt) : lengths[row]] = torch.tensor(answer.sampled_log_probabilities or [])
    return {"tokens": tokens, "mask": mask, "old": old}

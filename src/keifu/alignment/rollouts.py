"""Rollouts: answers that the policy samples during training, with their rewards and log-probabilities.

A rollout depends on the weights, the seed and its number. It serves one or more updates: its answers are split into
minibatches, over one or more epochs. A subclass adds the quantities that its method computes from the rewards
(advantages, returns).

Axes: batch or row = answers, those to one prompt together; length or position = tokens of a prompt and its answer,
padded on the right; n = tokens of all answers, row by row.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from keifu.alignment.rewards import Scorer
from keifu.data.chat.prompts import Prompt, fingerprint
from keifu.data.chat.thoughts import with_opening
from keifu.data.epochs import Epochs
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.text.generate import Completion, generate_batch
from keifu.inference.text.model import causal, evaluation_mode
from keifu.inference.text.sampling_params import SamplingParams
from keifu.layers.lora import unadapted
from keifu.layers.losses.log_probabilities import token_log_probabilities
from keifu.processes import Processes, current
from keifu.training.protocols import Batch

Tokens = Float[Tensor, " n"]
TARGETS = ("advantage", "share")  # per-answer tensors of a batch that the loss uses and that are not reported
MAX_BATCH_TOKENS = 16_384  # prompt and answer tokens that are generated or scored at a time
MAX_BATCH_ANSWERS = 256  # answers that are generated or scored at a time


class PolicyOutput(NamedTuple):
    """Results for all tokens of all answers: log-probability, entropy before the token in nats, row of the answer, and
    position.

    positions: indices in the flattened (batch, length - 1) array of all positions after the first.
    """

    logs: Tokens
    entropy: Tokens
    rows: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]


def positions_of(mask: Bool[Tensor, "batch length"]) -> Int[Tensor, " n"]:
    """Return the flat positions where a mask is True, row by row. Only this call waits for a GPU; later uses of the
    positions do not."""
    return mask.flatten().nonzero()[:, 0]


def take(x: Num[Tensor, "batch length *axes"], positions: Int[Tensor, " n"]) -> Num[Tensor, "n *axes"]:
    """Return the values at these flat positions."""
    return x.flatten(0, 1).index_select(0, positions)


def answer_log_probabilities(model: Any, batch: Batch, temperature: float = 1.0) -> PolicyOutput:
    """Return log-probabilities of the tokens of batch["tokens"] (batch, length) where batch["mask"] is True, row by
    row.

    The model has `hidden(tokens)` and `head_weight`.
    """
    tokens = batch["tokens"]
    positions = positions_of(batch["mask"][:, 1:])
    hidden = take(model.hidden(tokens[:, :-1]), positions)
    logs, entropy = token_log_probabilities(hidden, model.head_weight, take(tokens[:, 1:], positions), temperature)
    return PolicyOutput(logs, entropy, positions // (tokens.shape[1] - 1), positions)


def response_statistics(batch: Batch) -> Batch:
    """Return the sum over the answers of each per-answer figure of a batch (rewards, ...), and of the answers'
    lengths."""
    sums = {name: values.sum() for name, values in batch.items() if values.dim() == 1 and name not in TARGETS}
    return sums | {"length": batch["mask"].sum().float()}


@dataclass(frozen=True)
class RolloutPlan:
    """Settings of a rollout.

    prompts: number per rollout. group: answers to each prompt. max_tokens: per answer. minibatches: equal parts of a
    rollout; each makes one update. epochs: passes over the answers of a rollout. Raises UserError for settings that are
    not positive, or answers that cannot be split evenly.
    """

    prompts: int = 8
    group: int = 8
    max_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    minibatches: int = 1
    epochs: int = 1

    def __post_init__(self) -> None:
        if min(self.prompts, self.group, self.max_tokens, self.minibatches, self.epochs) < 1 or self.temperature <= 0:
            raise UserError("Prompts, answers, minibatches and epochs must be at least 1, and the temperature above 0.")
        if self.answers % self.minibatches:
            raise UserError(f"{self.answers} answers cannot be split into {self.minibatches} minibatches of one size.")

    @property
    def answers(self) -> int:
        """The number of answers of a rollout."""
        return self.prompts * self.group

    @property
    def updates(self) -> int:
        """The number of updates that a rollout serves."""
        return self.minibatches * self.epochs


@dataclass(eq=False)
class Rollouts:
    """Training data: minibatches of a rollout. After the rollout's updates, the next one is generated.

    policy: the trained model, which writes the answers. reference: the model of the KL penalty, or the policy itself,
    whose adapters are then disabled; None: no penalty. prompts, held_out: for training and for validation. reward: the
    scorer to learn from. metrics: further scorers, which are only reported.

    A batch has "tokens", "mask" (True on the answers), "old" (log-probability of each token when it was sampled) and,
    with a reference, "reference" (its log-probabilities), all (row, position); "reward", "finished" (1 if the answer
    ended by itself) and the further metrics (row); and the targets of the method (see `_targets`). Raises UserError
    without prompts, or if a prompt is too long for the model's context.
    """

    policy: nn.Module
    reference: nn.Module | None
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    reward: Scorer
    plan: RolloutPlan
    metrics: Mapping[str, Scorer] = field(default_factory=dict)
    on_policy = True

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError("There is no prompt to learn from.")
        self.parts = (self.prompts, self.held_out)
        self.scorers = {"reward": self.reward, **self.metrics}
        self.ids = tuple([self.tokenizer.render_chat(prompt.messages) for prompt in part] for part in self.parts)
        self.longest = max(len(ids) for part in self.ids for ids in part) + self.plan.max_tokens
        if self.longest > (context := causal(self.policy).config.context_length):
            raise UserError(
                f"The longest prompt and its answer have up to {self.longest} tokens, and this model's context is "
                f"{context}: shorten the prompts, or lower --max-tokens."
            )
        self.at_a_time = max(1, min(MAX_BATCH_ANSWERS, MAX_BATCH_TOKENS // self.longest))
        self._epochs = Epochs(len(self.prompts), self.plan.prompts, self.plan.seed)
        self._rollout: Batch = {}

    @property
    def fingerprint(self) -> str:
        """A hash of all prompts with their records, and of the settings of the rollouts."""
        prompts = [fingerprint(part) for part in self.parts]
        return hashlib.sha256(f"{self.plan} {prompts}".encode()).hexdigest()

    def batch(self, step: int) -> Batch:
        """Return the minibatch of a step (from 0). The first minibatch of a rollout generates the rollout with the
        current model."""
        number, update = divmod(step, self.plan.updates)
        if not update:
            self._rollout = self._generate_rollout(number)
        assert self._rollout, "a rollout cannot be generated again by later weights, so it is part of the state"
        if self.plan.updates == 1:
            return self._rollout
        epoch, part = divmod(update, self.plan.minibatches)
        order = np.random.default_rng([self.plan.seed, number, epoch]).permutation(self.plan.answers)
        return slice_rollouts(self._rollout, np.split(order, self.plan.minibatches)[part])

    def state(self) -> Batch:
        """Return the current rollout if later updates need it; otherwise {}."""
        return self._rollout if self.plan.updates > 1 else {}

    def load_state(self, state: Batch) -> None:
        """Restore a result of `state`."""
        self._rollout = dict(state)

    def validation(self) -> Iterator[Batch]:
        """Yield greedy answers to the held-out prompts."""
        greedy = SamplingParams(max_tokens=self.plan.max_tokens, temperature=0, seed=0, log_probabilities=True)
        rows = range(len(self.parts[1]))
        for start in rows[:: self.at_a_time]:
            prompts = rows[start : start + self.at_a_time]
            yield self._generate(1, prompts, [greedy] * len(prompts), 1)

    def largest(self) -> Batch:
        """Return a batch of the largest possible size, filled with zeros, to measure memory before a run."""
        rows = self.plan.answers // self.plan.minibatches
        tokens = torch.zeros(rows, self.longest, dtype=torch.long)
        zeros = torch.zeros(rows, self.longest)
        mask = (torch.arange(self.longest) >= self.longest - self.plan.max_tokens).expand(rows, -1).clone()
        scores = dict.fromkeys((*self.scorers, "finished"), torch.zeros(rows))
        return {"tokens": tokens, "mask": mask, "old": zeros, "reference": zeros, **scores, **self._zero_targets(rows)}

    def _generate_rollout(self, number: int) -> Batch:
        plan = self.plan
        prompt_rows = self._epochs.batch(number).tolist()
        rows = [row for row in prompt_rows for _ in range(plan.group)]
        seeds = np.random.SeedSequence([plan.seed, number]).generate_state(len(rows), np.uint32)
        how = SamplingParams(max_tokens=plan.max_tokens, temperature=plan.temperature, log_probabilities=True)
        return self._generate(0, rows, [replace(how, seed=int(seed)) for seed in seeds], plan.group)

    def _generate(self, part: int, rows: Sequence[int], sampling: Sequence[SamplingParams], group: int) -> Batch:
        """Generate answers to the prompts `rows` of a part (0: training, 1: held out), and return a complete batch.
        Each rank writes some of the answers."""
        ranks = current() if len(rows) >= current().data_size else Processes()
        local = slice(*ranks.bounds(len(rows)))
        answers = self._answers(part, rows[local], sampling[local])
        rollout = ranks.gather_batch(answers, {"tokens": self.tokenizer.pad_id or 0})
        return rollout | self._targets(rollout, group)

    def _answers(self, part: int, rows: Sequence[int], sampling: Sequence[SamplingParams]) -> Batch:
        """Return this rank's answers with their rewards and log-probabilities."""
        ids = [self.ids[part][row] for row in rows]
        answers = generate_batch(self.policy, self.tokenizer, ids, sampling, self.at_a_time)
        rollout = stack_responses(ids, answers, self.tokenizer.pad_id or 0)
        prompts = [self.parts[part][row] for row in rows]
        texts = [with_opening(self.tokenizer, prompt, answer.text) for prompt, answer in zip(ids, answers, strict=True)]
        rollout |= {name: torch.tensor(scorer(prompts, texts)).float() for name, scorer in self.scorers.items()}
        rollout["finished"] = torch.tensor([float(answer.finish_reason == "stop") for answer in answers])
        if part == 1:  # greedy sampling reports a log-probability of 0
            rollout["old"] = self._log_probabilities(self.policy, rollout)
        if self.reference is not None:
            with unadapted(self.reference):
                rollout["reference"] = self._log_probabilities(self.reference, rollout)
        return rollout

    def _targets(self, rollout: Batch, group: int) -> Batch:
        """Return the method's tensors, computed from a rollout with `group` answers to each prompt: (row) or (row,
        position)."""
        raise NotImplementedError

    def _zero_targets(self, rows: int) -> Batch:
        """Return zeros in the shapes of `_targets`, for the longest prompt and answer."""
        raise NotImplementedError

    def _log_probabilities(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the log-probability of each token of the answers under a model (row, position); 0 elsewhere."""
        temperature = self.plan.temperature
        return self._of_answers(model, batch, lambda part: answer_log_probabilities(model, part, temperature).logs)

    @torch.no_grad()
    def _of_answers(self, model: nn.Module, batch: Batch, work: Callable[[Batch], Tensor]) -> Tensor:
        """Return `work`'s result for each token of the answers (row, position); 0 elsewhere. work: gets a few answers,
        on the model's device."""
        result = torch.zeros_like(batch["old"])
        device = next(model.parameters()).device
        with evaluation_mode(model):
            for start in range(0, len(result), self.at_a_time):
                rows = slice(start, start + self.at_a_time)
                part = {name: batch[name][rows].to(device) for name in ("tokens", "mask")}
                result[rows][batch["mask"][rows]] = work(part).float().cpu()
        return result


def slice_rollouts(batch: Batch, rows: np.ndarray) -> Batch:
    """Return some rows of a batch, without the positions on the right that are padding in all of them."""
    some = {name: tensor[torch.from_numpy(rows)] for name, tensor in batch.items()}
    length = int(some["mask"].any(0).nonzero().max()) + 1
    return {name: tensor[:, :length] if tensor.dim() == 2 else tensor for name, tensor in some.items()}


def stack_responses(prompts: Sequence[Sequence[int]], answers: Sequence[Completion], pad_id: int) -> Batch:
    """Return prompts and their answers as padded tensors (row, position): "tokens", "mask" (True on the answers) and
    "old" (the log-probability of each token when it was sampled)."""
    pairs = [*zip(prompts, answers, strict=True)]
    tokens = [torch.tensor([*prompt, *answer.tokens]) for prompt, answer in pairs]
    mask = [torch.tensor([False] * len(prompt) + [True] * len(answer.tokens)) for prompt, answer in pairs]
    old = [torch.tensor([0.0] * len(prompt) + (answer.sampled_log_probabilities or [])) for prompt, answer in pairs]
    padded = partial(pad_sequence, batch_first=True)
    return {"tokens": padded(tokens, padding_value=pad_id), "mask": padded(mask), "old": padded(old)}

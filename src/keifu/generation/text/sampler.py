"""Token sampling: chooses the next token of every row of a batch, each with its own settings and seed.

A row's token depends on its logits and on one uniform number, which its seed and position determine. Axes: rows =
texts being written, or independent distributions; vocab.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.generation.text import logits_processors
from keifu.generation.text.sampling_params import SamplingParams
from keifu.layers.counter_rng import uniform
from keifu.layers.wide import wide


def sample(logits: Float[Tensor, "rows vocab"], u: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Inverse transform sampling: the first token at which the cumulative probability passes u.

    One number a row suffices, where the Gumbel trick needs one for each token of the vocabulary. The sum is float64, so
    that rare tokens keep their probability; tokens of probability 0 are never sampled.
    """
    mass = wide(logits.softmax(-1)).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(mass, wide(u)[:, None] * mass[:, -1:], right=True)[:, 0].to(logits.device)


class RowSettings:
    """The settings of several rows as tensors; a call turns logits into those of the distribution to sample from.

    One row's settings serve any number of distributions, as when a finished text is scored.
    """

    def __init__(self, samplings: Sequence[SamplingParams], device: torch.device):
        self.samplings, self.device = list(samplings), device
        greedy = [s.temperature == 0 for s in samplings]
        self.any_greedy, self.all_greedy = any(greedy), all(greedy)
        self.greedy = torch.tensor(greedy, device=device)
        self.repetition = self._column([s.repetition_penalty for s in samplings], 1.0)
        self.presence = self._column([s.presence_penalty for s in samplings], 0.0)
        self.frequency = self._column([s.frequency_penalty for s in samplings], 0.0)
        self.temperature = self._column([s.temperature or 1.0 for s in samplings], 1.0)
        self.top_k = self._column([s.top_k for s in samplings], 0)
        self.top_p = self._column([s.top_p for s in samplings], 1.0)
        self.min_p = self._column([s.min_p for s in samplings], 0.0)
        self.bias = self._biases([s.logit_bias for s in samplings])

    def _column(self, values: list[Any], neutral: float | int) -> Tensor | None:
        """One value a row; None where all are neutral, so that the step is skipped."""
        kind = torch.float32 if isinstance(neutral, float) else torch.int64
        return None if all(v == neutral for v in values) else torch.tensor(values, dtype=kind, device=self.device)

    def _biases(self, pairs: Sequence[tuple[tuple[int, float], ...]]) -> tuple[Tensor, Tensor] | None:
        """Each row's biased tokens and their biases, filled up to equal length; None where there are none."""
        longest = max(map(len, pairs))
        full = torch.tensor([[*row, *[(0, 0.0)] * (longest - len(row))] for row in pairs], dtype=torch.float64)
        return (full[..., 0].long().to(self.device), full[..., 1].float().to(self.device)) if longest else None

    def apply_penalties(self, logits: logits_processors.Logits, history: "History") -> logits_processors.Logits:
        """The logits after the penalties and the bias; greedy decoding takes the largest of these."""
        if self.repetition is not None and history.seen is not None:
            logits = logits_processors.repetition_penalty(logits, history.seen, self.repetition)
        if self.presence is not None and history.counts is not None:
            logits = logits_processors.presence_penalty(logits, history.counts, self.presence)
        if self.frequency is not None and history.counts is not None:
            logits = logits_processors.frequency_penalty(logits, history.counts, self.frequency)
        return logits if self.bias is None else logits_processors.logit_bias(logits, *self.bias)

    def __call__(self, logits: logits_processors.Logits, history: "History") -> logits_processors.Logits:
        logits = self.apply_penalties(logits, history)
        best = logits_processors.likeliest(logits) if self.any_greedy else None
        if self.all_greedy and best is not None:
            return best
        steps = (
            (logits_processors.temperature, self.temperature),
            (logits_processors.top_k, self.top_k),
            (logits_processors.top_p, self.top_p),
            (logits_processors.min_p, self.min_p),
        )
        for step, parameter in steps:
            logits = logits if parameter is None else step(logits, parameter)
        if best is None:
            return logits
        return torch.where(self.greedy[:, None], best, logits)


@dataclass
class History:
    """The tokens so far, as the penalties need them; None where no row has such a penalty."""

    seen: Bool[Tensor, "rows vocab"] | None  # in the prompt or the output
    counts: Float[Tensor, "rows vocab"] | None  # how often in the output

    @classmethod
    def of_prompts(
        cls, settings: RowSettings, tokens: Int[Tensor, "rows length"], padding: Int[Tensor, " rows"] | None, vocab: int
    ) -> "History":
        """The history before the first new token."""
        rows, length = tokens.shape
        seen = counts = None
        if settings.repetition is not None:
            if padding is not None:  # padding is counted in an extra column, which is dropped
                tokens = tokens.masked_fill(torch.arange(length, device=tokens.device) < padding[:, None], vocab)
            seen = tokens.new_zeros(rows, vocab + 1, dtype=torch.bool).scatter_(1, tokens, True)[:, :vocab]
        if settings.presence is not None or settings.frequency is not None:
            counts = torch.zeros(rows, vocab, device=tokens.device)
        return cls(seen, counts)

    def add(self, tokens: Int[Tensor, " rows"]) -> None:
        """Counts one new token of each row."""
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, tokens[:, None], torch.ones_like(tokens[:, None], dtype=torch.float32))

    def before_each(self, tokens: Int[Tensor, " length"], vocab: int) -> "History":
        """The history of the one row before each of the tokens that follow, a row for each; this one then holds all."""
        if self.seen is None and self.counts is None:
            return self
        new = torch.zeros(len(tokens), vocab, device=tokens.device).scatter_(1, tokens[:, None], 1.0)
        after = new.cumsum(0)
        before = after - new
        seen = None if self.seen is None else self.seen | (before > 0)
        counts = None if self.counts is None else self.counts + before
        self.seen = None if self.seen is None else self.seen | (after[-1:] > 0)
        self.counts = None if self.counts is None else self.counts + after[-1:]
        return History(seen, counts)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keeps only these rows."""
        self.seen = None if self.seen is None else self.seen[rows]
        self.counts = None if self.counts is None else self.counts[rows]


@dataclass(frozen=True)
class SampledTokens:
    """The chosen tokens, and a table to be read by the host in one copy: token, largest logit and, if any row asks for
    them, its log-probability under the model and under the distribution sampled from, then the likeliest tokens under
    the model, as many as any row wants, each with its log-probability."""

    tokens: Int[Tensor, " rows"]
    figures: Float[Tensor, "rows columns"]


class Sampler:
    """Settings, seeds and history of the rows of a batch. Every sampling must have a seed."""

    def __init__(
        self,
        samplings: Sequence[SamplingParams],
        prompts: Int[Tensor, "rows length"],
        padding: Int[Tensor, " rows"] | None,
        vocab: int,
    ):
        self.settings = RowSettings(samplings, prompts.device)
        self.history = History.of_prompts(self.settings, prompts, padding, vocab)
        self.seeds = torch.tensor([s.seed for s in samplings], device=prompts.device)
        self.positions = torch.full_like(self.seeds, prompts.shape[1])  # of the token to be sampled, in its own text
        if padding is not None:
            self.positions = self.positions - padding
        self.reports = any(s.log_probabilities for s in samplings)
        self.top = max((s.top_log_probabilities for s in samplings if s.log_probabilities), default=0)

    def choose(
        self, logits: logits_processors.Logits, allowed: Bool[Tensor, "rows vocab"] | None = None
    ) -> SampledTokens:
        """One token for each row; the next call is for the tokens after these. `allowed`: those that may be chosen."""
        raw = logits
        logits = logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
        if self.settings.all_greedy:
            sampled, tokens = None, self.settings.apply_penalties(logits, self.history).argmax(-1)
        else:
            sampled = self.settings(logits, self.history)
            tokens = sample(sampled, uniform(self.seeds, self.positions))
        columns = [tokens, raw.amax(-1)]
        if self.reports:
            columns.append(logits_processors.log_probability(raw, tokens))
            certain = torch.zeros_like(columns[-1])
            columns.append(certain if sampled is None else logits_processors.log_probability(sampled, tokens))
            values, likeliest = raw.topk(min(self.top, raw.shape[1]))
            logs = values - raw.logsumexp(-1, keepdim=True)
            columns += [column for pair in zip(likeliest.T, logs.T, strict=True) for column in pair]
        self.positions = self.positions + 1
        self.history.add(tokens)
        return SampledTokens(tokens, torch.stack([wide(column).double() for column in columns], -1))

    def select(self, rows: list[int]) -> None:
        """Keeps only these rows."""
        self.settings = RowSettings([self.settings.samplings[row] for row in rows], self.settings.device)
        index = torch.tensor(rows, device=self.seeds.device)
        self.seeds, self.positions = self.seeds[index], self.positions[index]
        self.history.select(index)

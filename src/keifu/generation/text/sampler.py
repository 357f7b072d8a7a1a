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
        longest = max(map(len, pairs), default=0)
        rows = [[*row, *[(0, 0.0)] * (longest - len(row))] for row in pairs]
        full = torch.tensor(rows, dtype=torch.float64, device="cpu")
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
    def of_texts(
        cls, settings: RowSettings, texts: Sequence[Sequence[int]], written: Sequence[int], vocab: int
    ) -> "History":
        """The history after these texts, whose last `written` tokens are the model's own."""
        seen = counts = None
        if settings.repetition is not None:
            seen = torch.zeros(len(texts), vocab, dtype=torch.bool, device=settings.device)
            for row, text in enumerate(texts):
                seen[row, torch.tensor(text, device=settings.device)] = True
        if settings.presence is not None or settings.frequency is not None:
            counts = torch.zeros(len(texts), vocab, dtype=torch.float32, device=settings.device)
            for row, (text, n) in enumerate(zip(texts, written, strict=True)):
                own = torch.tensor(text[len(text) - n :], dtype=torch.long, device=settings.device)
                counts[row] = own.bincount(minlength=vocab)
        return cls(seen, counts)

    def add(self, tokens: Int[Tensor, " rows"], rows: Int[Tensor, " rows"] | None = None) -> None:
        """Counts one new token of each row, or of these rows."""
        rows = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
        if self.seen is not None:
            self.seen[rows, tokens] = True
        if self.counts is not None:
            self.counts[rows, tokens] += 1

    def join(self, other: "History", rows: int, more: int) -> "History":
        """This one of `rows` rows, and behind them the other's; a row without a penalty needs no history."""

        def rows_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            if a is None and b is None:
                return None
            like = b if a is None else a
            assert like is not None
            a, b = (like.new_zeros(n, like.shape[1]) if x is None else x for x, n in ((a, rows), (b, more)))
            return torch.cat([a, b])

        return History(rows_of(self.seen, other.seen), rows_of(self.counts, other.counts))

    def at(self, rows: Int[Tensor, " kept"]) -> "History":
        """That of some rows."""
        seen, counts = (None if each is None else each[rows] for each in (self.seen, self.counts))
        return History(seen, counts)


@dataclass(frozen=True)
class SampledTokens:
    """The chosen tokens, and a table to be read by the host in one copy: token, largest logit and, if any row asks for
    them, its log-probability under the model and under the distribution sampled from, then the likeliest tokens under
    the model, as many as any row wants, each with its log-probability."""

    tokens: Int[Tensor, " rows"]
    figures: Float[Tensor, "rows columns"]


class Sampler:
    """Settings, seeds and history of the texts that are being written; rows come and go while it runs."""

    def __init__(self, vocab: int, device: torch.device):
        self.vocab, self.device = vocab, device
        self.samplings: list[SamplingParams] = []
        self.history = History(None, None)
        self.seeds = torch.zeros(0, dtype=torch.long, device=device)
        self.positions = torch.zeros(0, dtype=torch.long, device=device)  # of the next token, in its own text
        self._prepare()

    def add(self, samplings: Sequence[SamplingParams], texts: Sequence[Sequence[int]], written: Sequence[int]) -> None:
        """More rows behind the others: their settings, which must have a seed, and their texts so far, of which the
        last `written` tokens are the model's own."""
        new = History.of_texts(RowSettings(samplings, self.device), texts, written, self.vocab)
        self.history = self.history.join(new, len(self.samplings), len(texts))
        self.samplings += samplings
        self.seeds = torch.cat([self.seeds, torch.tensor([s.seed for s in samplings], device=self.device)])
        self.positions = torch.cat([self.positions, torch.tensor([len(text) for text in texts], device=self.device)])
        self._prepare()

    def select(self, rows: Sequence[int]) -> None:
        """Keeps only these rows, in this order."""
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.samplings = [self.samplings[row] for row in rows]
        self.seeds, self.positions, self.history = self.seeds[index], self.positions[index], self.history.at(index)
        self._prepare()

    def choose(
        self,
        logits: logits_processors.Logits,
        rows: Sequence[int] | None = None,
        allowed: Bool[Tensor, "rows vocab"] | None = None,
    ) -> SampledTokens:
        """One token for each row, or for each of these rows; the next call is for the tokens after these.

        allowed: the tokens that may be chosen.
        """
        index, settings, history = None, self.settings, self.history
        if rows is not None:
            index = torch.tensor(rows, dtype=torch.long, device=self.device)
            settings, history = RowSettings([self.samplings[row] for row in rows], self.device), history.at(index)
        open_logits = logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)
        if settings.all_greedy:
            sampled, tokens = None, settings.apply_penalties(open_logits, history).argmax(-1)
        else:
            sampled = settings(open_logits, history)
            places = (self.seeds, self.positions) if index is None else (self.seeds[index], self.positions[index])
            tokens = sample(sampled, uniform(*places))
        self.history.add(tokens, index)
        if index is None:
            self.positions = self.positions + 1
        else:
            self.positions[index] += 1
        return SampledTokens(tokens, self._figures(logits, sampled, tokens))

    def _figures(
        self, logits: logits_processors.Logits, sampled: logits_processors.Logits | None, tokens: Tensor
    ) -> Float[Tensor, "rows columns"]:
        columns = [tokens, logits.amax(-1)]
        if self.reports:
            columns.append(logits_processors.log_probability(logits, tokens))
            certain = torch.zeros_like(columns[-1])
            columns.append(certain if sampled is None else logits_processors.log_probability(sampled, tokens))
            values, likeliest = logits.topk(min(self.top, logits.shape[1]))
            logs = values - logits.logsumexp(-1, keepdim=True)
            columns += [column for pair in zip(likeliest.T, logs.T, strict=True) for column in pair]
        return torch.stack([wide(column).double() for column in columns], -1)

    def _prepare(self) -> None:
        self.settings = RowSettings(self.samplings, self.device)
        self.reports = any(s.log_probabilities for s in self.samplings)
        self.top = max((s.top_log_probabilities for s in self.samplings if s.log_probabilities), default=0)

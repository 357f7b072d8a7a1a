"""Token sampling: chooses the next token of every row of a batch. Each row has its settings and seed.

A row's token depends on its logits and on one uniform number, which is determined by seed and position. Axes: rows =
running texts, or independent distributions; vocab.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.inference.text import logits_processors as processors
from keifu.inference.text.logits_processors import Logits
from keifu.inference.text.request import Request
from keifu.inference.text.sampling_params import SETTINGS, SamplingParams, SettingRow, Stage
from keifu.layers.counter_rng import UniformStreams
from keifu.layers.wide import wide

Texts = Sequence[Sequence[int]]  # tokens of each


def sample(logits: Logits, u: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Sample by the inverse transform: return the first token at which the cumulative probability exceeds u.

    It needs one number for each row; the Gumbel trick needs one for each token of the vocabulary. The sum is float64,
    so that rare tokens keep their probability. Tokens of probability 0 are never sampled.
    """
    return sample_scored(logits, u)[0]


def sample_scored(logits: Logits, u: Float[Tensor, " rows"]) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Sample like `sample`. Return the tokens and ln of each token's probability."""
    probabilities = logits.softmax(-1)
    mass = wide(probabilities).cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(mass, wide(u)[:, None] * mass[:, -1:], right=True).to(logits.device)
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # a row of NaN has no token; see `Request.take`
    return tokens[:, 0], probabilities.gather(1, tokens)[:, 0].log()


LARGE = 64 * processors.SHORTLIST  # for smaller vocabularies a shortlist does not save time


class Processor(NamedTuple):
    """Function of `logits_processors` with its row."""

    function: Callable[..., Logits]
    stage: Stage
    history: str
    neutral: float


def processors_of(rows: Mapping[str, SettingRow]) -> dict[str, Processor]:
    """Return the function of each setting that changes logits, in the order of application: by stage, then by row."""
    stages = {stage: order for order, stage in enumerate(get_args(Stage))}
    acting = [
        (name, Processor(vars(processors)[name], stage, row.setting.history, row.neutral))
        for name, row in rows.items()
        if (stage := row.setting.stage)
    ]
    return dict(sorted(acting, key=lambda pair: stages[pair[1].stage]))


PROCESSORS = processors_of(SETTINGS)
SHORTLIST = {"top_k", "top_p"}  # the filters that `logits_processors.shortlist` applies
assert {name for name, each in PROCESSORS.items() if each.stage == "shortlist"} == SHORTLIST
FILTER_STAGES: tuple[Stage, ...] = ("before shortlist", "shortlist", "after shortlist")


class RowSettings:
    """Settings of several rows as tensors. A call converts logits to those of the distribution to sample from.

    The settings of one row serve any number of distributions, for example to score a finished text. defers: whether
    `choose` reports rows that need more than a shortlist, instead of waiting for the device. This is possible only if
    each row has a top-k; then only many equally likely tokens need more.
    """

    def __init__(self, samplings: Sequence[SamplingParams], device: torch.device, defers: bool = False):
        self.samplings, self.device = samplings, device
        bounded = (s.temperature == 0 or 0 < s.top_k < processors.SHORTLIST for s in samplings)
        self.defers = defers and all(bounded)
        greedy = [s.temperature == 0 for s in samplings]
        self.any_greedy, self.all_greedy = any(greedy), all(greedy)
        self.greedy = torch.tensor(greedy, device=device)
        self.values = {name: tensor for name in PROCESSORS if (tensor := self._column(name)) is not None}
        self.histories = {PROCESSORS[name].history for name in self.values}
        self.bias = self._biases([s.logit_bias for s in samplings])

    def _column(self, name: str) -> Tensor | None:
        """Return one value for each row; None if all are neutral, so that the step is skipped."""
        neutral = PROCESSORS[name].neutral
        values = [vars(each)[name] or neutral for each in self.samplings]  # 0 is neutral, also for temperature: greedy
        dtype = torch.float32 if isinstance(neutral, float) else torch.int64
        return None if all(v == neutral for v in values) else torch.tensor(values, dtype=dtype, device=self.device)

    def _biases(self, pairs: Sequence[tuple[tuple[int, float], ...]]) -> tuple[Tensor, Tensor] | None:
        """Return each row's biased tokens and their biases, padded to equal length; None if there are none."""
        longest = max(map(len, pairs), default=0)
        rows = [[*row, *[(0, 0.0)] * (longest - len(row))] for row in pairs]
        full = torch.tensor(rows, dtype=torch.float64, device="cpu")
        return (full[..., 0].long().to(self.device), full[..., 1].float().to(self.device)) if longest else None

    def apply_penalties(self, logits: Logits, history: "History") -> Logits:
        """Return the logits after the penalties and the bias. Greedy decoding takes their maximum."""
        for name, values in self.values.items():
            if PROCESSORS[name].stage == "penalty" and (past := vars(history)[PROCESSORS[name].history]) is not None:
                logits = PROCESSORS[name].function(logits, past, values)
        return logits if self.bias is None else processors.logit_bias(logits, *self.bias)

    def __call__(self, logits: Logits, history: "History") -> Logits:
        logits = self.apply_penalties(logits, history)
        return torch.where(self.greedy[:, None], processors.likeliest(logits), self._filter(logits))

    def asks(self, vocab: int) -> bool:
        """Return whether `choose` reads the device to check whether a shortlist was enough."""
        cut = not self.all_greedy and bool(self.values.keys() & SHORTLIST)
        return cut and vocab >= LARGE and not self.defers

    def choose(
        self, logits: Logits, history: "History", u: Float[Tensor, " rows"]
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"], Bool[Tensor, " rows"] | None]:
        """Return each row's token for its uniform number u in [0, 1), ln of the token's probability, and a mask of
        final rows. Rows that are not final must be sampled again from the whole distribution; None if all are final."""
        logits = self.apply_penalties(logits, history)
        if not self.any_greedy:
            return self._sample(logits, u)
        likeliest, certain = logits.argmax(-1), torch.zeros_like(u)
        if self.all_greedy:
            return likeliest, certain, None
        tokens, logs, final = self._sample(logits, u)
        final = None if final is None else final | self.greedy
        return torch.where(self.greedy, likeliest, tokens), torch.where(self.greedy, certain, logs), final

    def _sample(self, logits: Logits, u: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sample from the shortlist if it contains all tokens that pass a row's filters, else from all tokens."""
        k, p = self.values.get("top_k"), self.values.get("top_p")
        if (k is None and p is None) or logits.shape[1] < LARGE:
            return *sample_scored(self._filter(logits), u), None
        k = torch.zeros(1, dtype=torch.int64, device=self.device) if k is None else k
        p = torch.ones(1, device=self.device) if p is None else p
        scaled, every = self._filter(logits, ["before shortlist"]), all(sampling.top_k for sampling in self.samplings)
        few, names, is_complete = processors.shortlist(scaled, k, p, every)
        indices, logs = sample_scored(self._filter(few, ["after shortlist"]), u)
        tokens = names.gather(1, indices[:, None])[:, 0]
        if self.defers:
            return tokens, logs, is_complete
        if incomplete_rows := [row for row, all_of_it in enumerate(is_complete.tolist()) if not all_of_it]:
            other_settings = RowSettings([self.samplings[row] for row in incomplete_rows], self.device)
            tokens[incomplete_rows], logs[incomplete_rows] = sample_scored(
                other_settings._filter(logits[incomplete_rows]), u[incomplete_rows]
            )
        return tokens, logs, None

    def _filter(self, logits: Logits, stages: Sequence[Stage] = FILTER_STAGES) -> Logits:
        """Apply all filters of these stages, in the order of `PROCESSORS`."""
        for name, values in self.values.items():
            if PROCESSORS[name].stage in stages:
                logits = PROCESSORS[name].function(logits, values)
        return logits


@dataclass
class History:
    """Tokens so far, in the form that penalties need; None if no row has such a penalty."""

    seen: Bool[Tensor, "rows vocab"] | None  # in the prompt or the output
    counts: Float[Tensor, "rows vocab"] | None  # number of occurrences in the output

    @classmethod
    def of_texts(cls, settings: RowSettings, prompts: Texts, output: Texts, vocab: int) -> "History":
        """Return the history of prompts and their outputs."""

        def count(*texts: Texts) -> Float[Tensor, "rows vocab"]:
            cells = [row * vocab + token for rows in texts for row, text in enumerate(rows) for token in text]
            counts = torch.zeros(len(output) * vocab, dtype=torch.float32, device=settings.device)
            index = torch.tensor(cells, dtype=torch.long, device=settings.device)
            return counts.index_put_((index,), counts.new_ones(()), accumulate=True).view(-1, vocab)

        is_seen = count(prompts, output) > 0 if "seen" in settings.histories else None
        return cls(is_seen, count(output) if "counts" in settings.histories else None)

    def take(self, rows: Sequence[int], other: "History", positions: Sequence[int]) -> None:
        """Copy rows from another history, which must have all of them."""
        for mine, theirs in ((self.seen, other.seen), (self.counts, other.counts)):
            if mine is not None and theirs is not None:
                mine[rows] = theirs[positions]

    def add(self, tokens: Int[Tensor, " rows"]) -> None:
        """Count one new token of each row."""
        rows = torch.arange(len(tokens), device=tokens.device)
        if self.seen is not None:
            self.seen[rows, tokens] = True
        if self.counts is not None:
            self.counts[rows, tokens] += 1


def copies_later(device: torch.device) -> bool:
    """Return whether the device can copy to pinned memory asynchronously, with an event at the end."""
    return device.type == "cuda"


class Chosen:
    """Sampled tokens, and the table of `Sampler.choose`, which a GPU copies to the host asynchronously.

    tokens: on the device, as input of the next step.
    """

    def __init__(self, tokens: Int[Tensor, " rows"], table: Float[Tensor, "rows columns"]):
        self.tokens, self._table, self._copied = tokens, table, None
        if copies_later(table.device):
            self._table = torch.empty(table.shape, dtype=table.dtype, device="cpu", pin_memory=True)
            self._table.copy_(table, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(table.device))

    def tolist(self) -> list[list[float]]:
        """Return the rows of the table. Only wait for its copy, not for later steps of the device."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._table.tolist()


class Sampler:
    """Sampler of the next tokens of a fixed set of requests, one row for each request.

    before: the sampler of every request's last token; its counts are reused for the same texts. defers: whether a row
    may be reported as unfinished, for a new sampler (see `RowSettings`). asks: whether a choice needs the host, for a
    constraint or a longer list.
    """

    def __init__(
        self, requests: Sequence[Request], vocab: int, device: torch.device, before: "Sampler | None" = None,
        defers: bool = False,
    ):  # fmt: skip
        self.requests, samplings = requests, [request.sampling for request in requests]
        lengths = [len(request.prompt) + len(request.tokens) for request in requests]
        self.settings = RowSettings(samplings, device, defers)
        self.asks = self.settings.asks(vocab) or any(request.constraint is not None for request in requests)
        known_rows = {} if before is None else {request: row for row, request in enumerate(before.requests)}
        texts = [([], []) if request in known_rows else (request.prompt, request.tokens) for request in requests]
        prompts, outputs = zip(*texts, strict=True)
        self.history = History.of_texts(self.settings, prompts, outputs, vocab)
        if before is not None:
            continued_rows = [row for row, request in enumerate(requests) if request in known_rows]
            self.history.take(continued_rows, before.history, [known_rows[requests[row]] for row in continued_rows])
        seeds, positions = (torch.tensor(row, device=device) for row in ([s.seed for s in samplings], lengths))
        self.streams = UniformStreams(seeds, positions)  # start at the position of each text's next token
        self.certain = torch.zeros(len(requests), dtype=torch.float32, device=device)
        self.reports = any(s.log_probabilities for s in samplings)
        self.top = max((s.top_log_probabilities for s in samplings if s.log_probabilities), default=0)

    def choose(self, logits: Logits) -> Chosen:
        """Return one allowed token for each row. The next call samples the tokens after these.

        The host reads the table in one copy. Its columns: token (-1 if it must be sampled again), largest logit; if any
        row requests them, the token's log-probability under the model and under the distribution sampled from; then the
        likeliest tokens under the model with log-probabilities, as many as any row requests.
        """
        u = self.certain if self.settings.all_greedy else self.streams.next()
        tokens, sampled, final = self.settings.choose(self._allowed(logits), self.history, u)
        self.history.add(tokens)
        columns = [tokens if final is None else tokens.where(final, -1), logits.amax(-1)]
        if self.reports:
            columns += [processors.log_probability(logits, tokens), sampled]
            values, likeliest = logits.topk(min(self.top, logits.shape[1]))
            logs = values - logits.logsumexp(-1, keepdim=True)
            columns += [column for pair in zip(likeliest.T, logs.T, strict=True) for column in pair]
        return Chosen(tokens, torch.stack([wide(column).double() for column in columns], -1))

    def _allowed(self, logits: Logits) -> Logits:
        """Return -inf for the tokens that a request's constraint excludes."""
        if all(request.constraint is None for request in self.requests):
            return logits
        free = torch.ones(logits.shape[1], dtype=torch.bool, device="cpu")
        rows = [free if request.constraint is None else request.constraint.allowed() for request in self.requests]
        return logits.masked_fill(~torch.stack(rows).to(logits.device), -torch.inf)

"""Beam search for encoder-decoders, one step for all beams of all sources at once.

A step is a tensor program without a loop over sources or beams. Finished texts are kept in tensors too, and a source
that is decided leaves the batch. A `BeamModel` gives the logits, such as `EncoderDecoderBeamModel`.

Axes: sources, beams = open texts of a source, rows = sources · beams in that order, vocab, longest.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.data.padding import pad
from keifu.errors import UserError
from keifu.generation.text.model import Translator


@dataclass(frozen=True)
class Hypothesis:
    """A text that a beam search found.

    tokens: without the end token. score: ln P over the length penalty. ended: by an end token, not by its limit.
    """

    tokens: list[int]
    score: float
    ended: bool


Logits = Float[Tensor, "rows vocab"]


@runtime_checkable
class BeamModel(Protocol):
    """Texts that grow together. `first` gives one row of logits for each source, `next` one for each row: in
    float32, and in memory that the caller may write over."""

    def first(self) -> Logits: ...

    def next(self, tokens: Int[Tensor, " rows"]) -> Logits: ...

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Continue with these rows, whose numbers are in the host's memory; a row may be named several times."""
        ...


@runtime_checkable
class BeamState(Protocol):
    """State of an encoder-decoder: its sources and the targets so far."""

    def select(self, rows: Int[Tensor, " kept"]) -> None: ...


class EncoderDecoderBeamModel:
    """Writer of targets of sources, which are read once; `longest` is the most tokens that are written."""

    def __init__(self, model: Translator, sources: Sequence[Sequence[int]], longest: int, device: torch.device):
        self.model = model
        self.begin = torch.full((len(sources),), model.config.start_id, device=device)
        source, mask = pad(sources, model.config.pad_id)
        self.state: BeamState = model.start(source.to(device), None if mask is None else mask.to(device), longest)

    def first(self) -> Logits:
        return self.next(self.begin)

    def next(self, tokens: Int[Tensor, " rows"]) -> Logits:
        return self.model.logits(self.model.hidden(tokens[:, None], self.state)[:, -1]).float()

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.state.select(rows)


Lengths = Float[Tensor, " #sources"]
Scores = Float[Tensor, "sources beams"]
CHUNK = 64  # logits whose largest is looked at first


def paper_penalty(lengths: Lengths, alpha: float = 0.6) -> Lengths:
    """Return ((5 + |Y|) / 6)^alpha, which divides ln P(Y) (Wu et al., 2016, equation 14; the Transformer has alpha
    0.6).

    |Y| counts every token written, the end token too.
    """
    return ((5 + lengths) / 6) ** alpha


def until_decided(scores: Scores, best_open: Lengths, now: Lengths, last: Lengths) -> Bool[Tensor, " sources"]:
    """Return whether an open text could still come among the wanted ones.

    ln P only falls, so an open text can reach at most its ln P now over the largest penalty that is left: that of the
    longest text, or of this one where the penalty falls with length. transformers: early_stopping="never".
    """
    return best_open / torch.maximum(now, last) > scores[:, -1]


def until_full(scores: Scores, best_open: Lengths, now: Lengths, last: Lengths) -> Bool[Tensor, " sources"]:
    """Return whether fewer texts have ended than there are beams. transformers: early_stopping=True."""
    return scores[:, -1] == -torch.inf


@dataclass(frozen=True)
class Search:
    """How to search.

    beams: open texts of each source. wanted: texts returned for each, at most `beams`.
    penalty: what ln P of a text is divided by, as a function of lengths; its values must be positive.
    ends: the tokens that end a text. never: tokens that are never written, though they keep their probability.
    goes_on: until when a source goes on: `until_decided`, `until_full` or a rule of the same form. One beam is greedy
    choice, which goes on until its likeliest token is an end.
    """

    ends: tuple[int, ...]
    beams: int = 4
    wanted: int = 1
    penalty: Callable[[Lengths], Lengths] = partial(paper_penalty, alpha=0.6)
    never: tuple[int, ...] = ()
    goes_on: Callable[[Scores, Lengths, Lengths, Lengths], Bool[Tensor, " sources"]] = until_decided

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise UserError(f"The number of beams is {self.beams}, which must be at least 1.")
        if not 1 <= self.wanted <= self.beams:
            raise UserError(f"{self.beams} beams cannot give {self.wanted} texts: ask for 1 to {self.beams}.")

        if self.beams == 1:
            object.__setattr__(self, "goes_on", until_full)

    @property
    def kept(self) -> int:
        """How many ended texts of a source are kept: the exact rule looks at no more than are wanted."""
        return self.wanted if self.goes_on is until_decided else self.beams


@torch.inference_mode()
def beam_search(decoder: BeamModel, search: Search, limits: Sequence[int]) -> list[list[Hypothesis]]:
    """Find the best texts of each source, best first; one that reaches its source's limit of tokens ends there.

    Logits that are no numbers are a `UserError`.
    """
    logits = decoder.first()
    beams = _Beams(search, limits, logits.device)
    while True:
        rows, tokens = beams.advance(logits)
        if not len(rows):
            return beams.best()
        if len(rows) != len(logits) or not torch.equal(rows, torch.arange(len(rows), device="cpu")):
            decoder.select(rows)  # spared where every text continues its own row
        logits = decoder.next(tokens)


class _Beams:
    """The open texts of all sources that go on, and the best ended ones of all, best first: -1 stands behind the last
    token of a text, and a place with the score -inf is empty."""

    def __init__(self, search: Search, limits: Sequence[int], device: torch.device):
        self.search, self.length = search, 0
        sources = len(limits)
        self.sources = torch.arange(sources, device=device)  # those that go on, by their place in the batch
        self.limits = torch.tensor(limits, device=device)
        self.scores = torch.zeros(sources, 1, dtype=torch.float32, device=device)  # ln P, first of the empty text
        self.tokens = torch.full((sources, 1, max(limits)), -1, device=device)
        self._best = torch.full((sources, search.kept), -torch.inf, dtype=torch.float32, device=device)
        self._best_tokens = self.tokens.expand(-1, search.kept, -1).clone()
        self._ends = torch.tensor(search.ends, device=device)
        self._never = torch.tensor(search.never, dtype=torch.long, device=device)

    def advance(self, logits: Float[Tensor, "rows vocab"]) -> tuple[Int[Tensor, " kept"], Int[Tensor, " kept"]]:
        """Add a token to every text; return which row each open text continues (in the host's memory), and its
        token."""
        beams, width = self.search.beams, self.scores.shape[1]
        scores, origins, written = self._candidates(logits)
        damaged = scores[:, 0].isnan()
        self.length += 1
        texts = self.tokens.take_along_dim(origins[..., None], 1)
        texts[:, :, self.length - 1] = written
        ended = torch.isin(written, self._ends) | (self.limits <= self.length)[:, None]
        done = scores[:, :beams].masked_fill(~ended[:, :beams], -torch.inf) / self._penalty(self.length)
        self._keep(done, texts[:, :beams])
        self.scores, picked = scores.masked_fill(ended, -torch.inf).topk(beams)
        self.tokens = texts.take_along_dim(picked[..., None], 1)
        rows = origins.gather(1, picked) + width * torch.arange(len(origins), device=origins.device)[:, None]
        return self._leave(rows, written.gather(1, picked), damaged)

    def best(self) -> list[list[Hypothesis]]:
        """Return the best texts of each source, as many as are wanted, or all if there are fewer."""
        rows = zip(self._best.tolist(), self._best_tokens.tolist(), strict=True)
        texts = [[candidate for candidate in zip(*row, strict=True) if candidate[0] > -torch.inf] for row in rows]
        return [[_hypothesis(*candidate, self.search.ends) for candidate in row[: self.search.wanted]] for row in texts]

    def _keep(self, scores: Scores, texts: Int[Tensor, "sources beams longest"]) -> None:
        """Keep these ended texts as far as they are among the best; a score of -inf is no text."""
        merged, picked = torch.cat([self._best[self.sources], scores], 1).topk(self.search.kept)
        self._best[self.sources] = merged
        both = torch.cat([self._best_tokens[self.sources], texts], 1)
        self._best_tokens[self.sources] = both.take_along_dim(picked[..., None], 1)

    def _candidates(self, logits: Float[Tensor, "rows vocab"]) -> tuple[Scores, Tensor, Tensor]:
        """Return the best continuations of each source: ln P, the beam that each continues, and its token.

        There are twice as many as beams (more with several end tokens), so that enough go on when the best all end.
        """
        sources, width = self.scores.shape
        count = max(2, 1 + len(self._ends)) * self.search.beams
        values, tokens = top_candidates(logits, min(count + len(self._never), logits.shape[1]))
        values = values - log_total_(logits, values[:, :1])
        values = values.masked_fill(torch.isin(tokens, self._never), -torch.inf) + self.scores.reshape(-1, 1)
        vocab = tokens.shape[1]
        values, tokens = values.view(sources, width * vocab), tokens.view(sources, width * vocab)
        scores, indices = values.topk(min(count, width * vocab))
        lacking = count - scores.shape[1]  # a vocabulary smaller than the beams
        if lacking:
            scores = torch.nn.functional.pad(scores, (0, lacking), value=-torch.inf)
            indices = torch.nn.functional.pad(indices, (0, lacking))
        return scores, indices // vocab, tokens.gather(1, indices)

    def _leave(
        self, rows: Int[Tensor, "sources beams"], tokens: Int[Tensor, "sources beams"],
        damaged: Bool[Tensor, " sources"],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Drop the sources that need no further step; return rows and tokens of the others.

        The host reads once: rows, what goes on, and whether a number was no number.
        """
        best_open = self.scores[:, 0]
        now, last = self._penalty(self.length), self.search.penalty(self.limits.float())
        going = self.search.goes_on(self._best[self.sources], best_open, now, last) & (best_open > -torch.inf)
        *columns, stays, wrong = torch.cat([rows, torch.stack([going, damaged], 1).long()], 1).cpu().unbind(1)
        if bool(wrong.any()):
            raise UserError(f"Logits after {self.length - 1} tokens are not finite: try bfloat16, or sound weights.")
        rows = torch.stack(columns, 1)
        if not bool(stays.all()):
            left = stays.nonzero()[:, 0]
            rows, kept = rows[left], left.to(tokens.device)
            self.sources, self.limits = self.sources[kept], self.limits[kept]
            self.scores, self.tokens, tokens = self.scores[kept], self.tokens[kept], tokens[kept]
        return rows.flatten(), tokens.flatten()

    def _penalty(self, length: int) -> Float[Tensor, " one"]:
        return self.search.penalty(self.scores.new_full((1,), float(length)))


def _hypothesis(score: float, padded: list[int], ends: Collection[int]) -> Hypothesis:
    tokens = [token for token in padded if token >= 0]
    ended = tokens[-1] in ends
    return Hypothesis(tokens[:-1] if ended else tokens, score, ended)


def log_total_(logits: Float[Tensor, "rows vocab"], largest: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
    """Return ln Σ exp of each row, as `logsumexp`, in the memory of the logits, which are lost."""
    return logits.sub_(largest).exp_().sum(-1, keepdim=True).log_() + largest


def top_candidates(
    logits: Float[Tensor, "rows vocab"], count: int
) -> tuple[Float[Tensor, "rows n"], Int[Tensor, "rows n"]]:
    """Return each row's `count` largest values and their places, as `topk`, but on a CPU in one pass over long rows.

    The largest n numbers stand in the n chunks whose own largest are the largest: only these are looked into.
    """
    chunks = logits.shape[1] // CHUNK
    if logits.device.type != "cpu" or chunks <= 2 * count:
        values, indices = logits.topk(count)
        return values, indices
    body, rest = logits[:, : chunks * CHUNK].unflatten(1, (chunks, CHUNK)), logits[:, chunks * CHUNK :]
    best = body.amax(-1).topk(count).indices[..., None]
    within = torch.arange(CHUNK, device="cpu")
    indices = (best * CHUNK + within).flatten(1)
    tail = torch.arange(chunks * CHUNK, logits.shape[1], device="cpu").expand(len(logits), -1)
    values = torch.cat([body.take_along_dim(best, 1).flatten(1), rest], 1)
    largest, at = values.topk(count)
    return largest, torch.cat([indices, tail], 1).gather(1, at)

"""Beam search for encoder-decoders. Each step extends all beams of all sources at once.

A step is a tensor program without a loop over sources or beams. Finished texts are kept in tensors too. A source whose
result is decided leaves the batch. A `BeamModel` computes the logits.

Axes: sources, beams = open texts of a source, rows = sources · beams in that order, vocab, longest.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.errors import UserError


@dataclass(frozen=True)
class Hypothesis:
    """Result of a beam search.

    tokens: without the end token. score: ln P over the length penalty. ended: whether it ends with an end token, not at
    the limit.
    """

    tokens: list[int]
    score: float
    ended: bool


Logits = Float[Tensor, "rows vocab"]


@runtime_checkable
class BeamModel(Protocol):
    """Texts that grow together. `first` returns one row of logits for each source, `next` one for each row. They are
    float32, and the caller may overwrite them."""

    def first(self) -> Logits: ...

    def next(self, tokens: Int[Tensor, " rows"]) -> Logits: ...

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Continue with these rows. The indices are on the host, and may repeat."""
        ...


Lengths = Float[Tensor, " #sources"]
Scores = Float[Tensor, "sources beams"]
CHUNK = 64  # number of logits of which first only the maximum is examined


def paper_penalty(lengths: Lengths, alpha: float = 0.6) -> Lengths:
    """Return ((5 + |Y|) / 6)^alpha, the divisor of ln P(Y) (Wu et al., 2016, equation 14; alpha is 0.6 in the
    Transformer).

    |Y| counts all tokens, including the end token.
    """
    return ((5 + lengths) / 6) ** alpha


@dataclass(frozen=True)
class Search:
    """Settings of a search.

    ends: tokens that end a text. beams: open texts of each source; one beam is greedy decoding, which continues until
    the likeliest token is an end. penalty: divisor of a text's ln P as a function of lengths; must be positive. never:
    tokens that are never generated; their probability is not given to others.
    """

    ends: tuple[int, ...]
    beams: int = 4
    penalty: Callable[[Lengths], Lengths] = partial(paper_penalty, alpha=0.6)
    never: tuple[int, ...] = ()


@torch.inference_mode()
def beam_search(decoder: BeamModel, search: Search, limits: Sequence[int]) -> list[Hypothesis]:
    """Return the best text of each source. limits: maximal tokens of each source's texts.

    Raises `UserError` for logits with NaN.
    """
    logits = decoder.first()
    beams = _Beams(search, limits, logits.device)
    while True:
        rows, tokens = beams.advance(logits)
        if not len(rows):
            return beams.best()
        if len(rows) != len(logits) or not torch.equal(rows, torch.arange(len(rows), device="cpu")):
            decoder.select(rows)  # not needed if every text continues its row
        logits = decoder.next(tokens)


class _Beams:
    """Open texts of all unfinished sources, and the best ended one of each. -1 follows the last token of a text; an
    empty entry has score -inf."""

    def __init__(self, search: Search, limits: Sequence[int], device: torch.device):
        self.search, self.length = search, 0
        sources = len(limits)
        self.sources = torch.arange(sources, device=device)  # unfinished sources; their index is that in the batch
        self.limits = torch.tensor(limits, device=device)
        self.scores = torch.zeros(sources, 1, dtype=torch.float32, device=device)  # ln P, first of the empty text
        self.tokens = torch.full((sources, 1, max(limits)), -1, device=device)
        self._best = torch.full((sources,), -torch.inf, dtype=torch.float32, device=device)
        self._best_tokens = self.tokens[:, 0].clone()
        self._ends = torch.tensor(search.ends, device=device)
        self._never = torch.tensor(search.never, dtype=torch.long, device=device)

    def advance(self, logits: Logits) -> tuple[Int[Tensor, " kept"], Int[Tensor, " kept"]]:
        """Extend every text by a token. Return for each open text the row that it continues (on the host), and its
        token."""
        beams, width = self.search.beams, self.scores.shape[1]
        scores, origins, candidates = self._candidates(logits)
        damaged = scores[:, 0].isnan()
        self.length += 1
        texts = self.tokens.take_along_dim(origins[..., None], 1)
        texts[:, :, self.length - 1] = candidates
        ended = torch.isin(candidates, self._ends) | (self.limits <= self.length)[:, None]
        done = scores[:, :beams].masked_fill(~ended[:, :beams], -torch.inf) / self._penalty(self.length)
        self._keep(done, texts[:, :beams])
        self.scores, picked = scores.masked_fill(ended, -torch.inf).topk(beams)
        self.tokens = texts.take_along_dim(picked[..., None], 1)
        rows = origins.gather(1, picked) + width * torch.arange(len(origins), device=origins.device)[:, None]
        return self._leave(rows, candidates.gather(1, picked), damaged)

    def best(self) -> list[Hypothesis]:
        """Return the best text of each source."""
        pairs = zip(self._best.tolist(), self._best_tokens.tolist(), strict=True)
        return [_hypothesis(score, padded, self.search.ends) for score, padded in pairs]

    def _keep(self, scores: Scores, texts: Int[Tensor, "sources beams longest"]) -> None:
        """Keep an ended text if it is the best one. A score of -inf means no text."""
        score, beam = scores.max(1)
        best, tokens = self._best[self.sources], self._best_tokens[self.sources]
        text = texts.take_along_dim(beam[:, None, None], 1)[:, 0]
        self._best[self.sources] = torch.maximum(score, best)
        self._best_tokens[self.sources] = torch.where((score > best)[:, None], text, tokens)

    def _candidates(self, logits: Logits) -> tuple[Scores, Tensor, Tensor]:
        """Return the best continuations of each source: ln P, index of the beam, token.

        There are twice as many as beams (more with several end tokens), so that enough texts continue if the best ones
        all end.
        """
        sources, width = self.scores.shape
        count = max(2, 1 + len(self._ends)) * self.search.beams
        values, tokens = top_candidates(logits, min(count + len(self._never), logits.shape[1]))
        values = values - log_total_(logits, values[:, :1])
        values = values.masked_fill(torch.isin(tokens, self._never), -torch.inf) + self.scores.reshape(-1, 1)
        vocab = tokens.shape[1]
        values, tokens = values.view(sources, width * vocab), tokens.view(sources, width * vocab)
        scores, indices = values.topk(min(count, width * vocab))
        lacking = count - scores.shape[1]  # the vocabulary may be smaller than needed
        if lacking:
            scores = torch.nn.functional.pad(scores, (0, lacking), value=-torch.inf)
            indices = torch.nn.functional.pad(indices, (0, lacking))
        return scores, indices // vocab, tokens.gather(1, indices)

    def _leave(
        self, rows: Int[Tensor, "sources beams"], tokens: Int[Tensor, "sources beams"],
        damaged: Bool[Tensor, " sources"],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Remove finished sources. Return rows and tokens of the others.

        The device is read once: rows, which sources continue, and whether there was NaN.
        """
        going = self._undecided() & (self.scores[:, 0] > -torch.inf)
        *columns, stays, wrong = torch.cat([rows, torch.stack([going, damaged], 1).long()], 1).cpu().unbind(1)
        if bool(wrong.any()):
            raise UserError(f"Logits after {self.length - 1} tokens are not finite: try bfloat16, or sound weights.")
        rows = torch.stack(columns, 1)
        if not bool(stays.all()):
            staying = stays.nonzero()[:, 0]
            rows, staying_on_device = rows[staying], staying.to(tokens.device)
            self.sources, self.limits = self.sources[staying_on_device], self.limits[staying_on_device]
            self.scores, self.tokens, tokens = (
                self.scores[staying_on_device],
                self.tokens[staying_on_device],
                tokens[staying_on_device],
            )
        return rows.flatten(), tokens.flatten()

    def _undecided(self) -> Bool[Tensor, " sources"]:
        """Return whether an open text of each source can still become its best one.

        ln P only decreases. So an open text can at most reach its present ln P divided by the largest remaining
        penalty: that of the maximal length, or of the present length if the penalty decreases with length.
        transformers: early_stopping="never".
        """
        best = self._best[self.sources]
        if self.search.beams == 1:
            return best == -torch.inf
        now, last = self._penalty(self.length), self.search.penalty(self.limits.float())
        return self.scores[:, 0] / torch.maximum(now, last) > best

    def _penalty(self, length: int) -> Float[Tensor, " one"]:
        return self.search.penalty(self.scores.new_full((1,), float(length)))


def _hypothesis(score: float, padded: list[int], ends: Collection[int]) -> Hypothesis:
    tokens = [token for token in padded if token >= 0]
    ended = tokens[-1] in ends
    return Hypothesis(tokens[:-1] if ended else tokens, score, ended)


def log_total_(logits: Logits, largest: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
    """Return ln Σ exp of each row, like `logsumexp`. The logits are overwritten."""
    return logits.sub_(largest).exp_().sum(-1, keepdim=True).log_() + largest


def top_candidates(logits: Logits, count: int) -> tuple[Float[Tensor, "rows n"], Int[Tensor, "rows n"]]:
    """Return each row's `count` largest values and their indices, like `topk`, but on a CPU in one pass over long rows.

    The n largest numbers are in the n chunks with the largest maxima, so only these chunks are examined.
    """
    chunks = logits.shape[1] // CHUNK
    if logits.device.type != "cpu" or chunks <= 2 * count:
        values, indices = logits.topk(count)
        return values, indices
    body, remaining_logits = logits[:, : chunks * CHUNK].unflatten(1, (chunks, CHUNK)), logits[:, chunks * CHUNK :]
    best = body.amax(-1).topk(count).indices[..., None]
    within = torch.arange(CHUNK, device="cpu")
    indices = (best * CHUNK + within).flatten(1)
    tail = torch.arange(chunks * CHUNK, logits.shape[1], device="cpu").expand(len(logits), -1)
    values = torch.cat([body.take_along_dim(best, 1).flatten(1), remaining_logits], 1)
    largest, at = values.topk(count)
    return largest, torch.cat([indices, tail], 1).gather(1, at)

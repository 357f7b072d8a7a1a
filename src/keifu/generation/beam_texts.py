"""The best ended texts of each source of a beam search, in tensors; knows neither how they are found nor what they say.

Axes: sources, kept = texts kept of each, new = texts that are added, longest.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Hypothesis:
    """A text that a beam search found.

    tokens: without the end token. score: ln P over the length penalty. ended: by an end token, not by its limit.
    """

    tokens: list[int]
    score: float
    ended: bool


class BestTexts:
    """Room for `kept` texts of each source, best first; an empty place has the score -inf."""

    def __init__(self, sources: int, kept: int, longest: int, device: torch.device):
        self.scores = torch.full((sources, kept), -torch.inf, device=device)
        self._tokens = torch.zeros(sources, kept, longest, dtype=torch.long, device=device)
        self._lengths = torch.zeros(sources, kept, dtype=torch.long, device=device)

    def add(
        self,
        sources: Int[Tensor, " some"],
        scores: Float[Tensor, "some new"],
        tokens: Int[Tensor, "some new longest"],
        length: int,
    ) -> None:
        """Offers texts of one length to these sources; each keeps its best. A score of -inf is no text."""
        merged, picked = torch.cat([self.scores[sources], scores], 1).topk(self.scores.shape[1])
        texts = torch.cat([self._tokens[sources], tokens], 1)
        lengths = torch.cat([self._lengths[sources], torch.full_like(scores, length, dtype=torch.long)], 1)
        self.scores[sources] = merged
        self._tokens[sources] = texts.take_along_dim(picked[..., None], 1)
        self._lengths[sources] = lengths.gather(1, picked)

    def texts(self, ends: Collection[int], wanted: int) -> list[list[Hypothesis]]:
        """The best `wanted` texts of each source, or all if there are fewer."""
        rows = zip(self.scores.tolist(), self._tokens.tolist(), self._lengths.tolist(), strict=True)
        found = [[_text(*text, ends) for text in zip(*row, strict=True) if text[0] > -torch.inf] for row in rows]
        return [each[:wanted] for each in found]


def _text(score: float, tokens: list[int], length: int, ends: Collection[int]) -> Hypothesis:
    ended = tokens[length - 1] in ends
    return Hypothesis(tokens[: length - 1 if ended else length], score, ended)

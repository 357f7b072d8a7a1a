"""A mixture of denoisers: rows of tokens of which a part is hidden and asked for, as UL2 has it; knows no text, no file
and no model.

Tay et al. (2022), "UL2: Unifying Language Learning Paradigms", table 1. A row begins with a token that names its mode.
Spans are hidden as in T5 (Raffel et al., 2020): a sentinel stands for each in the inputs, and the targets are each
sentinel followed by what it hides. Axes: row, place = tokens of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from keifu.errors import UserError, unknown

REGULAR, EXTREME, SEQUENTIAL = "[NLU]", "[NLG]", "[S2S]"  # the paper's [R], [X] and [S], as its code spells them
MODES = REGULAR, EXTREME, SEQUENTIAL
SENTINELS = 100  # T5's number


@dataclass(frozen=True)
class Denoiser:
    """One way to hide tokens: `rate` is the mean share of a text that is hidden, `share` that of the rows it is given.

    span: the mean length of the hidden spans. None hides the end of the text alone (a prefix language model): where it
    begins is drawn evenly, so that between nothing and 2 · rate of the text is hidden.
    """

    mode: str
    rate: float | int
    span: float | int | None
    share: float | int = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode of a denoiser", self.mode, MODES)
        highest = 1.0 if self.span else 0.5
        if not (0 < self.rate < 1 and self.rate <= highest) or (self.span is not None and self.span < 1):
            raise UserError(
                f"A denoiser hides a share between 0 and 1, at most 0.5 where it hides the end of a text, in spans of "
                f"at least one token; this one has rate {self.rate} and span {self.span}."
            )

    def counts(self, length: int) -> tuple[int, int]:
        """How many of `length` tokens are hidden, and in how many spans: always the same, as in T5."""
        hidden = min(max(round(length * self.rate), 1), length - 1)
        spans = max(1, round(hidden / self.span)) if self.span else 0
        return hidden, min(spans, hidden, length - hidden)


def ul2(shares: Sequence[float | int] = (0.25, 0.25, 0.5), prefix: float | int = 0.5) -> tuple[Denoiser, ...]:
    """The seven denoisers of UL2's table 1, so that R, X and S have these shares of the rows, evenly within each.

    The paper prints no shares for them: the default is keifu's, for a model that is to write. `prefix` is the mean
    share of a text that S hides: the table says 0.25, the code in the appendix 0.5.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(
            f"The shares of R, X and S are {', '.join(f'{share:g}' for share in shares)}, whose sum is "
            f"{sum(shares):g}: give three numbers, none below 0, whose sum is 1."
        )
    regular = [(REGULAR, 0.15, span, shares[0] / 2) for span in (3, 8)]
    extreme = [(EXTREME, rate, span, shares[1] / 4) for rate, span in ((0.5, 3), (0.5, 8), (0.15, 64), (0.5, 64))]
    wanted = [*regular, *extreme, (SEQUENTIAL, prefix, None, shares[2])]
    return tuple(Denoiser(mode, rate, span, share) for mode, rate, span, share in wanted if share > 0)


@runtime_checkable
class Vocabulary(Protocol):
    """What is needed of a tokenizer."""

    eos_id: int | None
    pad_id: int | None

    def token_id(self, token: str) -> int:
        """The id of a token; an unknown one is a `UserError`."""
        ...


def special_tokens(sentinels: int = SENTINELS) -> list[str]:
    """The tokens that a tokenizer must have: the modes, and a sentinel for each span that a row may have."""
    return [*MODES, *(f"<extra_id_{n}>" for n in range(sentinels))]


@dataclass(frozen=True)
class Markers:
    """The ids of the tokens that are put around and into texts; `sentinels` in the order of the spans."""

    modes: Mapping[str, int]
    sentinels: np.ndarray
    end: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Vocabulary, sentinels: int = SENTINELS) -> "Markers":
        """The tokenizer's own; one that lacks an end token, a mode or the sentinels is a `UserError`."""
        if tokenizer.eos_id is None:
            raise UserError("This tokenizer has no end-of-text token, so nothing can tell where hidden text ends.")
        ids = [tokenizer.token_id(token) for token in special_tokens(sentinels)]
        pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        return cls(dict(zip(MODES, ids, strict=False)), np.array(ids[len(MODES) :]), tokenizer.eos_id, pad)


def random_spans(rows: int, length: int, hidden: int, spans: int, random: np.random.Generator) -> np.ndarray:
    """Which places are hidden [row, length]: in each row `hidden` of them in `spans` runs, of which no two touch.

    A row begins with what is kept and ends with what is hidden, and all such rows are equally likely (T5's
    `random_spans_noise_mask`).
    """
    runs = np.empty((rows, 2 * spans), np.int64)
    runs[:, 0::2] = _segments(rows, length - hidden, spans, random)
    runs[:, 1::2] = _segments(rows, hidden, spans, random)
    kinds = np.tile([False, True], rows * spans)
    return np.repeat(kinds, runs.ravel()).reshape(rows, length)


def _segments(rows: int, items: int, segments: int, random: np.random.Generator) -> np.ndarray:
    """Lengths [row, segment] of at least one, of sum `items`, all divisions equally likely."""
    cuts = np.argsort(random.random((rows, items - 1)), axis=1)[:, : segments - 1] + 1
    bounds = np.empty((rows, segments + 1), np.int64)
    bounds[:, 0], bounds[:, -1] = 0, items
    bounds[:, 1:-1] = np.sort(cuts, axis=1)
    return np.diff(bounds, axis=1)


def corrupt(tokens: np.ndarray, hidden: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of rows with equally many hidden tokens and spans, each span after something kept.

    Inputs: the tokens with the sentinel of each span in its place. Targets: each sentinel and what it stands for.
    """
    before = np.zeros_like(hidden)
    before[:, 1:] = hidden[:, :-1]
    first = hidden & ~before  # of a span
    last = np.roll(first, -1, axis=1)  # of what is kept before a span
    names = sentinels[np.cumsum(first, axis=1) - 1]
    following = sentinels[np.minimum(np.cumsum(first, axis=1), len(sentinels) - 1)]
    inputs = np.where(first, names, tokens)[~hidden | first]
    targets = np.where(last, following, tokens)[hidden | last]
    return inputs.reshape(len(tokens), -1), targets.reshape(len(tokens), -1)

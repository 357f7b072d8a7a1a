"""Span corruption, as in T5 and UL2's mixture of denoisers, and causal rows, for decoders.

Tay et al. (2022), "UL2: Unifying Language Learning Paradigms", table 1. A row begins with a token for its mode. Spans
are corrupted as in T5 (Raffel et al., 2020): in the inputs a sentinel replaces each span; the targets are each sentinel
followed by its span.

Axes: row, position = tokens of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from jaxtyping import Int

from keifu.data.interleaving import source_of_row
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError, require_known

REGULAR, EXTREME, SEQUENTIAL = "[NLU]", "[NLG]", "[S2S]"  # the paper's [R], [X] and [S], spelled as in its code
MODES = REGULAR, EXTREME, SEQUENTIAL
SENTINELS = 100  # as in T5
LEAST = 16  # minimal tokens of a row


@dataclass(frozen=True)
class SpanCorruption:
    """Denoiser that hides tokens.

    rate: mean share of hidden tokens. share: share of rows for this denoiser. span: mean length of hidden spans; None:
    only the end of the text is hidden (prefix language model). Then the start is uniform, so that between 0 and 2 ·
    rate of the text is hidden.
    """

    mode: str
    rate: float | int
    span: float | int | None
    share: float | int = 1.0

    def __post_init__(self) -> None:
        require_known("mode of a denoiser", self.mode, MODES)
        highest = 1.0 if self.span else 0.5
        if not (0 < self.rate < 1 and self.rate <= highest) or (self.span is not None and self.span < 1):
            raise UserError(
                f"A denoiser hides a share between 0 and 1, at most 0.5 where it hides the end of a text, in spans of "
                f"at least one token; this one has rate {self.rate} and span {self.span}."
            )

    def counts(self, length: int) -> tuple[int, int]:
        """Return the number of hidden tokens among `length` tokens, and the number of spans. Both are deterministic, as
        in T5."""
        hidden = min(max(round(length * self.rate), 1), length - 1)
        spans = max(1, round(hidden / self.span)) if self.span else 0
        return hidden, min(spans, hidden, length - hidden)


def ul2(shares: Sequence[float | int] = (0.25, 0.25, 0.5), prefix: float | int = 0.5) -> tuple[SpanCorruption, ...]:
    """Return the seven denoisers of UL2's table 1. R, X and S have these shares of rows, evenly divided within each.

    The default is U-PaLM's: 25% R, 25% X and 50% S (Tay et al., 2022b, "Transcending Scaling Laws with 0.1% Extra
    Compute", section 2.3). prefix: mean share of a text that S hides. UL2's table says 0.25; the code in its appendix
    and a uniform start (U-PaLM) give 0.5.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        share_list, rule = (
            ", ".join(f"{share:g}" for share in shares),
            "give three numbers, none below 0, whose sum is 1",
        )
        raise UserError(f"The shares of R, X and S are {share_list}, whose sum is {sum(shares):g}: {rule}.")
    regular = [(REGULAR, 0.15, span, shares[0] / 2) for span in (3, 8)]
    extreme = [(EXTREME, rate, span, shares[1] / 4) for rate, span in ((0.5, 3), (0.5, 8), (0.15, 64), (0.5, 64))]
    denoisers = [*regular, *extreme, (SEQUENTIAL, prefix, None, shares[2])]
    return tuple(SpanCorruption(mode, rate, span, share) for mode, rate, span, share in denoisers if share > 0)


def special_tokens(sentinels: int = SENTINELS) -> list[str]:
    """List the tokens that a tokenizer needs: the modes, and a sentinel for each span of a row."""
    return [*MODES, *(f"<extra_id_{n}>" for n in range(sentinels))]


@dataclass(frozen=True)
class Markers:
    """Ids of the tokens that are put around and into texts. `sentinels` are in the order of the spans."""

    modes: Mapping[str, int]
    sentinels: np.ndarray
    end: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, sentinels: int = SENTINELS) -> "Markers":
        """Return the tokenizer's special tokens. Raises `UserError` if an end token, a mode or a sentinel is
        missing."""
        if tokenizer.eos_id is None:
            raise UserError("This tokenizer has no end-of-text token, so nothing can mark where a masked span ends.")
        ids = [tokenizer.token_id(token) for token in special_tokens(sentinels)]
        pad = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
        return cls(dict(zip(MODES, ids, strict=False)), np.array(ids[len(MODES) :]), tokenizer.eos_id, pad)


def random_spans(rows: int, length: int, hidden: int, spans: int, random: np.random.Generator) -> np.ndarray:
    """Draw hidden positions, a mask [row, length]: in each row `hidden` positions in `spans` runs that do not touch.

    A row begins with visible and ends with hidden tokens. All such rows are equally likely (T5's
    `random_spans_noise_mask`).
    """
    runs = np.empty((rows, 2 * spans), np.int64)
    runs[:, 0::2] = _segments(rows, length - hidden, spans, random)
    runs[:, 1::2] = _segments(rows, hidden, spans, random)
    kinds = np.tile([False, True], rows * spans)
    return np.repeat(kinds, runs.ravel()).reshape(rows, length)


def _segments(rows: int, items: int, segments: int, random: np.random.Generator) -> np.ndarray:
    """Draw segment lengths [row, segment] of at least 1 with sum `items`. All divisions are equally likely."""
    cuts = np.argsort(random.random((rows, items - 1)), axis=1)[:, : segments - 1] + 1
    bounds = np.empty((rows, segments + 1), np.int64)
    bounds[:, 0], bounds[:, -1] = 0, items
    bounds[:, 1:-1] = np.sort(cuts, axis=1)
    return np.diff(bounds, axis=1)


def corrupt(tokens: np.ndarray, hidden: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets of rows with the same numbers of hidden tokens and spans. A visible token precedes each
    span.

    Inputs: the tokens, with a sentinel instead of each span. Targets: each sentinel, then its span.
    """
    before = np.zeros_like(hidden)
    before[:, 1:] = hidden[:, :-1]
    first = hidden & ~before  # first token of each span
    last = np.roll(first, -1, axis=1)  # last visible token before each span
    names = sentinels[np.cumsum(first, axis=1) - 1]
    following = sentinels[np.minimum(np.cumsum(first, axis=1), len(sentinels) - 1)]
    inputs = np.where(first, names, tokens)[~hidden | first]
    targets = np.where(last, following, tokens)[hidden | last]
    return inputs.reshape(len(tokens), -1), targets.reshape(len(tokens), -1)


Rows = dict[str, np.ndarray]
Windows = Int[np.ndarray, "row position"]


class CausalBatches:
    """Batches for predicting every token from those before it: {"tokens": [row, context_length + 1]}.

    mode: id of a token to put before each window, for a model that was trained with one. The first token after it is
    then excluded from the loss ("mask"); without a mode it cannot be predicted either.
    """

    def __init__(self, context_length: int, mode: int | None = None):
        self.mode, self.width = mode, context_length + (mode is None)
        self.name = f"left to right, {self.width} tokens after {mode}"

    def rows(self, windows: Windows, numbers: np.ndarray, random: np.random.Generator) -> Rows:
        if self.mode is None:
            return {"tokens": windows.astype(np.int64)}
        tokens = np.concatenate([np.full((len(windows), 1), self.mode), windows], axis=1).astype(np.int64)
        return {"tokens": tokens, "mask": np.broadcast_to(np.arange(tokens.shape[1]) > 1, tokens.shape).copy()}


class SpanCorruptionBatches:
    """Mixture of denoisers over windows: mode, inputs, targets and an end in one row of `context_length` + 1 tokens.

    A batch has "tokens" [row, position] and "mask", True on targets: only they are predicted (see
    `keifu.training.objectives.language_modeling`). If the end of a text is hidden, no end token follows, because the
    text continued.

    Each denoiser gets exactly its share of a source's rows (see `keifu.data.interleaving`). If its sentinels leave too
    few positions for a whole window, it uses a random part of the window.
    """

    def __init__(self, denoisers: Sequence[SpanCorruption], markers: Markers, context_length: int):
        self.denoisers, self.markers, self.row_length = tuple(denoisers), markers, context_length + 1
        self.shares = np.array([denoiser.share for denoiser in denoisers])
        if (row_length := self.row_length) < LEAST:
            raise UserError(f"The context is {row_length} tokens, and a mixture of denoisers needs {LEAST} or more.")
        self._lengths = [self._length(denoiser) for denoiser in denoisers]
        for denoiser, length in zip(self.denoisers, self._lengths, strict=True):
            if (spans := denoiser.counts(length)[1]) > (n_sentinels := len(markers.sentinels)):
                ways = f"the tokenizer has {n_sentinels} sentinels: shorten the context, or learn more sentinels"
                raise UserError(f"A row of {self.row_length} tokens has {spans} hidden spans, and {ways}.")
        self.width = max(self._lengths)
        self.name = f"DecoderRows of {self.row_length} places: {self.denoisers}"  # spelled as in existing runs

    def rows(self, windows: Windows, numbers: np.ndarray, random: np.random.Generator) -> Rows:
        """Return one row for each window. Windows of the same denoiser are computed together."""
        source_numbers = source_of_row(self.shares, numbers)
        indices = [np.flatnonzero(source_numbers == n) for n in range(len(self.denoisers))]
        corrupted_rows = [self._corrupted(n, windows[rows], random) for n, rows in enumerate(indices) if len(rows)]
        order = np.argsort(np.concatenate(indices))
        return {name: np.concatenate([part[name] for part in corrupted_rows])[order] for name in corrupted_rows[0]}

    def join(self, mode: int, inputs: np.ndarray, targets: np.ndarray, ends: bool = True) -> Rows:
        """Return rows with a mode, inputs, targets and optionally an end. All rows have the same lengths."""
        prefix = 1 + inputs.shape[1]
        tokens = np.full((len(inputs), self.row_length), self.markers.pad, np.int64)
        tokens[:, 0], tokens[:, 1:prefix] = mode, inputs
        stop = prefix + targets.shape[1]
        tokens[:, prefix:stop] = targets
        tokens[:, stop : stop + ends] = self.markers.end
        mask = np.zeros(tokens.shape, bool)
        mask[:, prefix : stop + ends] = True
        return {"tokens": tokens, "mask": mask}

    def _length(self, denoiser: SpanCorruption) -> int:
        """Return the largest number of text tokens that fit into a row with a mode and, for spans, two sentinels each
        and an end."""
        if denoiser.span is None:
            return self.row_length - 1
        return next(n - 1 for n in count(3) if n + 2 * denoiser.counts(n)[1] + 2 > self.row_length)

    def _corrupted(self, number: int, windows: Windows, random: np.random.Generator) -> Rows:
        denoiser, length = self.denoisers[number], self._lengths[number]
        mode = self.markers.modes[denoiser.mode]
        offsets = random.integers(self.width - length + 1, size=(len(windows), 1))
        tokens = np.take_along_axis(windows, offsets + np.arange(length), axis=1).astype(np.int64)
        if denoiser.span is None:
            least = min(max(1, round((1 - 2 * denoiser.rate) * (length - 1))), length - 1)
            cuts = random.integers(least, length, size=(len(tokens), 1))
            rows = self.join(mode, tokens[:, :0], tokens, ends=False)
            return rows | {"mask": rows["mask"] & (np.arange(self.row_length) > cuts)}
        spans = random_spans(len(tokens), length, *denoiser.counts(length), random)
        return self.join(mode, *corrupt(tokens, spans, self.markers.sentinels))


class InfillingExamples:
    """Rows of a mixture of denoisers, in which only the hidden tokens are predicted, without sentinels and the end.
    Their loss can be compared with a loss from left to right."""

    def __init__(self, denoising: SpanCorruptionBatches):
        self.denoising, self.width, self.name = denoising, denoising.width, f"hidden tokens: {denoising.name}"

    def rows(self, windows: Windows, numbers: np.ndarray, random: np.random.Generator) -> Rows:
        rows, markers = self.denoising.rows(windows, numbers, random), self.denoising.markers
        return rows | {"mask": rows["mask"] & ~np.isin(rows["tokens"], [*markers.sentinels, markers.end])}


# Converts windows of `width` tokens to training rows by `rows(windows, numbers, random)`. `numbers` are the indices of
# the windows within their source. `name` contains all settings that affect the rows.
CorruptionTask = CausalBatches | SpanCorruptionBatches | InfillingExamples

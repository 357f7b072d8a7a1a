"""Windows of text as rows to learn from: left to right, or a mixture of denoisers for a decoder or an encoder-decoder.

It knows neither of the two, nor any text or file.

Axes: row, place = tokens of a row.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from keifu.data.denoising import Denoiser, Markers, corrupt, random_spans
from keifu.data.shares import which
from keifu.errors import UserError

Rows = dict[str, np.ndarray]
Windows = Int[np.ndarray, "row place"]


@runtime_checkable
class Task(Protocol):
    """What is made of windows of `width` tokens. `name` says all that the rows depend on beside text and randomness."""

    width: int
    name: str

    def rows(self, windows: Windows, numbers: np.ndarray, random: np.random.Generator) -> Rows:
        """The windows as rows; `numbers` counts each among those of its source."""
        ...


class LeftToRight:
    """Every token from those before it: {"tokens": [row, context_length + 1]}.

    `mode`: the id of a token that is put before each window, where the model was trained with one; the first token
    behind it is then not predicted ("mask"), as without a mode it cannot be.
    """

    def __init__(self, context_length: int, mode: int | None = None):
        self.mode, self.width = mode, context_length + (mode is None)
        self.name = f"left to right, {self.width} tokens after {mode}"

    def rows(self, windows: Windows, numbers: np.ndarray, random: np.random.Generator) -> Rows:
        if self.mode is None:
            return {"tokens": windows.astype(np.int64)}
        tokens = np.concatenate([np.full((len(windows), 1), self.mode), windows], axis=1).astype(np.int64)
        return {"tokens": tokens, "mask": np.broadcast_to(np.arange(tokens.shape[1]) > 1, tokens.shape).copy()}


class Denoising:
    """A mixture of denoisers over windows, in the form of a decoder's or an encoder-decoder's rows.

    Of a source's rows each denoiser is given its share, exactly (see `keifu.data.shares`). A denoiser whose sentinels
    leave room for fewer tokens than a window has takes a run of it that begins anywhere.
    """

    def __init__(self, denoisers: Sequence[Denoiser], form: "Decoder | EncoderDecoder"):
        self.denoisers, self.form = tuple(denoisers), form
        self.shares = np.array([denoiser.share for denoiser in denoisers])
        if form.places < LEAST:
            raise UserError(f"The context is {form.places} tokens, and a mixture of denoisers needs {LEAST} or more.")
        self._lengths = [form.length(denoiser) for denoiser in denoisers]
        for denoiser, length in zip(self.denoisers, self._lengths, strict=True):
            spans = denoiser.counts(length)[1]
            if spans > len(form.markers.sentinels):
                raise UserError(
                    f"A row of {form.places} tokens has {spans} hidden spans, and the tokenizer has "
                    f"{len(form.markers.sentinels)} sentinels: shorten the context, or learn more sentinels."
                )
        self.width = max(self._lengths)
        self.name = f"{type(form).__name__} of {form.places} places: {self.denoisers}"

    def rows(self, windows: Windows, numbers: np.ndarray, random: np.random.Generator) -> Rows:
        """See `Task`; rows of one denoiser are computed together."""
        chosen = which(self.shares, numbers)
        parts = [(n, np.flatnonzero(chosen == n)) for n in range(len(self.denoisers))]
        made = [(rows, self._corrupted(n, windows[rows], random)) for n, rows in parts if len(rows)]
        joined = {}
        for name, first in made[0][1].items():
            joined[name] = np.empty((len(windows), *first.shape[1:]), first.dtype)
            for rows, part in made:
                joined[name][rows] = part[name]
        return joined

    def _corrupted(self, number: int, windows: Windows, random: np.random.Generator) -> Rows:
        denoiser, length = self.denoisers[number], self._lengths[number]
        mode = self.form.markers.modes[denoiser.mode]
        offsets = random.integers(self.width - length + 1, size=(len(windows), 1))
        tokens = np.take_along_axis(windows, offsets + np.arange(length), axis=1).astype(np.int64)
        hidden, spans = denoiser.counts(length)
        if denoiser.span is None:
            least = min(max(1, round((1 - 2 * denoiser.rate) * (length - 1))), length - 1)
            return self.form.cut(mode, tokens, random.integers(least, length, size=len(tokens)))
        places = random_spans(len(tokens), length, hidden, spans, random)
        return self.form.rows(mode, *corrupt(tokens, places, self.form.markers.sentinels), ends=True)


class HiddenTokens:
    """The same rows as of a mixture of denoisers for a decoder, of which the hidden tokens alone are predicted, without
    the sentinels before them and the end behind them: what can be compared with a loss from left to right."""

    def __init__(self, denoising: Denoising):
        self.denoising, self.width, self.name = denoising, denoising.width, f"hidden tokens: {denoising.name}"

    def rows(self, windows: Windows, numbers: np.ndarray, random: np.random.Generator) -> Rows:
        rows, markers = self.denoising.rows(windows, numbers, random), self.denoising.form.markers
        return rows | {"mask": rows["mask"] & ~np.isin(rows["tokens"], [*markers.sentinels, markers.end])}


LEAST = 16  # places of a row


class Decoder:
    """Rows for a decoder: mode, inputs, targets and an end in one sequence of at most `context_length` + 1 tokens.

    A batch has "tokens" [row, place] and "mask", True on targets, which alone are predicted (see
    `keifu.training.denoising`). Where a text's end is hidden no end follows: the text went on.
    """

    def __init__(self, markers: Markers, context_length: int):
        self.markers, self.places = markers, context_length + 1

    def length(self, denoiser: Denoiser) -> int:
        """The most tokens of text that a row has room for."""
        if denoiser.span is None:
            return self.places - 1
        return _longest(self.places, lambda n: n + 2 * denoiser.counts(n)[1] + 2)

    def rows(self, mode: int, inputs: np.ndarray, targets: np.ndarray, ends: bool) -> Rows:
        """Rows of equally many inputs and equally many targets."""
        count, prefix = len(inputs), 1 + inputs.shape[1]
        tokens = np.full((count, self.places), self.markers.pad, np.int64)
        tokens[:, 0], tokens[:, 1:prefix] = mode, inputs
        stop = prefix + targets.shape[1]
        tokens[:, prefix:stop] = targets
        tokens[:, stop : stop + ends] = self.markers.end
        mask = np.zeros(tokens.shape, bool)
        mask[:, prefix : stop + ends] = True
        return {"tokens": tokens, "mask": mask}

    def cut(self, mode: int, tokens: np.ndarray, cuts: np.ndarray) -> Rows:
        """Rows whose hidden end begins at `cuts`."""
        rows = self.rows(mode, tokens[:, :0], tokens, ends=False)
        return rows | {"mask": rows["mask"] & (np.arange(self.places) > cuts[:, None])}


class FromTheLeft(Decoder):
    """The texts of a decoder's rows as they were, for a model that reads from left to right: "mask" is True on the
    hidden tokens of `HiddenTokens`, of which it knows only what stands before them."""

    def rows(self, mode: int, inputs: np.ndarray, targets: np.ndarray, ends: bool) -> Rows:
        """The text again: what is kept of each run, and then what was hidden after it."""
        marks = [np.isin(side, self.markers.sentinels) for side in (inputs, targets)]
        runs = [2 * np.cumsum(marks[0], axis=1), 2 * np.cumsum(marks[1], axis=1) - 1]
        kept, hidden = (side[~mark].reshape(len(side), -1) for side, mark in zip((inputs, targets), marks, strict=True))
        keys = [run[~mark].reshape(len(run), -1) for run, mark in zip(runs, marks, strict=True)]
        order = np.argsort(np.concatenate(keys, axis=1), axis=1, kind="stable")
        text = np.take_along_axis(np.concatenate([kept, hidden], axis=1), order, axis=1)
        mask = (order >= kept.shape[1]) & (text != self.markers.end)
        return {"tokens": _wider(text, self.places), "mask": _wider(mask, self.places).astype(bool)}


class EncoderDecoder:
    """Rows for an encoder-decoder that takes `context_length` tokens on each side.

    A batch is what `keifu.training.objectives.translation` takes: "source", the mode and the inputs; "target", the
    token `start`, the targets and an end; both padded, with masks that are True on real tokens.
    """

    def __init__(self, markers: Markers, context_length: int, start: int):
        self.markers, self.places, self.start = markers, context_length, start

    def length(self, denoiser: Denoiser) -> int:
        """The most tokens of text that both sides have room for, but less than a side's."""
        if denoiser.span is None:
            return self.places - 1

        def needed(length: int) -> int:
            hidden, spans = denoiser.counts(length)
            return 1 + max(spans + max(length - hidden, hidden), length)

        return _longest(self.places, needed)

    def rows(self, mode: int, inputs: np.ndarray, targets: np.ndarray, ends: bool) -> Rows:
        """Rows of equally many inputs and equally many targets."""
        source = np.concatenate([np.full((len(inputs), 1), mode), inputs], axis=1)
        target = np.concatenate([np.full((len(targets), 1), self.start), targets], axis=1)
        sizes = [np.full(len(inputs), side.shape[1]) for side in (source, target)]
        return self._padded(source, target, sizes[0], sizes[1], ends)

    def cut(self, mode: int, tokens: np.ndarray, cuts: np.ndarray) -> Rows:
        """Rows whose hidden end begins at `cuts`."""
        length = tokens.shape[1]
        moved = (cuts[:, None] + np.arange(length)) % length  # the hidden end comes first
        begun = np.concatenate([np.full((len(tokens), 1), self.start), np.take_along_axis(tokens, moved, 1)], axis=1)
        read = np.concatenate([np.full((len(tokens), 1), mode), tokens], axis=1)
        return self._padded(read, begun, 1 + cuts, 1 + length - cuts, ends=False)

    def _padded(
        self, source: np.ndarray, target: np.ndarray, read: np.ndarray, begun: np.ndarray, ends: bool
    ) -> Rows:
        """Both sides, of which each row has so many real tokens, in tables of one size for all rows of a run."""
        places = np.arange(self.places + 1)
        sides = {"source": _wider(source, self.places), "target": _wider(target, self.places + 1)}
        masks = {"source": places[:-1] < read[:, None], "target": places < (begun + ends)[:, None]}
        if ends:
            sides["target"][np.arange(len(target)), begun] = self.markers.end
        for name, side in sides.items():
            side[~masks[name]] = self.markers.pad
        return sides | {f"{name}_mask": mask for name, mask in masks.items()}


def _wider(tokens: np.ndarray, places: int) -> np.ndarray:
    table = np.zeros((len(tokens), places), np.int64)
    table[:, : tokens.shape[1]] = tokens[:, :places]
    return table


def _longest(places: int, needed: Callable[[int], int]) -> int:
    """The largest number of tokens for which no more than `places` are needed."""
    length = 2
    while needed(length + 1) <= places:
        length += 1
    return length

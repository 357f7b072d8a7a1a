"""What stands in the gaps of a text, written by a model that learned a mixture of denoisers; knows no model by name."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from keifu.data.denoising import EXTREME, REGULAR, SEQUENTIAL, Markers
from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError, unknown
from keifu.generation.generate import generate_batch
from keifu.generation.sampling import Sampling

GAP = "___"
MODES = {"short": REGULAR, "long": EXTREME}
GREEDY = Sampling(max_tokens=64, temperature=0, seed=0)


@dataclass(frozen=True)
class Infilling:
    """A text whose gaps were filled: the whole of it, and what was put into each gap ("" where nothing was)."""

    text: str
    spans: tuple[str, ...]


def infill(
    model: nn.Module, tokenizer: Tokenizer, text: str, sampling: Sampling = GREEDY, gaps: str = "short"
) -> Infilling:
    """The text with each `___` in it replaced by what the model writes there.

    gaps: "short" for a few words each ([NLU], UL2's R-denoiser), "long" for more ([NLG], its X-denoiser). A text
    without a gap, and a tokenizer without modes and sentinels, are `UserError`s; `sampling` is that of `generate`.
    """
    if gaps not in MODES:
        raise unknown("kind of gaps", gaps, MODES)
    parts = text.split(GAP)
    if len(parts) == 1:
        raise UserError(f"There is no gap in {text!r}: write {GAP} where something is wanted.")
    markers = Markers.of(tokenizer, len(parts) - 1)
    [found] = generate_batch(model, tokenizer, [prompt(tokenizer, markers, parts, MODES[gaps])], sampling)
    ends = [place for place, token in enumerate(found.tokens) if token in tokenizer.stop_ids]
    spans = split_spans(found.tokens[: ends[0] if ends else None], markers.sentinels)
    words = tuple(tokenizer.decode(span) for span in spans)
    return Infilling("".join(part + word for part, word in zip(_closed(parts), (*words, ""), strict=True)), words)


def prompt(tokenizer: Tokenizer, markers: Markers, parts: Sequence[str], mode: str) -> list[int]:
    """The mode, the parts with a sentinel between each two, and the first sentinel again, after which the model writes.

    A space before a gap belongs to what fills it, as tokens begin with their space.
    """
    encoded = tokenizer.encode_batch(_closed(parts))
    ids = [markers.modes[mode], *encoded[0]]
    for sentinel, part in zip(markers.sentinels.tolist(), encoded[1:], strict=True):
        ids += [sentinel, *part]
    return [*ids, int(markers.sentinels[0])]


def split_spans(written: Sequence[int], sentinels: np.ndarray) -> list[list[int]]:
    """What was written for each sentinel, the first being given; a sentinel out of turn is passed over."""
    spans: list[list[int]] = [[] for _ in sentinels]
    places = {int(sentinel): place for place, sentinel in enumerate(sentinels)}
    current = 0
    for token in written:
        if token in places:
            current = max(current, places[token])
        else:
            spans[current].append(token)
    return spans


def continuation(model: nn.Module, tokenizer: Tokenizer, text: str, sampling: Sampling) -> str:
    """What follows a text, asked for by [S2S] where the tokenizer has it."""
    vocabulary = tokenizer.backend.get_vocab()
    mode = [vocabulary[SEQUENTIAL]] if SEQUENTIAL in vocabulary else []
    return generate_batch(model, tokenizer, [[*mode, *tokenizer.encode(text)]], sampling)[0].text


def _closed(parts: Sequence[str]) -> list[str]:
    """Parts without the space before a gap."""
    return [part.removesuffix(" ") for part in parts[:-1]] + [parts[-1]]

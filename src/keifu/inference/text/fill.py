"""Filling in text: the likeliest words for each [MASK] (BERT), and whole spans for gaps (span corruption, UL2).

Axes: place = tokens of the text, vocab.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from keifu.data.text.span_corruption import REGULAR, SEQUENTIAL, Markers
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.model import Encoder, evaluation_mode
from keifu.inference.text.sampling_params import SamplingParams
from keifu.inference.text.unmasking import close_gaps, split_gaps


@dataclass(frozen=True)
class Guess:
    """Candidate token for a [MASK], as text, with its probability."""

    word: str
    token: int
    probability: float


@torch.inference_mode()
def fill(model: nn.Module, tokenizer: Tokenizer, text: str, count: int = 5) -> list[list[Guess]]:
    """Return for each [MASK] in the text the `count` likeliest tokens, the likeliest first. Each gap is predicted
    separately.

    The mark is the tokenizer's mask token. Raises `UserError` for a text without one, a text that is too long, or a
    model that does not predict masks.
    """
    if not isinstance(model, Encoder):
        raise UserError(f"A {type(model).__name__} fills in no words: load a model such as BERT.")
    ids, positions = _mark_blanks(tokenizer, text)
    room = model.config.context_length
    if len(ids) > room:
        raise UserError(f"The text has {len(ids)} tokens, and the model reads {room}: shorten it.")
    device = next(model.parameters()).device
    with evaluation_mode(model):
        hidden = model.encode(torch.tensor([ids], device=device), None, None)[0, positions]
        likely = model.words(hidden).float().softmax(-1).topk(count)
    return [
        [Guess(tokenizer.decode([token]).strip(), token, p) for token, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
    ]


def _mark_blanks(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Return the ids of the text with [CLS] and [SEP], and the positions of the masks. Only the masks are encoded as
    special tokens."""
    roles = ("mask_token", "cls_token", "sep_token")
    if missing_roles := [role for role in roles if role not in tokenizer.special]:
        raise UserError(f"The tokenizer has no {', '.join(missing_roles)}, so nothing can be filled in.")
    mark, (mask, cls, sep) = tokenizer.special["mask_token"], (tokenizer.token_id(tokenizer.special[r]) for r in roles)
    between = tokenizer.encode_batch(text.split(mark))
    if len(between) == 1:
        raise UserError(f"There is no {mark} in {text!r}: put it where a word is wanted.")
    ids = [cls, *between[0]]
    positions = []
    for part in between[1:]:
        positions.append(len(ids))
        ids += [mask, *part]
    return [*ids, sep], positions


GREEDY = SamplingParams(max_tokens=64, temperature=0, seed=0)


def infill(model: nn.Module, tokenizer: Tokenizer, text: str) -> str:
    """Replace each `___` in the text by the few words that the model generates for it ([NLU], UL2's R-denoiser).

    Raises `UserError` for a text without a gap, or a tokenizer without modes and sentinels.
    """
    parts = split_gaps(text)
    markers = Markers.of(tokenizer, len(parts) - 1)
    [completion] = generate_batch(model, tokenizer, [prompt(tokenizer, markers, parts)], GREEDY)
    ends = [index for index, token in enumerate(completion.tokens) if token in tokenizer.stop_ids]
    spans = split_spans(completion.tokens[: ends[0] if ends else None], markers.sentinels)
    words = [*map(tokenizer.decode, spans), ""]
    return "".join(part + word for part, word in zip(close_gaps(parts), words, strict=True))


def prompt(tokenizer: Tokenizer, markers: Markers, parts: Sequence[str]) -> list[int]:
    """Return the mode, the parts with a sentinel between any two, and the first sentinel again, after which the model
    continues."""
    encoded = tokenizer.encode_batch(close_gaps(parts))
    ids = [markers.modes[REGULAR], *encoded[0]]
    for sentinel, part in zip(markers.sentinels.tolist(), encoded[1:], strict=True):
        ids += [sentinel, *part]
    return [*ids, int(markers.sentinels[0])]


def split_spans(tokens: Sequence[int], sentinels: np.ndarray) -> list[list[int]]:
    """Split the output into spans at the sentinels. The first sentinel is in the prompt; a sentinel out of order is
    ignored."""
    spans: list[list[int]] = [[] for _ in sentinels]
    indices = {int(sentinel): index for index, sentinel in enumerate(sentinels)}
    current = 0
    for token in tokens:
        if token in indices:
            current = max(current, indices[token])
        else:
            spans[current].append(token)
    return spans


def continuation(model: nn.Module, tokenizer: Tokenizer, text: str, sampling: SamplingParams) -> str:
    """Continue a text, in mode [S2S] if the tokenizer has it."""
    vocabulary = tokenizer.backend.get_vocab()
    mode = [vocabulary[SEQUENTIAL]] if SEQUENTIAL in vocabulary else []
    return generate_batch(model, tokenizer, [[*mode, *tokenizer.encode(text)]], sampling)[0].text

"""The likeliest words for each [MASK] in a text, by a model that reads both sides of it; knows no model.

Axes: place = tokens of the text, vocab.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from keifu.data.tokenizer_core import Tokenizer
from keifu.errors import UserError
from keifu.generation.decoding import evaluating


@runtime_checkable
class WordFiller(Protocol):
    """What a model that fills in words offers; its `config` has `context_length`."""

    config: Any

    def encode(self, tokens: Tensor, segments: Tensor | None, mask: Tensor | None) -> Tensor: ...

    def words(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Guess:
    """A token that may stand in a place, as it is spelled, and its probability."""

    word: str
    token: int
    probability: float


@torch.inference_mode()
def fill(model: nn.Module, tokenizer: Tokenizer, text: str, count: int = 5) -> list[list[Guess]]:
    """For each [MASK] in the text the `count` likeliest tokens, the likeliest first; each gap by itself.

    The mark is whatever the tokenizer calls its mask token. A text without one, a text that is too long, and a model
    that fills in nothing are `UserError`s.
    """
    if not isinstance(model, WordFiller):
        raise UserError(f"A {type(model).__name__} fills in no words: load a model such as BERT.")
    ids, places = _marked(tokenizer, text)
    room = model.config.context_length
    if len(ids) > room:
        raise UserError(f"The text has {len(ids)} tokens, and the model reads {room}: shorten it.")
    device = next(model.parameters()).device
    with evaluating(model):
        hidden = model.encode(torch.tensor([ids], device=device), None, None)[0, places]
        likely = model.words(hidden).float().softmax(-1).topk(count)
    return [
        [Guess(tokenizer.decode([token]).strip(), token, p) for token, p in zip(tokens, probabilities, strict=True)]
        for tokens, probabilities in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
    ]


def _marked(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """The ids of the text with [CLS] and [SEP] around it, and the places of the marks; only the marks are special."""
    roles = ("mask_token", "cls_token", "sep_token")
    if missing := [role for role in roles if role not in tokenizer.special]:
        raise UserError(f"The tokenizer has no {', '.join(missing)}, so nothing can be filled in.")
    mark, (mask, cls, sep) = tokenizer.special["mask_token"], (tokenizer.token_id(tokenizer.special[r]) for r in roles)
    between = tokenizer.encode_batch(text.split(mark))
    if len(between) == 1:
        raise UserError(f"There is no {mark} in {text!r}: put it where a word is wanted.")
    ids = [cls, *between[0]]
    places = []
    for part in between[1:]:
        places.append(len(ids))
        ids += [mask, *part]
    return [*ids, sep], places

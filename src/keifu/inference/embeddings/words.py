"""Word vectors at work: the direction of a text of words, and of sums and differences such as "king - man + woman".

Axes: vocab = words, dim; count = results.
"""

import re
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from keifu.data.text.skip_grams import UNKNOWN
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError

SIGNED_WORD = re.compile(r"([+-])\s+(\S+)|(\S+)")  # a sign stands alone: "x-ray" is a word


@runtime_checkable
class WordModel(Protocol):
    """Interface of a model with one vector per word, such as word2vec."""

    config: Any

    def directions(self) -> Float[Tensor, "vocab dim"]:
        """Return the vector of every word, scaled to length 1."""
        ...

    def nearest(
        self, vector: Float[Tensor, " dim"], count: int, without: tuple[int, ...]
    ) -> tuple[Int[Tensor, " count"], Float[Tensor, " count"]]:
        """Return the words with the nearest vectors, and their cosines. without: words that are left out."""
        ...


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that stands for every word outside the vocabulary."""
    return tokenizer.backend.token_to_id(UNKNOWN)


def signed_words(tokenizer: Tokenizer, text: str) -> list[tuple[int, float]]:
    """Return the id of each word in a text, and the sign with which it is added. Raises `UserError` for a word that is
    not in the vocabulary, and for a second word without a sign."""
    words = []
    for sign, signed_word, word in SIGNED_WORD.findall(text):
        if words and not sign:
            raise UserError(f'"{text}" has "{word}" without a sign: join words by + and -, as in "king - man + woman".')
        ids = tokenizer.encode(signed_word or word)
        if len(ids) != 1 or ids[0] == unknown_id(tokenizer):
            raise UserError(
                f'"{signed_word or word}" is not in the vocabulary, the most frequent words of the training text.'
            )
        words.append((ids[0], -1.0 if sign == "-" else 1.0))
    return words


def combination(model: WordModel, words: list[tuple[int, float]], text: str) -> Float[Tensor, " dim"]:
    """Return the signed sum of the words' directions, scaled to length 1. Raises `UserError` if they cancel.

    text: how the sum was written, for the error.
    """
    directions = model.directions()
    total = torch.stack([sign * directions[index] for index, sign in words]).sum(0)
    if total.norm() < 1e-4:
        raise UserError(f'"{text}" adds up to nothing, so it has no direction: leave out a word.')
    return normalize(total, dim=0)

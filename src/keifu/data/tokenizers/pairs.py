"""Token ids of pairs of texts, such as a query and a document, with the segment of each token."""

from collections.abc import Sequence
from typing import NamedTuple

import tokenizers

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError


class IdPair(NamedTuple):
    """Ids of two texts with the special tokens around and between them, and the segment of each id (0 or 1)."""

    ids: list[int]
    segments: list[int]


class TooLong(NamedTuple):
    """Index of a second text whose pair was cut, and the number of tokens of the whole pair."""

    index: int
    length: int


def encode_pairs(
    tokenizer: Tokenizer, first: str, seconds: Sequence[str], limit: int
) -> tuple[list[IdPair], list[TooLong]]:
    """Encode `first` with each of `seconds`. Return the pairs, at most `limit` ids each, and the pairs that were cut.

    A pair loses tokens at the end of its longer text until both are equally long, then of both (the strategy
    longest_first of transformers). Text such as "[SEP]" is plain text, as in `Tokenizer.encode`.
    """
    backend, encodings = tokenizer.encodings([first, *seconds])
    extra = backend.num_special_tokens_to_add(True)
    if limit <= extra:
        raise UserError(f"A pair of texts has {extra} special tokens, and the model takes {limit} tokens.")
    pairs, longer = list[IdPair](), list[TooLong]()
    for index, second in enumerate(encodings[1:]):
        query = tokenizers.Encoding.merge([encodings[0]])  # a copy, because `truncate` changes it
        length = len(query) + len(second) + extra
        if length > limit:
            longer.append(TooLong(index, length))
            lengths = longest_first(len(query), len(second), limit - extra)
            query.truncate(lengths[0])
            second.truncate(lengths[1])
        pair = backend.post_process(query, second)
        pairs.append(IdPair(pair.ids, pair.type_ids))
    return pairs, longer


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return the lengths of two texts that together have at most `room` tokens. The longer one is cut first; of equal
    ones each keeps half, and the longer one keeps the odd token."""
    if first > second:
        second, first = longest_first(second, first, room)
        return first, second
    second = min(second, max(first, room - first))
    return (first, second) if first + second <= room else (room // 2, room - room // 2)

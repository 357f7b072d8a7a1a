"""Comparison of texts: normalisation, which ignores case, spaces, punctuation and compatibility forms; and near copies,
which differ by at most one word or one character.

Languages with spaces between words are compared word by word; Chinese and Japanese, character by character. Case and
punctuation are ignored (see `normalize`). A held-out pair is a near copy if one of its sides is within one
insertion, deletion or substitution of the same side of a training pair.

The held-out pairs of `keifu.data.translation.pairs.split` may have such near copies in training. `near_training` marks
them, so that an evaluation can report both. The split is not changed, because published weights were trained on it.

The search is exact and fast. One edit leaves the first half or the second half of a sentence unchanged. So held-out
sentences are indexed by both halves, and only those with a common half are compared.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from keifu.files import hash_of

Pair = tuple[str, str]  # a sentence and its translation
WITHOUT_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


class KeptCharacters(dict[int, int | None]):
    """Table for str.translate: a character's code, or None for spaces, punctuation and control characters."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PZC" else code
        return self[code]


KEPT_CHARACTERS = KeptCharacters()


def normalize(sentence: str) -> str:
    """Convert a sentence to NFKC and lower case, and remove spaces and punctuation.

    A sentence that consists only of punctuation keeps it.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", sentence).lower())
    bare = unicodedata.normalize("NFKC", text.translate(KEPT_CHARACTERS))
    return bare or "".join(text.split())


def key(text: str) -> str:
    """Return a hash of a normalised text, in hexadecimal."""
    return hash_of([normalize(text)])


def units(sentence: str) -> tuple[str, ...]:
    """Split a normalised sentence into units for comparison: words, or characters of Chinese and Japanese."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", sentence).lower())
    words = [bare for word in text.split() if (bare := word.translate(KEPT_CHARACTERS))] or text.split()
    joined = "".join(words)
    return tuple(joined) if WITHOUT_SPACES.search(joined) else tuple(words)


class HeldOut:
    """Held-out sentences of one language, indexed by their first and their second halves."""

    def __init__(self, sentences: Iterable[str]):
        self.sentences = [units(sentence) for sentence in sentences]
        self.by_half = defaultdict[tuple, set[int]](set)
        for index, sentence in enumerate(self.sentences):
            middle = len(sentence) // 2
            self.by_half["first", sentence[:middle]].add(index)
            self.by_half["second", sentence[middle:]].add(index)

    def near(self, sentence: str) -> set[int]:
        """Return the indices of the held-out sentences that are within one edit of `sentence`."""
        key = units(sentence)
        candidates = set[int]()
        for length in {len(key) - 1, len(key), len(key) + 1}:  # length of the held-out sentence
            middle = length // 2
            candidates |= self.by_half.get(("first", key[:middle]), set())
            candidates |= self.by_half.get(("second", key[len(key) - (length - middle) :]), set())
        return {index for index in candidates if within_one_edit(self.sentences[index], key)}


def within_one_edit(one: Sequence[str], other: Sequence[str]) -> bool:
    """Return whether at most one insertion, deletion or substitution turns one sequence into the other."""
    shorter, longer = sorted((one, other), key=len)
    if len(longer) - len(shorter) > 1:
        return False
    equal = next((i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(shorter))
    return shorter[equal + (len(shorter) == len(longer)) :] == longer[equal + 1 :]


def near_training(held_out: Sequence[Pair], training: Iterable[Pair]) -> list[bool]:
    """Return for each held-out pair whether one of its sides is within one edit of the same side of a training pair."""
    sides = [HeldOut(pair[side] for pair in held_out) for side in range(2)]
    distinct = [dict.fromkeys(sentences) for sentences in zip(*training, strict=True)]
    near = [False] * len(held_out)
    for side, sentences in zip(sides, distinct, strict=False):
        for sentence in sentences:
            for index in side.near(sentence):
                near[index] = True
    return near

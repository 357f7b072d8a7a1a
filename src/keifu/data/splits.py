"""Pairs held out for validation and for testing, without a sentence of theirs left in training; knows no file.

A pair is chosen by a hash of its normalised text: the choice does not depend on the order of the pairs nor on the
direction. What is kept apart is equal text. Sentences that differ in a word or a name ("Tom likes tea", "Mary likes
tea"), and paraphrases that share neither side with a held-out pair, are not caught and may stand on both sides.
"""

import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from keifu.data.pairs import Pair, Pairs
from keifu.errors import UserError

HELD_OUT = 1000


@dataclass(frozen=True)
class Split:
    """Three parts of the same pairs; `dropped` counts those that are in none, since they share a side with one held out
    or say the same as another pair."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    dropped: int

    def sentence(self) -> str:
        """The sizes, for people."""
        return (
            f"{len(self.train):,} pairs for training, {len(self.validation):,} for validation, {len(self.test):,} for "
            f"testing; {self.dropped:,} left out that repeat another pair or share a sentence with one held out."
        )


class _Kept(dict[int, int | None]):
    """For str.translate: a character's code, None for spaces, punctuation and control characters."""

    def __missing__(self, code: int) -> int | None:
        stripped = unicodedata.category(chr(code))[0] in "PZC"
        self[code] = None if stripped else code
        return self[code]


_KEPT = _Kept()


def normalised(sentence: str) -> str:
    """A sentence without what does not make it another one: NFKC, lower case, no spaces and no punctuation.

    A sentence of punctuation alone keeps it.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", sentence).lower())
    bare = unicodedata.normalize("NFKC", text.translate(_KEPT))
    return bare or "".join(text.split())


def split(pairs: Pairs | Iterable[Pair], seed: int = 0, held_out: int = HELD_OUT) -> Split:
    """Holds out `held_out` pairs for testing and as many for validation, but at most a tenth of all for each.

    Held-out pairs have no side in common, not even between the two parts. A training pair shares no normalised side,
    in either language, with one held out. Of pairs that are equal when normalised, training keeps every distinct
    spelling. Fewer than three distinct pairs cannot be split: a `UserError`.
    """
    rows = list(dict.fromkeys(pairs.rows if isinstance(pairs, Pairs) else pairs))
    total = len(pairs.rows) if isinstance(pairs, Pairs) else len(rows)
    sides = [(normalised(a), normalised(b)) for a, b in rows]
    size = max(1, min(held_out, len(rows) // 10))
    seen: set[str] = set()
    chosen = _disjoint(sorted(range(len(rows)), key=lambda i: (_key(sides[i], seed), sorted(rows[i]))), sides, seen)
    test, validation = ([i for _, i in zip(range(size), chosen, strict=False)] for _ in range(2))
    train = [pair for pair, both in zip(rows, sides, strict=True) if seen.isdisjoint(both)]
    if not (train and validation and test):
        raise UserError(
            f"{len(rows):,} distinct pairs cannot be parted into training, validation and test without a sentence in "
            "two of them: give more pairs."
        )
    parts = [rows[i] for i in validation], [rows[i] for i in test]
    return Split(train, *parts, dropped=total - len(train) - len(validation) - len(test))


def split_beside(pairs: Pairs, validation: Pairs | None, test: Pairs | None, seed: int = 0) -> Split:
    """The same with pairs of one's own for validation, for testing or for both; a part without any is chosen as in
    `split`. A training pair shares no normalised side with one held out. If none is left, it is a `UserError`."""
    chosen = None if validation and test else split(pairs, seed)
    held = [each.rows if each else part for each, part in zip((validation, test), _held(chosen), strict=True)]
    seen = {normalised(side) for part in held for pair in part for side in pair}
    rows = dict.fromkeys(pairs.rows)
    train = [pair for pair in rows if seen.isdisjoint(map(normalised, pair))]
    if not train:
        raise UserError(f"Every pair of {pairs.name} shares a sentence with one held out: nothing is left to train on.")
    own = sum(len(part) for each, part in zip((validation, test), held, strict=True) if not each)
    return Split(train, *held, dropped=len(pairs) - len(train) - own)


def _held(chosen: Split | None) -> tuple[list[Pair], list[Pair]]:
    return (chosen.validation, chosen.test) if chosen else ([], [])


def _disjoint(order: Iterable[int], sides: list[tuple[str, str]], seen: set[str]) -> Iterator[int]:
    """The pairs, in this order, that share no side with one given before; `seen` takes up the sides."""
    for i in order:
        if seen.isdisjoint(sides[i]):
            seen.update(sides[i])
            yield i


def _key(both: tuple[str, str], seed: int) -> bytes:
    """A number for a pair that looks random and is the same in both directions."""
    return hashlib.blake2b("\n".join([str(seed), *sorted(both)]).encode(), digest_size=16).digest()

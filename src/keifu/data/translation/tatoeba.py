"""Tatoeba's sentences in seven languages as sources of one mixture, without leakage between its languages.

Sentences come in rows of translations. A row is held out by a hash of its Japanese sentence, and a row that has any
sentence, in any language, in common with a held-out one is left out of training. So what a mixture holds out in one
language stands neither in its other texts of that language nor in its translations.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from keifu.data.catalogue import catalogue, readers
from keifu.data.text.normalization import normalize
from keifu.data.translation.pairs import Pair

ENTRY = "tatoeba-en"  # any entry of the archive: all have its file
LANGUAGES = {
    "ja": "Japanese", "en": "English", "de": "German", "fr": "French", "es": "Spanish", "nl": "Dutch", "sv": "Swedish",
}  # fmt: skip
LINES = 8  # sentences, or pairs, of a document
FORMATS: tuple[Callable[[str, str, Pair], str], ...] = (  # the names of both languages, and a pair
    lambda source, target, pair: f"{source}: {pair[0]}\n{target}: {pair[1]}",
    lambda source, target, pair: f"{pair[0]}\n{pair[1]}\n",
    lambda source, target, pair: f"{pair[0]} = {pair[1]}",
    lambda source, target, pair: f"{target} for “{pair[0]}”: {pair[1]}",
)
Row = dict[str, str]
Parts = tuple[list[str], list[str]]  # training documents and held-out documents


def names() -> dict[str, tuple[str, ...]]:
    """Return the sources that are read here, each with the codes of its language or languages, in either order."""
    one = {f"tatoeba-{code}": (code,) for code in LANGUAGES}
    return one | {f"tatoeba-{a}-{b}": (a, b) for a in LANGUAGES for b in LANGUAGES if a != b}


def parts(name: str, held_out: float) -> Parts:
    """Return the documents of a source of `names`: eight sentences, one a line, or eight pairs (see `translations`)."""
    codes = names()[name]
    learned, kept = rows(held_out)
    make = sentences if len(codes) == 1 else translation_prompt
    return make(learned, codes), make(kept, codes)


@lru_cache(maxsize=1)
def rows(held_out: float) -> tuple[list[Row], list[Row]]:
    """Return training and held-out rows, the latter about that share of all; rows that share a sentence are dropped."""
    return split_sentences([*readers.tatoeba(catalogue.fetch(ENTRY))], held_out)


def split_sentences(every: Sequence[Row], held_out: float) -> tuple[list[Row], list[Row]]:
    """Split any rows into training and held-out rows."""
    keys = [{(code, normalize(text)) for code, text in sentences_of(row).items()} for row in every]
    chosen = [_hash(row["ja"]) < held_out for row in every]
    taken = {key for row_keys, kept in zip(keys, chosen, strict=True) if kept for key in row_keys}
    learned = [row for row, row_keys in zip(every, keys, strict=True) if taken.isdisjoint(row_keys)]
    return learned, [row for row, kept in zip(every, chosen, strict=True) if kept]


def sentences_of(row: Row) -> Row:
    """Return the sentences of a row by their language."""
    return {code: row[code].strip() for code in LANGUAGES if row.get(code, "-").strip() not in ("", "-")}


def sentences(rows: Sequence[Row], codes: Sequence[str]) -> list[str]:
    """Return the distinct sentences of a language, in an order given by a hash, as documents of eight lines."""
    distinct = {row[codes[0]]: None for row in map(sentences_of, rows) if codes[0] in row}
    return ["\n".join(lines) for lines in _eights(sorted(distinct, key=_hash))]


def translation_prompt(rows: Sequence[Row], codes: Sequence[str]) -> list[str]:
    """Return the distinct pairs of two languages as documents (see `translations`)."""
    pairs = {(row[codes[0]], row[codes[1]]) for row in map(sentences_of, rows) if {*codes} <= row.keys()}
    return translations(sorted(pairs, key=lambda pair: _hash("\n".join(pair))), codes)


def translations(pairs: Sequence[Pair], languages: Sequence[str]) -> list[str]:
    """Return documents of eight pairs, first from the first language to the second, then all of them the other way
    round.

    Each document has one of `FORMATS` throughout. `languages`: codes, or names as they are to stand there.
    """
    first, second = (LANGUAGES.get(language, language) for language in languages)
    back = [(b, a) for a, b in reversed(pairs)]
    there = [(first, second, group) for group in _eights(pairs)] + [(second, first, group) for group in _eights(back)]
    return [
        "\n".join(FORMATS[n % len(FORMATS)](source, target, pair) for pair in group)
        for n, (source, target, group) in enumerate(there)
    ]


def identity(name: str, held_out: float) -> str:
    """Return a text that changes whenever the documents do."""
    return f"{catalogue.identity(ENTRY)} {name} {held_out} {LINES} {len(FORMATS)} 1"


def _eights(items: Sequence) -> Iterator[Sequence]:
    return (items[start : start + LINES] for start in range(0, len(items), LINES))


def _hash(text: str) -> float:
    """Return a number from 0 to 1 that looks random and is always the same."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48

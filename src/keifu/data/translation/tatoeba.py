"""Tatoeba's sentences in seven languages as sources of one mixture, without leakage between its languages.

Sentences are in rows of translations. A row is held out by a hash of its Japanese sentence. A row that shares a
sentence, in any language, with a held-out one is not used for training. So a held-out text is neither in the mixture's
other texts of that language nor in its translations.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from keifu.data.catalogue import catalogue, readers
from keifu.data.text.normalization import normalize
from keifu.data.translation.pairs import Pair

ENTRY = "tatoeba-en"  # any entry of the archive
LANGUAGES = {
    "ja": "Japanese", "en": "English", "de": "German", "fr": "French", "es": "Spanish", "nl": "Dutch", "sv": "Swedish",
}  # fmt: skip
LINES = 8  # sentences or pairs in a document
FORMATS: tuple[Callable[[str, str, Pair], str], ...] = (  # arguments: the names of both languages, and a pair
    lambda source, target, pair: f"{source}: {pair[0]}\n{target}: {pair[1]}",
    lambda source, target, pair: f"{pair[0]}\n{pair[1]}\n",
    lambda source, target, pair: f"{pair[0]} = {pair[1]}",
    lambda source, target, pair: f"{target} for “{pair[0]}”: {pair[1]}",
)
Row = dict[str, str]
Parts = tuple[list[str], list[str]]  # training documents and held-out documents


def names() -> dict[str, tuple[str, ...]]:
    """Return the names of sources that this module reads, with the codes of their languages, in either order."""
    one = {f"tatoeba-{code}": (code,) for code in LANGUAGES}
    return one | {f"tatoeba-{a}-{b}": (a, b) for a in LANGUAGES for b in LANGUAGES if a != b}


def parts(name: str, held_out: float) -> Parts:
    """Return training and held-out documents of a source: eight sentences, one on each line, or eight pairs (see
    `translations`)."""
    codes = names()[name]
    training, validation = rows(held_out)
    make = sentences if len(codes) == 1 else translation_prompt
    return make(training, codes), make(validation, codes)


@lru_cache(maxsize=1)
def rows(held_out: float) -> tuple[list[Row], list[Row]]:
    """Return training and held-out rows. The latter are about the share `held_out`. Rows that share a sentence with
    them are dropped."""
    return split_sentences([*readers.tatoeba(catalogue.fetch(ENTRY))], held_out)


def split_sentences(every: Sequence[Row], held_out: float) -> tuple[list[Row], list[Row]]:
    """Split any rows into training and held-out rows."""
    keys = [{(code, normalize(text)) for code, text in sentences_of(row).items()} for row in every]
    held_out_rows = [_hash(row["ja"]) < held_out for row in every]
    held_out_keys = {
        key for row_keys, is_held_out in zip(keys, held_out_rows, strict=True) if is_held_out for key in row_keys
    }
    learned = [row for row, row_keys in zip(every, keys, strict=True) if held_out_keys.isdisjoint(row_keys)]
    return learned, [row for row, is_held_out in zip(every, held_out_rows, strict=True) if is_held_out]


def sentences_of(row: Row) -> Row:
    """Return the sentences of a row by language."""
    return {code: row[code].strip() for code in LANGUAGES if row.get(code, "-").strip() not in ("", "-")}


def sentences(rows: Sequence[Row], codes: Sequence[str]) -> list[str]:
    """Return the distinct sentences of a language, ordered by a hash, as documents of eight lines."""
    distinct = {row[codes[0]]: None for row in map(sentences_of, rows) if codes[0] in row}
    return ["\n".join(lines) for lines in _eights(sorted(distinct, key=_hash))]


def translation_prompt(rows: Sequence[Row], codes: Sequence[str]) -> list[str]:
    """Return the distinct pairs of two languages as documents (see `translations`)."""
    pairs = {(row[codes[0]], row[codes[1]]) for row in map(sentences_of, rows) if {*codes} <= row.keys()}
    return translations(sorted(pairs, key=lambda pair: _hash("\n".join(pair))), codes)


def translations(pairs: Sequence[Pair], languages: Sequence[str]) -> list[str]:
    """Return documents of eight pairs: first from the first language to the second, then all in the other direction.

    Each document has one of `FORMATS` throughout. languages: codes, or the names that the text contains.
    """
    first, second = (LANGUAGES.get(language, language) for language in languages)
    back = [(b, a) for a, b in reversed(pairs)]
    there = [(first, second, group) for group in _eights(pairs)] + [(second, first, group) for group in _eights(back)]
    return [
        "\n".join(FORMATS[n % len(FORMATS)](source, target, pair) for pair in group)
        for n, (source, target, group) in enumerate(there)
    ]


def identity(name: str, held_out: float) -> str:
    """Return a string that changes with the documents."""
    return f"{catalogue.identity(ENTRY)} {name} {held_out} {LINES} {len(FORMATS)} 1"


def _eights(items: Sequence) -> Iterator[Sequence]:
    return (items[start : start + LINES] for start in range(0, len(items), LINES))


def _hash(text: str) -> float:
    """Return a pseudorandom number from 0 to 1 for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48

"""Parallel sentences: read from the catalogue, a TSV file or two aligned files, and split without leakage.

A source is a catalogue name (tatoeba-ja-en, or tatoeba-en-ja for the other direction); a file of records (.csv, .jsonl
and others, or a .tsv file whose first line names its columns) with a field for each side; a file with a sentence, a tab
and its translation on each line; or two files "train.ja,train.en" with corresponding lines.

A pair is held out by a hash of its normalised text. So the choice does not depend on the order of the pairs or on the
direction, and no held-out sentence is in training. Only equal text is recognised. Sentences that differ in a word or a
name ("Tom likes tea", "Mary likes tea") may be in both parts: `near_training` marks the held-out pairs with
such a near copy in training. Paraphrases that share neither side are not recognised.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from keifu.data.catalogue import catalogue
from keifu.data.records import SUFFIXES, content, lines, listed, read_cells, read_records
from keifu.data.text.normalization import Pair, normalize
from keifu.errors import UserError, unknown
from keifu.files import hash_of
from keifu.folders import neighbours

Fields = tuple[str | None, str | None]  # of source and target; None: by their names
NAMES = ("source", "target"), ("src", "tgt"), ("src", "trg"), ("input", "output"), ("sentence", "translation")
CODE = r"[a-z]{2,3}([-_][A-Za-z]{2,4})?"  # pattern of a language code
LANGUAGES = {"english", "japanese", "german", "french", "spanish", "dutch", "italian", "portuguese", "chinese",
             "korean", "russian", "arabic", "hindi", "turkish", "polish", "swedish", "ukrainian"}  # fmt: skip
TABLES = ".csv", ".tsv"  # here the first line may be names or a pair


@dataclass(frozen=True)
class Pairs:
    """Sentences with their translations: `rows` in the order of their source, without spaces at their ends.

    languages: codes, if the source's name contains them, else "". left_out: a sentence about pairs that were left out,
    or "". name: the source as the user gave it.
    """

    name: str
    rows: list[Pair]
    languages: tuple[str, str] = ("", "")
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def reversed(self) -> "Pairs":
        """Return the same pairs in the other direction."""
        return replace(self, rows=[(b, a) for a, b in self.rows], languages=self.languages[::-1])

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all sentences in their order."""
        return hash_of("\t".join(pair) + "\n" for pair in self.rows)


def read_pairs(
    source: str | Path, reverse: bool = False, fields: Fields = (None, None), encoding: str | None = None
) -> Pairs:
    """Return all pairs of a source. reverse: swap the sides of each.

    fields: names of the source and the target field of records; by default source and target (or another pair of
    `NAMES`), or the only two fields, in order. encoding: see `records.lines`. Pairs with an empty side are left out
    and counted. Raises `UserError`, with the line or the nearest name, for files of unequal length, a line without two
    columns, invalid bytes, or an unknown name.
    """
    pairs = _from_catalogue(str(source)) or _from_files(str(source), fields, encoding)
    rows = [pair for pair in pairs.rows if all(pair)]
    empty = len(pairs) - len(rows)
    if not rows:
        raise UserError(f"{source} holds no pair whose two sides both have text; {len(pairs):,} pairs were read.")
    left_out = f"{empty:,} of {len(pairs):,} pairs of {source} have an empty side and are left out." if empty else ""
    pairs = replace(pairs, rows=rows, left_out=left_out)
    return pairs.reversed() if reverse else pairs


def pair_names() -> dict[str, tuple[str, bool]]:
    """Return every catalogue name of pairs, in both directions: (entry, whether it is reversed)."""
    forward = catalogue.names("pairs")
    parts = {name: name.rsplit("-", 2) for name in forward}  # tatoeba-ja-en is tatoeba-en-ja reversed
    turned = {f"{stem}-{second}-{first}": (name, True) for name, (stem, first, second) in parts.items()}
    return {name: (name, False) for name in forward} | turned


def _from_catalogue(source: str) -> Pairs | None:
    if source not in pair_names():
        return None
    name, turned = pair_names()[source]
    first, second = name.rsplit("-", 2)[1:]
    result = Pairs(source, [(a.strip(), b.strip()) for a, b in catalogue.pairs(name)], (first, second))
    return result.reversed() if turned else result


def _from_files(source: str, fields: Fields, encoding: str | None) -> Pairs:
    paths = [Path(part.strip()).expanduser() for part in source.split(",")]
    if len(paths) == 1 or Path(source).exists():
        path = Path(source).expanduser()
        _check_there(path, source)
        return _of_records(source, path, fields, encoding) or Pairs(source, list(_columns(path, encoding)))
    if len(paths) > 2:
        raise UserError(f"{source} names {len(paths)} files, but pairs are in one file or in two files: A,B.")
    for path in paths:
        _check_there(path, str(path))
    codes = [path.suffix[1:] if re.fullmatch(r"\.(?!txt)[a-z]{2,3}", path.suffix) else "" for path in paths]
    return Pairs(source, list(_zip_files(paths[0], paths[1], encoding)), (codes[0], codes[1]))


def _check_there(path: Path, name: str) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the file of pairs in it, or its two files as A,B.")
    if not path.is_file():
        raise unknown("catalogue name, file of pairs or pair of files", name, [*pair_names(), *neighbours(path)])


def _of_records(source: str, path: Path, fields: Fields, encoding: str | None) -> Pairs | None:
    """Read the pairs of a file of records. Return None for a file of two columns without names."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES or (suffix == ".tsv" and not any(fields) and not _has_header(path, encoding)):
        return None
    names: tuple[str, str] | None = None
    rows: list[Pair] = []
    for where, record in read_records(path, encoding=encoding):
        inner = record.get("translation")
        record = inner if isinstance(inner, dict) else record
        names = names or _sides(where, record, fields, suffix)
        first, second = (_text(where, record, name) for name in names)
        rows.append((first, second))
    side_names = {name for pair in NAMES for name in pair}
    codes = [name if re.fullmatch(CODE, name) and name not in side_names else "" for name in names or ()]
    return Pairs(source, rows, (codes[0], codes[1]) if codes else ("", ""))


def _has_header(path: Path, encoding: str | None) -> bool:
    """Return whether the first line of a table with at least two columns names them."""
    _, cells = next(read_cells(path, encoding=encoding, delimiter="\t"), ("", []))
    return any(_find(cells, names) for names in NAMES)


def _sides(where: str, record: Mapping[str, Any], fields: Fields, suffix: str) -> tuple[str, str]:
    """Return the names of the source and target fields: the given ones, a usual pair of names, or the only two
    fields."""
    known_sides = next((sides for names in NAMES if (sides := _find(record, names))), None)
    language_columns = [name for name in record if re.fullmatch(CODE, name) or name.lower() in LANGUAGES]
    two = [*record] if suffix not in TABLES else language_columns
    first, second = known_sides or ((two[0], two[1]) if len(record) == len(two) == 2 else (None, None))
    first, second = fields[0] or first, fields[1] or second
    for name in filter(None, fields):
        content(where, record, name)
    if first is None or second is None or first == second:
        unclear = f"which fields are the source and its translation? There are {listed(record)}"
        ways = "call two of them source and target, or name them with --source-field and --target-field"
        raise UserError(f"{where}: {unclear}; {ways}.")
    return first, second


def _find(columns: Iterable[str], names: Pair) -> tuple[str, str] | None:
    """Return the fields with these names, ignoring case; None if there are none."""
    by_name = {name.strip().lower(): name for name in columns}
    return (by_name[names[0]], by_name[names[1]]) if {*names} <= by_name.keys() else None


def _text(where: str, record: Mapping[str, Any], name: str) -> str:
    value = content(where, record, name)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: the field {name!r} is {type(value).__name__}, not text.")
    return (value or "").strip()


def _columns(path: Path, encoding: str | None) -> Iterator[Pair]:
    """Yield the two columns of a file with one tab on each line."""
    for number, line in enumerate(lines(path, encoding=encoding), 1):
        cells = [cell.strip() for cell in line.rstrip("\n").split("\t")]
        if len(cells) != 2:
            cell_list = ", ".join(repr(cell if len(cell) <= 40 else f"{cell[:37]}...") for cell in cells[:6])
            wrong = f"there is no tab in {cell_list}, and a tab parts a sentence from its translation"
            if len(cells) > 2:
                wrong = (
                    f"there are {len(cells)} columns ({cell_list}), and two are needed: cut out the others, as with "
                )
                wrong += "`cut -f 1,2`"
            raise UserError(f"{path}, line {number}: {wrong}.")
        yield cells[0], cells[1]


def _zip_files(first: Path, second: Path, encoding: str | None) -> Iterator[Pair]:
    """Yield pairs of lines of two files. Raises `UserError` if the numbers of lines differ."""
    rows = zip_longest(lines(first, encoding=encoding), lines(second, encoding=encoding))
    for number, (one, other) in enumerate(rows, 1):
        if one is None or other is None:
            longer, shorter = (second, first) if one is None else (first, second)
            n_further = 1 + sum(1 for _ in rows)
            rule = f"line {number:,} of one must be the translation of that line of the other"
            raise UserError(
                f"{shorter} ends after line {number - 1:,}, and {longer} has {n_further:,} lines more: {rule}."
            )
        yield one.strip(), other.strip()


HELD_OUT = 1000


@dataclass(frozen=True)
class PairSplit:
    """Three parts of a set of pairs. dropped: number of pairs in none of them, because they share a side with a
    held-out pair or repeat another pair."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    dropped: int

    def sentence(self) -> str:
        """Describe the sizes in a sentence."""
        parts = f"{len(self.train):,} pairs for training, {len(self.validation):,} for validation"
        left_out = f"{self.dropped:,} left out that repeat another pair or share a sentence with one held out"
        return f"{parts}, {len(self.test):,} for testing; {left_out}."


def split(
    pairs: Pairs, seed: int = 0, held_out: int = HELD_OUT, validation: Pairs | None = None, test: Pairs | None = None
) -> PairSplit:
    """Hold out `held_out` pairs for testing and as many for validation, at most a tenth of all for each. `validation`
    and `test`, if given, replace these parts.

    No two held-out pairs share a side, not even in different parts. A training pair shares no normalised side, in
    either language, with a held-out one. Of pairs that are equal after normalisation, training keeps every distinct
    spelling. Raises `UserError` for fewer than three distinct pairs, or if none is left for training.
    """
    rows = list(dict.fromkeys(pairs.rows))
    sides = [(normalize(a), normalize(b)) for a, b in rows]
    drawn_parts: list[list[Pair]] = [[], []]
    if validation is None or test is None:
        size = max(1, min(held_out, len(rows) // 10))
        seen_sides: set[str] = set()
        # The pair itself comes last: it only decides between a pair and its reverse.
        order = sorted(range(len(rows)), key=lambda i: (_key(sides[i], seed), sorted(rows[i]), rows[i]))
        disjoint_pairs = _disjoint(order, sides, seen_sides)
        drawn_parts = [[rows[i] for i in islice(disjoint_pairs, size)] for _ in ("test", "validation")][::-1]
        if not (all(drawn_parts) and any(map(seen_sides.isdisjoint, sides))):
            few = f"{len(rows):,} distinct pairs cannot be split into training, validation and test"
            raise UserError(f"{few} without a sentence in two of them: give more pairs.")
    kept_out = [
        part if given_part is None else given_part.rows
        for given_part, part in zip((validation, test), drawn_parts, strict=True)
    ]
    hidden = {normalize(side) for part in kept_out for pair in part for side in pair}
    train = [pair for pair, both in zip(rows, sides, strict=True) if hidden.isdisjoint(both)]
    if not train:
        raise UserError(f"Every pair of {pairs.name} shares a sentence with one held out: nothing is left to train on.")
    n_kept = len(train) + sum(
        len(part) for given_part, part in zip((validation, test), drawn_parts, strict=True) if given_part is None
    )
    return PairSplit(train, *kept_out, dropped=len(pairs) - n_kept)


def _disjoint(order: Iterable[int], sides: list[tuple[str, str]], seen_sides: set[str]) -> Iterator[int]:
    """Yield the pairs, in this order, that share no side with an earlier one. Add their sides to `seen_sides`."""
    for i in order:
        if seen_sides.isdisjoint(sides[i]):
            seen_sides.update(sides[i])
            yield i


def _key(both: tuple[str, str], seed: int) -> bytes:
    """Return a pseudorandom key for a pair, equal in both directions."""
    return hashlib.blake2b("\n".join([str(seed), *sorted(both)]).encode(), digest_size=16).digest()

"""Sentences with their translations, out of the catalogue, a TSV file or two files; it knows no tokenizer and no model.

A source is a catalogue name (tatoeba-ja-en, or tatoeba-en-ja for the other direction), a TSV file whose lines are a
sentence, a tab and its translation, or two files "train.ja,train.en" whose lines belong together.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from keifu.data import catalogue
from keifu.data.sources import lines
from keifu.errors import UserError, unknown

Pair = tuple[str, str]
HEADERS = {"source", "target", "src", "tgt", "trg", "input", "output", "sentence", "translation"}


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations: `rows` in the order of their source, spaces at both ends taken off.

    languages: their codes, as far as the source's name tells them ("" where it does not). left_out: a sentence about
    pairs that were left out, "" where none was. name: the source as it was given.
    """

    name: str
    rows: list[Pair]
    languages: tuple[str, str] = ("", "")
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def reversed(self) -> "Pairs":
        """The same in the other direction."""
        return replace(self, rows=[(b, a) for a, b in self.rows], languages=self.languages[::-1])

    @property
    def fingerprint(self) -> str:
        """A hexadecimal SHA-256 of all sentences in their order."""
        digest = hashlib.sha256()
        for pair in self.rows:
            digest.update("\t".join(pair).encode() + b"\n")
        return digest.hexdigest()


def read_pairs(source: str | Path, reverse: bool = False) -> Pairs:
    """All pairs of a source; `reverse` swaps the sides of each.

    Pairs with an empty side are left out and counted. Files of unequal length, a line that is not two columns, bytes
    that are not UTF-8 and an unknown name are `UserError`s with the line's number or the nearest name.
    """
    found = _catalogued(str(source)) or _from_files(str(source))
    rows = [pair for pair in found.rows if all(pair)]
    empty = len(found) - len(rows)
    if not rows:
        raise UserError(f"{source} holds no pair whose two sides both have text; {len(found):,} pairs were read.")
    left_out = f"{empty:,} of {len(found):,} pairs of {source} have an empty side and are left out." if empty else ""
    found = replace(found, rows=rows, left_out=left_out)
    return found.reversed() if reverse else found


def pair_names() -> dict[str, tuple[str, bool]]:
    """Every catalogue name of pairs, in both directions: the entry, and whether it is turned round."""
    forward = [name for name, entry in catalogue.CATALOGUE.items() if entry.gives == "pairs"]
    return {name: (name, False) for name in forward} | {_turned(name): (name, True) for name in forward}


def _turned(name: str) -> str:
    """tatoeba-en-ja of tatoeba-ja-en."""
    stem, first, second = name.rsplit("-", 2)
    return f"{stem}-{second}-{first}"


def _catalogued(source: str) -> Pairs | None:
    if source not in pair_names():
        return None
    name, turned = pair_names()[source]
    first, second = name.rsplit("-", 2)[1:]
    found = Pairs(source, [(a.strip(), b.strip()) for a, b in catalogue.pairs(name)], (first, second))
    return found.reversed() if turned else found


def _from_files(source: str) -> Pairs:
    paths = [Path(part.strip()).expanduser() for part in source.split(",")]
    if len(paths) == 1 or Path(source).exists():
        path = Path(source).expanduser()
        _check_there(path, source)
        return Pairs(source, list(_table(path)))
    if len(paths) > 2:
        raise UserError(f"{source} names {len(paths)} files, but pairs are in one TSV file or in two files: A,B.")
    for path in paths:
        _check_there(path, str(path))
    codes = [path.suffix[1:] if re.fullmatch(r"\.(?!txt)[a-z]{2,3}", path.suffix) else "" for path in paths]
    return Pairs(source, list(_side_by_side(*paths)), (codes[0], codes[1]))


def _check_there(path: Path, name: str) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder: name the TSV file in it, or its two files as A,B.")
    if not path.is_file():
        near = [str(path.with_name(each.name)) for each in path.parent.glob("*")] if path.parent.is_dir() else []
        raise unknown("catalogue name, TSV file or pair of files", name, [*pair_names(), *near])


def _table(path: Path) -> Iterator[Pair]:
    """The two columns of a TSV file."""
    for number, line in enumerate(lines(path, _refuse), 1):
        cells = [cell.strip() for cell in line.rstrip("\n").split("\t")]
        if len(cells) != 2:
            raise UserError(f"{path}, line {number}: {_wrong_columns(cells)}")
        if number == 1 and {cell.lower() for cell in cells} <= HEADERS:
            raise UserError(f"{path}, line 1: {' and '.join(cells)} look like names of columns: remove that line.")
        yield cells[0], cells[1]


def _wrong_columns(cells: list[str]) -> str:
    if len(cells) == 1:
        return f"there is no tab in {_shown(cells[0])}, and a tab parts a sentence from its translation."
    shown = ", ".join(map(_shown, cells[:6]))
    return f"there are {len(cells)} columns ({shown}), and two are needed: cut out the others, as with `cut -f 1,2`."


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _side_by_side(first: Path, second: Path) -> Iterator[Pair]:
    """The lines of two files, which must be as many."""
    rows = zip_longest(lines(first, _refuse), lines(second, _refuse))
    for number, (one, other) in enumerate(rows, 1):
        if one is None or other is None:
            longer, shorter = (second, first) if one is None else (first, second)
            more = 1 + sum(1 for _ in rows)
            raise UserError(
                f"{shorter} ends after line {number - 1:,}, and {longer} has {more:,} lines more: line {number:,} of "
                "one must be the translation of that line of the other."
            )
        yield one.strip(), other.strip()


def _refuse(problem: str) -> None:
    raise UserError(problem)


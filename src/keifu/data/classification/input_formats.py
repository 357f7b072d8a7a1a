"""GPT-1's input transformations: a task's texts as token sequences with start, delimiter and extract tokens.

Radford et al. (2018), figure 1 and section 3.3:

    classification   start text extract
    entailment       start premise delimiter hypothesis extract
    similarity       start first delimiter second extract, and start second delimiter first extract
    choice           start context delimiter answer extract, for each answer

The texts come from the columns of a .csv, .tsv or .jsonl table, or from a catalogue entry that has labels.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, processors

from keifu.data.classification.examples import Example, Examples
from keifu.data.classification.tables import table_rows
from keifu.data.records import Row, cell, content
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError, require_known

Ids = list[int]
START, DELIMITER, EXTRACT = TOKENS = "_start_", "_delimiter_", "_classify_"  # as the released code calls them


class Delimiters(NamedTuple):
    """The ids before, between and after the parts of a sequence; each may be none, one or several."""

    start: tuple[int, ...]
    delimiter: tuple[int, ...]
    extract: tuple[int, ...]

    def sequence(self, *parts: Sequence[int]) -> Ids:
        """Start, the parts with a delimiter between any two, extract."""
        rest = (token for part in parts[1:] for token in (*self.delimiter, *part))
        return [*self.start, *parts[0], *rest, *self.extract]


@dataclass(frozen=True)
class Form:
    """Layout of an example: its columns, and the sequences made of them.

    columns: the default names of its texts' columns. orders: from the number of its texts, which of
    them each sequence holds. answers: whether its label is the number of one of its texts.
    """

    name: str
    columns: tuple[str, ...]
    orders: Callable[[int], list[tuple[int, ...]]]
    answers: bool = False

    def sequences(self, texts: Sequence[Ids], marks: Delimiters, limit: int | None = None) -> list[Ids]:
        """Return the sequences of an example whose texts have these ids.

        limit: where one would have more tokens, its longest texts lose as many as needed from their ends.
        """
        return [self._sequence([texts[index] for index in order], marks, limit) for order in self.orders(len(texts))]

    def _sequence(self, parts: list[Ids], marks: Delimiters, limit: int | None) -> Ids:
        whole = marks.sequence(*parts)
        if limit is None or len(whole) <= limit:
            return whole
        room = limit - (len(whole) - sum(map(len, parts)))
        return marks.sequence(*(part[:kept] for part, kept in zip(parts, kept_lengths(parts, room), strict=True)))


def kept_lengths(parts: Sequence[Ids], room: int) -> list[int]:
    """Return the number of tokens that each part keeps, within a limit on their sum: longer parts are cut to equal
    lengths.

    What is left over when that does not come out even is not used, so that both orders of a pair are cut alike.
    """
    level, lengths = max(map(len, parts)), list(map(len, parts))
    while level and sum(min(length, level) for length in lengths) > room:
        level -= 1
    return [min(length, level) for length in lengths]


FORMS = {
    form.name: form
    for form in (
        Form("classification", ("text",), lambda texts: [(0,)]),
        Form("entailment", ("premise", "hypothesis"), lambda texts: [(0, 1)]),
        Form("similarity", ("first", "second"), lambda texts: [(0, 1), (1, 0)]),
        Form("choice", ("context", "answers"), lambda texts: [(0, n) for n in range(1, texts)], answers=True),
    )
}


def form_of(name: str) -> Form:
    """Return the form of that name; an unknown name is a `UserError` with the nearest one."""
    require_known("form", name, FORMS)
    return FORMS[name]


def add_delimiters(tokenizer: Tokenizer) -> tuple[Tokenizer, list[int]]:
    """Add start, delimiter and extract tokens to a tokenizer and return their ids; tokens that exist stay as they are.

    It puts them around a text and between two by itself, and pads with the start token where it had no other: so a
    sequence's last token that is no padding is always extract, which is where transformers reads its classes too.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    single, pair = f"{START} $A {EXTRACT}", f"{START} $A {DELIMITER} $B {EXTRACT}"
    vocabulary = backend.get_vocab()
    ids = [vocabulary[token] for token in TOKENS]
    given = list(zip(TOKENS, ids, strict=True))
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=given)
    special = {"pad_token": START} | tokenizer.special
    return tokenizer.replace(backend=backend, special=special), ids


def delimiters_of(tokenizer: Tokenizer, ids: Sequence[int | None]) -> Delimiters:
    """Return the marks of a model whose start, delimiter and extract tokens have these ids.

    Where there are none, its texts stand as the tokenizer itself makes them, with whatever it puts around them.
    """
    if ids[0] is None and ids[2] is None:
        bare, whole = tokenizer.encode("a"), tokenizer.encode("a", special=True)
        first = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
        return Delimiters(tuple(whole[:first]), (), tuple(whole[first + len(bare) :]))
    start, delimiter, extract = (() if token is None else (token,) for token in ids)
    return Delimiters(start, delimiter, extract)


def read_examples(
    source: str | Path, form: Form, columns: Sequence[str] = (), label: str = "label", encoding: str | None = None
) -> Examples:
    """Read the examples of a table (see `keifu.data.classification.tables.read`).

    columns: those of the texts, in the form's order; none: the form's own. Of a choice the last one holds a list of
    answers, or the second and all that follow hold an answer each; its label is the number of the right answer, counted
    from 0, or its letter from A on. A table that does not fit the form is a `UserError` that names line and column.
    """
    names, most = tuple(columns) or form.columns, None if form.answers else len(form.columns)
    if not len(form.columns) <= len(names) <= (most or len(names)):
        wanted = f"at least {len(form.columns)}" if form.answers else str(most)
        raise UserError(f"The form {form.name} has {wanted} columns of text ({', '.join(form.columns)}), not {names}.")
    rows = table_rows(source, encoding)
    _check_columns(rows[0], form, (*names, label), str(source))
    examples = (Example(where, _texts(where, cells, form, names), cell(where, cells, label)) for where, cells in rows)
    return Examples(str(source), tuple(_numbered(row) if form.answers else row for row in examples))


def examples_of(texts: Sequence[str], form: Form) -> Examples:
    """Return examples without labels from texts, whose parts have a tab between them where the form has several."""
    several, rows = len(form.columns) > 1, []
    for number, text in enumerate(texts, 1):
        where = f"Text {number} of {len(texts)}"
        parts = tuple(part.strip() for part in text.split("\t")) if several else (text,)
        least = len(form.columns) + form.answers
        if not all(parts) or len(parts) < least or (len(parts) > least and not form.answers):
            names = " and ".join((form.columns[0], "two answers or more") if form.answers else form.columns)
            raise UserError(f"{where} has {len(parts)} parts, and {form.name} needs {names}, a tab between any two.")
        rows.append(Example(where, parts, ""))
    return Examples("", tuple(rows))


def _check_columns(first: Row, form: Form, names: Sequence[str], source: str) -> None:
    """Say so where a table lacks a column of this form and has those of another."""
    where, cells = first
    missing = [name for name in names if name not in cells]
    fits = [other.name for other in FORMS.values() if {*other.columns, names[-1]} <= cells.keys()]
    if missing and fits and form.name not in fits:
        raise UserError(
            f"{where}: the form {form.name} needs the columns {', '.join(map(repr, names))}, and {source} has no "
            f"{' and no '.join(map(repr, missing))}: its columns are those of the form {' or '.join(fits)}."
        )


def _texts(where: str, cells: dict[str, Any], form: Form, names: Sequence[str]) -> tuple[str, ...]:
    if not form.answers or len(names) > 2:
        return tuple(cell(where, cells, name) for name in names)
    answers = _answers(where, content(where, cells, names[1]), names[1])
    return cell(where, cells, names[0]), *answers


def _answers(where: str, value: Any, name: str) -> list[str]:
    """Return the list in a cell: a JSON list, or one that is written as JSON in a CSV file."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: the column {name!r} is no JSON list: {error}.") from error
    if not isinstance(value, list):
        advice = "give a list, or name a column for each answer: --columns context first second"
        raise UserError(f"{where}: the column {name!r} holds {value!r} where a list of answers is needed; {advice}.")
    if len(value) < 2:
        raise UserError(f"{where}: the column {name!r} has {len(value)} answers, and there is a choice from two on.")
    return [cell(f"{where}, answer {n}", {name: answer}, name) for n, answer in enumerate(value)]


def _numbered(row: Example) -> Example:
    """Return the example with the number of the right answer, counted from 0, as its label."""
    count, label = len(row.texts) - 1, row.label
    letter = ord(label) - ord("A") if len(label) == 1 and label.isupper() and label.isascii() else None
    number = int(label) if label.isdecimal() else letter
    if number is None or number >= count:
        last = chr(ord("A") + count - 1)
        raise UserError(
            f"{row.where}: the label {label!r} names none of the {count} answers: give its number, from 0 to "
            f"{count - 1}, or its letter, from A to {last}."
        )
    return row._replace(label=str(number))

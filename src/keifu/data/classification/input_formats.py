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
START, DELIMITER, EXTRACT = TOKENS = "_start_", "_delimiter_", "_classify_"  # names of the released code


class Delimiters(NamedTuple):
    """Token ids before, between and after the texts of a sequence. Each may be none, one or several."""

    start: tuple[int, ...]
    delimiter: tuple[int, ...]
    extract: tuple[int, ...]

    def sequence(self, *parts: Sequence[int]) -> Ids:
        """Return start, the texts with a delimiter between any two, extract."""
        later_parts = (token for part in parts[1:] for token in (*self.delimiter, *part))
        return [*self.start, *parts[0], *later_parts, *self.extract]


@dataclass(frozen=True)
class Form:
    """Layout of an example: its columns, and the sequences built from them.

    columns: default names of the columns with texts. orders: function from the number of texts to the sequences; a
    sequence is a tuple of indices of texts. answers: whether the label is the index of one of the texts.
    """

    name: str
    columns: tuple[str, ...]
    orders: Callable[[int], list[tuple[int, ...]]]
    answers: bool = False

    def sequences(self, texts: Sequence[Ids], marks: Delimiters, limit: int | None = None) -> list[Ids]:
        """Return the sequences of an example from the token ids of its texts.

        limit: maximal length; the longest texts of a longer sequence lose tokens at their ends.
        """
        return [self._sequence([texts[index] for index in order], marks, limit) for order in self.orders(len(texts))]

    def _sequence(self, parts: list[Ids], marks: Delimiters, limit: int | None) -> Ids:
        full_sequence = marks.sequence(*parts)
        if limit is None or len(full_sequence) <= limit:
            return full_sequence
        room = limit - (len(full_sequence) - sum(map(len, parts)))
        return marks.sequence(*(part[:length] for part, length in zip(parts, kept_lengths(parts, room), strict=True)))


def kept_lengths(parts: Sequence[Ids], room: int) -> list[int]:
    """Return the number of tokens that each text keeps so that their sum is at most `room`. Longer texts are cut to
    equal lengths.

    A remainder is not used, so that both orders of a pair are cut equally.
    """
    level, lengths = max(map(len, parts)), list(map(len, parts))
    while level and sum(min(length, level) for length in lengths) > room:
        level -= 1
    return [min(length, level) for length in lengths]


FORMS = {
    "classification": Form("classification", ("text",), lambda texts: [(0,)]),
    "entailment": Form("entailment", ("premise", "hypothesis"), lambda texts: [(0, 1)]),
    "similarity": Form("similarity", ("first", "second"), lambda texts: [(0, 1), (1, 0)]),
    "choice": Form("choice", ("context", "answers"), lambda texts: [(0, n) for n in range(1, texts)], answers=True),
}


def form_of(name: str) -> Form:
    """Return the form of that name. Raises `UserError`, with the nearest name, if it is unknown."""
    require_known("form", name, FORMS)
    return FORMS[name]


def add_delimiters(tokenizer: Tokenizer) -> tuple[Tokenizer, list[int]]:
    """Add start, delimiter and extract tokens to a tokenizer. Return it and the ids of new tokens; existing tokens are
    kept.

    The tokenizer then adds them around and between texts. It pads with the start token if it had no padding token. So
    the last token that is not padding is always extract, which is where transformers reads its classes.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TOKENS])
    single, pair = f"{START} $A {EXTRACT}", f"{START} $A {DELIMITER} $B {EXTRACT}"
    vocabulary = backend.get_vocab()
    ids = [vocabulary[token] for token in TOKENS]
    special_tokens = list(zip(TOKENS, ids, strict=True))
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special_tokens)
    return tokenizer.replace(backend=backend, special={"pad_token": START} | tokenizer.special), ids


def delimiters_of(tokenizer: Tokenizer, ids: Sequence[int | None]) -> Delimiters:
    """Return the delimiters of a model with these ids of start, delimiter and extract.

    A missing id gives no token there; the tokenizer may still add its special tokens around a text.
    """
    if ids[0] is None and ids[2] is None:
        bare, encoded = tokenizer.encode("a"), tokenizer.encode("a", special=True)
        first = next((n for n in range(len(encoded)) if encoded[n : n + len(bare)] == bare), 0)
        return Delimiters(tuple(encoded[:first]), (), tuple(encoded[first + len(bare) :]))
    start, delimiter, extract = (() if token is None else (token,) for token in ids)
    return Delimiters(start, delimiter, extract)


def read_examples(
    source: str | Path, form: Form, columns: Sequence[str] = (), label: str = "label", encoding: str | None = None
) -> Examples:
    """Read the examples of a table (see `keifu.data.classification.tables.read`).

    columns: those of the texts, in the form's order; empty: the form's names. In a choice the last column contains a
    list of answers, or each column from the second on contains one answer. The label of a choice is the index of the
    right answer from 0, or its letter from A. Raises `UserError`, with line and column, for a table that does not fit
    the form.
    """
    names, most = tuple(columns) or form.columns, None if form.answers else len(form.columns)
    if not len(form.columns) <= len(names) <= (most or len(names)):
        allowed_columns = f"at least {len(form.columns)}" if form.answers else str(most)
        raise UserError(
            f"The form {form.name} has {allowed_columns} columns of text ({', '.join(form.columns)}), not {names}."
        )
    rows = table_rows(source, encoding)
    _check_columns(rows[0], form, (*names, label), str(source))
    examples = (Example(where, _texts(where, cells, form, names), cell(where, cells, label)) for where, cells in rows)
    return Examples(str(source), tuple(_numbered(row) if form.answers else row for row in examples))


def examples_of(texts: Sequence[str], form: Form) -> Examples:
    """Return examples without labels. If the form has several texts, each input is split at tabs."""
    has_several_texts, rows = len(form.columns) > 1, []
    for number, text in enumerate(texts, 1):
        where = f"Text {number} of {len(texts)}"
        parts = tuple(part.strip() for part in text.split("\t")) if has_several_texts else (text,)
        least = len(form.columns) + form.answers
        if not all(parts) or len(parts) < least or (len(parts) > least and not form.answers):
            names = " and ".join((form.columns[0], "two answers or more") if form.answers else form.columns)
            raise UserError(f"{where} has {len(parts)} parts, and {form.name} needs {names}, a tab between any two.")
        rows.append(Example(where, parts, ""))
    return Examples("", tuple(rows))


def _check_columns(first: Row, form: Form, names: Sequence[str], source: str) -> None:
    """Raise `UserError` if a table lacks a column of this form but has the columns of another form."""
    where, cells = first
    missing_columns = [name for name in names if name not in cells]
    fits = [other.name for other in FORMS.values() if {*other.columns, names[-1]} <= cells.keys()]
    if missing_columns and fits and form.name not in fits:
        requirement = f"the form {form.name} needs the columns {', '.join(map(repr, names))}"
        lacking = f"{source} has no {' and no '.join(map(repr, missing_columns))}"
        raise UserError(
            f"{where}: {requirement}, and {lacking}: its columns are those of the form {' or '.join(fits)}."
        )


def _texts(where: str, cells: dict[str, Any], form: Form, names: Sequence[str]) -> tuple[str, ...]:
    if not form.answers or len(names) > 2:
        return tuple(cell(where, cells, name) for name in names)
    answers = _answers(where, content(where, cells, names[1]), names[1])
    return cell(where, cells, names[0]), *answers


def _answers(where: str, value: Any, name: str) -> list[str]:
    """Return the list in a cell: a JSON list, or a string with a JSON list in a CSV file."""
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
    """Return the example with its label as an index of the right answer, from 0."""
    count, label = len(row.texts) - 1, row.label
    letter = ord(label) - ord("A") if len(label) == 1 and label.isupper() and label.isascii() else None
    number = int(label) if label.isdecimal() else letter
    if number is None or number >= count:
        last = chr(ord("A") + count - 1)
        ways = f"give its number, from 0 to {count - 1}, or its letter, from A to {last}"
        raise UserError(f"{row.where}: the label {label!r} names none of the {count} answers: {ways}.")
    return row._replace(label=str(number))

"""Tables of examples in one of the forms that decoders are fine-tuned on; it knows no tokens and no model.

The texts come from the columns of a .csv, .tsv or .jsonl table, or from a catalogue entry that has labels.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from keifu.data.forms import FORMS, Form
from keifu.data.labelled import key, parted, sorted_labels, table_rows
from keifu.data.records import Row, cell, content
from keifu.errors import UserError


class Example(NamedTuple):
    """Where an example stands, for errors, its texts and its label: of a choice, the number of the right answer."""

    where: str
    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Examples:
    """Examples of one form, and where they come from."""

    source: str
    form: Form
    rows: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def classes(self) -> tuple[str, ...]:
        """Every label once, in order; numbers by their value."""
        return sorted_labels(row.label for row in self.rows)

    def chosen(self, places: Iterable[int]) -> "Examples":
        """Some of the rows."""
        return Examples(self.source, self.form, tuple(self.rows[place] for place in places))

    def split(self, held_out: int) -> tuple["Examples", "Examples"]:
        """Rows to learn from and at most `held_out` others, by a hash of the first text: what shares it stays together.

        Premises come with several hypotheses, contexts with several questions.
        """
        keys, labels = [key(row.texts[0]) for row in self.rows], [row.label for row in self.rows]
        training, held = parted(keys, labels, held_out)
        return self.chosen(training), self.chosen(held)


def read_examples(source: str | Path, form: Form, columns: Sequence[str] = (), label: str = "label") -> Examples:
    """The examples of a table (see `keifu.data.labelled.read`).

    columns: those of the texts, in the form's order; none: the form's own. Of a choice the last one holds a list of
    answers, or the second and all that follow hold an answer each; its label is the number of the right answer, counted
    from 0, or its letter from A on. A table that does not fit the form is a `UserError` that names line and column.
    """
    names, most = tuple(columns) or form.columns, None if form.answers else len(form.columns)
    if not len(form.columns) <= len(names) <= (most or len(names)):
        wanted = f"at least {len(form.columns)}" if form.answers else str(most)
        raise UserError(f"The form {form.name} has {wanted} columns of text ({', '.join(form.columns)}), not {names}.")
    rows = table_rows(source)
    _check_columns(rows[0], form, (*names, label), str(source))
    found = (Example(where, _texts(where, cells, form, names), cell(where, cells, label)) for where, cells in rows)
    return Examples(str(source), form, tuple(_numbered(row) if form.answers else row for row in found))


def examples_of(texts: Sequence[str], form: Form) -> Examples:
    """Examples without labels from texts, whose parts have a tab between them where the form has several."""
    several, rows = len(form.columns) > 1, []
    for number, text in enumerate(texts, 1):
        where = f"Text {number} of {len(texts)}"
        parts = tuple(part.strip() for part in text.split("\t")) if several else (text,)
        least = len(form.columns) + form.answers
        if not all(parts) or len(parts) < least or (len(parts) > least and not form.answers):
            names = " and ".join((form.columns[0], "two answers or more") if form.answers else form.columns)
            raise UserError(f"{where} has {len(parts)} parts, and {form.name} needs {names}, a tab between any two.")
        rows.append(Example(where, parts, ""))
    return Examples("", form, tuple(rows))


def _check_columns(first: Row, form: Form, names: Sequence[str], source: str) -> None:
    """Says so where a table lacks a column of this form and has those of another."""
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
    """The list in a cell: JSON's own, or one written as JSON in a CSV."""
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
    """The same with the number of the right answer, counted from 0, for its label."""
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

"""A task of one's own from files: a small YAML or JSON description beside its items; knows no model.

docs/tasks.md has the format with an example. What is missing or of the wrong kind is a `UserError` that names the file,
the line and the field.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keifu.data.records import SUFFIXES as TABLES
from keifu.data.records import Row, listed, read_records
from keifu.errors import UserError, unknown
from keifu.evaluation.prompts import Item, Task

SUFFIXES = (".yaml", ".yml", ".json")
TEXTS = ("instruction", "delimiter", "separator", "unconditional", "metric", "score", "note")
KINDS: dict[str, Any] = {
    **dict.fromkeys(("name", "items", "prompt", "answer", "demonstrations", *TEXTS), str),
    "choices": (str, list), "until": (str, list), "max_tokens": int,
}  # fmt: skip
NEEDED = ("items", "prompt", "answer")
SLOT = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def is_task(path: Path) -> bool:
    """Whether a file describes a task, by its suffix and by one of the fields that a task needs."""
    if path.suffix not in SUFFIXES or not path.is_file():
        return False
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return any(_field(name, text) for name in NEEDED)


def _field(name: str, text: str) -> re.Match[str] | None:
    """Where a field of the description stands in it."""
    return re.search(rf"^[ \t{{,\"']*{re.escape(name)}[\"']?\s*:", text, re.MULTILINE)


def read_task(path: Path) -> Task:
    """The task that a file describes."""
    fields = _Description(path)
    items = [*_items(fields, fields.file("items"))]
    demonstrations = [*_items(fields, fields.file("demonstrations"))] if "demonstrations" in fields.given else None
    if not items:
        raise UserError(f"{fields.file('items')} has no items.")
    settings = {name: fields.given[name] for name in (*TEXTS, "max_tokens") if name in fields.given}
    if "until" in fields.given:
        settings["until"] = tuple(fields.texts("until"))
    settings.setdefault("metric", "choice" if "choices" in fields.given else "exact")
    examples = None if demonstrations is None else tuple(demonstrations)
    try:
        return Task(fields.given.get("name", path.stem), tuple(items), examples, **settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _Description:
    """The fields of a description, each of its kind, and the lines that they stand in."""

    def __init__(self, path: Path):
        self.path = path
        self.text = path.read_text(encoding="utf-8-sig")
        self.given = self._parsed()
        for name, value in self.given.items():
            if name not in KINDS:
                raise unknown(f"field of a task (in {self.place(name)})", str(name), KINDS)
            if not isinstance(value, KINDS[name]) or isinstance(value, bool):
                raise UserError(f"{self.place(name)}: {name!r} is {_kind(value)}, which it cannot be.")
        for name in NEEDED:
            if name not in self.given:
                has = ", ".join(map(str, self.given)) or "nothing"
                raise UserError(f"{path}, line 1: the task has no field {name!r}, which it needs; it has {has}.")

    def _parsed(self) -> dict[str, Any]:
        try:
            found = json.loads(self.text) if self.path.suffix == ".json" else _yaml(self.text)
        except ValueError as error:
            raise UserError(f"{self.path} cannot be read: {' '.join(str(error).split())}.") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.path} is {_kind(found)}, but a task is fields with values (see docs/tasks.md).")
        return found

    def place(self, name: str) -> str:
        """The file, and the line in which the field stands."""
        found = _field(str(name), self.text)
        return f"{self.path}, line {self.text.count(chr(10), 0, found.start()) + 1 if found else 1}"

    def texts(self, name: str) -> list[str]:
        """A field that is one text or several."""
        value = self.given[name]
        values = [value] if isinstance(value, str) else value
        if not values or not all(isinstance(each, str) and each for each in values):
            raise UserError(f"{self.place(name)}: {name!r} must be texts of a character or more, not {value!r}.")
        return values

    def file(self, name: str) -> Path:
        """The table that a field names, found from the folder of the description."""
        path = self.path.parent / self.given[name]
        if not path.is_file():
            near = [str(each.relative_to(self.path.parent)) for each in self.path.parent.glob("*")]
            raise unknown(f"file for {name!r} (in {self.place(name)})", self.given[name], near)
        if path.suffix.lower() not in TABLES:
            raise UserError(f"{self.place(name)}: the name of {path} must end in {', '.join(TABLES)}.")
        return path


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _items(fields: _Description, path: Path) -> Iterator[Item]:
    """An item a row of the table."""
    template, answer, choices = (fields.given.get(name) for name in ("prompt", "answer", "choices"))
    assert isinstance(template, str) and isinstance(answer, str)
    for row in read_records(path):
        prompt = _filled(template, row, fields.place("prompt"))
        if choices is None:
            answers = _texts(row, answer, fields.place("answer"))
            yield Item(prompt, answers[0], (), tuple(answers[1:]))
            continue
        offered = (
            fields.texts("choices") if isinstance(choices, list) else _texts(row, choices, fields.place("choices"))
        )
        yield Item(prompt, _right(row, answer, offered, fields.place("answer")), tuple(offered))


def _filled(template: str, row: Row, used: str) -> str:
    """The template with the row's fields in its slots; {{ and }} are braces."""

    def slot(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0][0]
        value = _value(row, found[1], used)
        if isinstance(value, dict | list) or value is None:
            raise UserError(f"{row[0]}: the field {found[1]!r} is {_kind(value)}, and the prompt needs text.")
        return str(value)

    return SLOT.sub(slot, template)


def _value(row: Row, name: str, used: str) -> Any:
    where, cells = row
    if name not in cells:
        raise UserError(f"{where}: there is no field {name!r}, which {used} names; it has {listed(cells)}.")
    return cells[name]


def _texts(row: Row, name: str, used: str) -> list[str]:
    """A field with one text, or a list of them (in a table without lists, written as JSON)."""
    value = _value(row, name, used)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _quietly(json.loads, value)
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(each, dict | list) or str(each or "") == "" and each != 0 for each in values):
        raise UserError(f"{row[0]}: the field {name!r} is {value!r}, and {used} needs text, or a list of texts.")
    return [str(each) for each in values]


def _right(row: Row, name: str, choices: list[str], used: str) -> str:
    """The right choice, from its text or from its number, which counts from 0."""
    value = _value(row, name, used)
    if str(value) in choices:
        return str(value)
    number = value if isinstance(value, int) else _quietly(int, str(value))
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(choices):
        return choices[number]
    raise UserError(f"{row[0]}: the field {name!r} is {value!r}, which is none of the choices {choices} nor a number "
                    f"from 0 to {len(choices) - 1}.")  # fmt: skip


def _quietly(function: Callable[[str], Any], text: str) -> Any:
    """What the function makes of the text; the text itself where it cannot."""
    try:
        return function(text)
    except ValueError:
        return text


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "nothing")

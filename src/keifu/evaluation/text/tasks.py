"""Few-shot tasks: items and demonstrations as prompts, the built-in tasks, and tasks from files.

Demonstrations are whole items with their answers (Brown et al., 2020, section 2: zero-, one- and few-shot). Weights do
not change. The demonstrations are sampled once by a seed and are the same before every item, so that a model reads them
once.

Built-in tasks come from the catalogue or from a rule, the same at every call: topics and titles of Wikipedia articles,
last words of speeches, arithmetic. A user's task is a small YAML or JSON description with a file of items;
docs/tasks.md describes the format. A missing or wrong field raises a `UserError` that names the file, the line and the
field.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from keifu.data.catalogue import catalogue
from keifu.data.catalogue.readers import HELD_OUT_ARTICLES
from keifu.data.classification.examples import Examples
from keifu.data.classification.tables import read
from keifu.data.records import SUFFIXES as TABLES, Row, listed, read_records
from keifu.errors import UserError, require_known, unknown
from keifu.untrusted import parse_json, parse_yaml, read_text, reading

# choice: the likeliest of several answers, by four measures of likelihood. exact: a written answer that is one of the
# accepted ones when both are normalised. cloze: an answer each of whose tokens is the likeliest one.
METRICS = ("choice", "exact", "cloze")
# sum: ln P of the answer. token: ln P per token. character: ln P per character, as lm-evaluation-harness's acc_norm.
# unconditional: ln P(answer | prompt) / P(answer | unconditional).
SCORES = ("sum", "token", "character", "unconditional")


class TaskItem(NamedTuple):
    """Question, as text of the prompt, and its answer. choices: the answer among others, or empty. accepted: other
    correct answers, if the answer is generated."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()

    @property
    def right(self) -> int:
        """Index of the answer among the choices."""
        return self.choices.index(self.answer)


@dataclass(frozen=True)
class FewShotTask:
    """Items, and the format of their prompts.

    demonstrations: pool of few-shot examples; None: the items, and those used as examples are not evaluated.
    instruction: text before everything. delimiter: between a prompt and its answer. separator: between an example and
    the next text. unconditional: the prompt for an answer's unconditional likelihood. metric, score: those of `METRICS`
    and `SCORES` whose figure is the headline. until: strings that end a generated answer, of at most `max_tokens`
    tokens. note: a sentence that a reader of the figures must know.
    """

    name: str
    items: tuple[TaskItem, ...]
    demonstrations: tuple[TaskItem, ...] | None = None
    instruction: str = ""
    delimiter: str = " "
    separator: str = "\n\n"
    unconditional: str = "Answer:"
    metric: str = "choice"
    score: str = "sum"
    until: tuple[str, ...] = ("\n",)
    max_tokens: int = 32
    note: str = ""

    def __post_init__(self) -> None:
        for field_name, value, known_names in (("metric", self.metric, METRICS), ("score", self.score, SCORES)):
            require_known(f"{field_name} of a task", value, known_names)
        if self.metric == "choice" and not all(item.choices for item in self.items):
            raise UserError(f"{self.name} has no choices to choose from: evaluate it with the metric exact or cloze.")

    def sample(self, most: int, seed: int = 0, limit: int | None = None) -> "SampledItem":
        """Sample up to `most` examples, in random order, and the items to evaluate, at most `limit`.

        If the task has no demonstrations, examples come from the items beyond the limit if there are enough, else from
        all items. No item is its own example. Raises `UserError` for fewer than `most`.
        """
        items, pool = self.items[:limit], self.demonstrations
        if pool is None:
            spare = self.items[len(items) :]
            pool = spare if len(spare) >= most else self.items
        prompts = {item.prompt for item in items} if pool is not self.items else set()
        able = [item for item in pool if item.prompt not in prompts]
        if most > len(able) or (pool is self.items and most and most >= len(able)):
            condition = "" if pool is not self.items else ", and at least one must be left to evaluate"
            raise UserError(
                f"{most} shots were requested, but {self.name} has {len(able)} items to draw from{condition}."
            )
        examples = sorted(able, key=lambda item: _key(seed, item))[:most]
        if pool is self.items:
            items = tuple(item for item in self.items if item not in examples)[:limit]
        return SampledItem(self, examples, items)


class SampledItem(NamedTuple):
    """Few-shot examples of a task, and the items to evaluate."""

    task: FewShotTask
    examples: Sequence[TaskItem]
    items: Sequence[TaskItem]

    def prompts(self, shots: int) -> list[str]:
        """Return the whole prompt of each item, with the first `shots` examples before it."""
        task = self.task
        shot_texts = [f"{example.prompt}{task.delimiter}{example.answer}" for example in self.examples[:shots]]
        front = "".join(part + task.separator for part in [task.instruction, *shot_texts] if part)
        return [front + item.prompt for item in self.items]


def _key(seed: int, item: TaskItem) -> bytes:
    """Hash an item, for a pseudorandom order that does not depend on the order of the items."""
    return hashlib.blake2b(json.dumps([seed, item.prompt, item.answer]).encode(), digest_size=16).digest()


WORDS = 60  # words of an article in a prompt
INSTANCES = 2000  # number of items of each kind of arithmetic (section 3.9.1)
EXAMPLES = 200  # number of further items for demonstrations


def topics() -> FewShotTask:
    """Return the task of naming the topic, one of 12, of a Wikipedia article from the first 60 words of its title and
    summary."""
    learned, validation = read("wiki-summaries").split(HELD_OUT_ARTICLES)

    def items(table: Examples) -> tuple[TaskItem, ...]:
        beginnings = (" ".join(text.split()[:WORDS]) for text in table.texts)
        pairs = zip(beginnings, table.labels, strict=True)
        return tuple(TaskItem(f"Article: {text}\nTopic:", topic, learned.classes) for text, topic in pairs)

    return FewShotTask("topics", items(validation), items(learned), unconditional="Topic:")


def titles() -> FewShotTask:
    """Return the task of choosing the article's title for a short description, among four of one topic chosen by a
    hash."""
    content = json.loads(catalogue.fetch("wiki-summaries").read_text(encoding="utf-8"))
    by_topic: dict[str, list[str]] = defaultdict(list)
    for title, article in content.items():
        by_topic[article["topic"]].append(title)
    by_key: dict[str, TaskItem] = {}
    for title, article in content.items():
        about, key = article.get("description") or "", hashlib.sha256(title.encode()).hexdigest()
        if len(about) > 9 and title.lower() not in about.lower():
            draw = Random(int(key, 16))
            wrong = draw.sample([other for other in by_topic[article["topic"]] if other != title], 3)
            by_key[key] = TaskItem(f"Description: {about}\nTitle:", title, tuple(draw.sample([title, *wrong], 4)))
    items = tuple(by_key[key] for key in sorted(by_key))
    return FewShotTask("titles", items[:HELD_OUT_ARTICLES], items[HELD_OUT_ARTICLES:], unconditional="Title:")


def last_word() -> FewShotTask:
    """Return the task of predicting the last word of a passage from the presidents' speeches. As in LAMBADA (Paperno et
    al., 2016), a passage has at least 40 words, and its last word also occurs earlier in it."""
    passages = dict.fromkeys(passage for speech in catalogue.documents("sotu") for passage in _passages(speech))
    unordered = (TaskItem(before, word) for before, word in passages)
    items = tuple(sorted(unordered, key=lambda item: hashlib.sha256(item.prompt.encode()).digest()))
    note = "The passages are of the catalogue's sotu: a model that was trained on it has read them."
    return FewShotTask("last-word", items[:HELD_OUT_ARTICLES], items[HELD_OUT_ARTICLES:], metric="cloze", note=note)


def _passages(speech: str) -> Iterator[tuple[str, str]]:
    """Yield at most one passage of each paragraph: (all words but the last, the last word)."""
    for paragraph in speech.split("\n"):
        for end in re.finditer(r" ([a-z]{4,})[.?!]+(?= |$)", paragraph):
            before = paragraph[: end.start()]
            if 40 <= len(before.split()) <= 120 and re.search(rf"\b{end[1]}\b", before):
                yield before, end[1]
                break


OPERATIONS = {  # (word, sign, function) of each
    "addition": ("plus", "+", int.__add__),
    "subtraction": ("minus", "-", int.__sub__),
    "multiplication": ("times", "*", int.__mul__),
}


def arithmetic(digits: int, operation: str) -> FewShotTask:
    """Return questions such as "Q: What is 48 plus 76?" with uniformly sampled numbers from 0 on (GPT-3, section
    3.9.1)."""
    word, _, compute = OPERATIONS[operation]

    def question(draw: Random) -> TaskItem:
        a, b = draw.randrange(10**digits), draw.randrange(10**digits)
        return TaskItem(f"Q: What is {a} {word} {b}?\nA:", str(compute(a, b)))

    return _generated(f"{digits}-digit-{operation}", question)


def composite_arithmetic() -> FewShotTask:
    """Return questions such as "Q: What is 6+(4*8)?": three single digits, the last two in brackets (section 3.9.1)."""
    compute = {sign: function for _, sign, function in OPERATIONS.values()}

    def question(draw: Random) -> TaskItem:
        (a, b, c), (first, second) = [draw.randrange(10) for _ in range(3)], draw.choices("+-*", k=2)
        return TaskItem(f"Q: What is {a}{first}({b}{second}{c})?\nA:", str(compute[first](a, compute[second](b, c))))

    return _generated("1-digit-composite", question)


def _generated(name: str, question: Callable[[Random], TaskItem]) -> FewShotTask:
    """Return distinct questions, always the same. The first are the items, the others the demonstrations."""
    draw, items = Random(name), dict[TaskItem, None]()
    while len(items) < INSTANCES + EXAMPLES:
        items[question(draw)] = None
    every = tuple(items)
    return FewShotTask(name, every[:INSTANCES], every[INSTANCES:], metric="exact", max_tokens=16)


ARITHMETIC = *product((2, 3, 4, 5), ("addition", "subtraction")), (2, "multiplication")
TASKS: dict[str, Callable[[], FewShotTask]] = {
    "topics": topics,
    "titles": titles,
    "last-word": last_word,
    **{f"{digits}-digit-{name}": partial(arithmetic, digits, name) for digits, name in ARITHMETIC},
    "1-digit-composite": composite_arithmetic,
}


SUFFIXES = (".yaml", ".yml", ".json")
TEXTS = ("instruction", "delimiter", "separator", "unconditional", "metric", "score", "note")
KINDS: dict[str, Any] = {
    **dict.fromkeys(("name", "items", "prompt", "answer", "demonstrations", *TEXTS), str),
    "choices": (str, list), "until": (str, list), "max_tokens": int,
}  # fmt: skip
NEEDED = ("items", "prompt", "answer")
SLOT = re.compile(r"\{\{|\}\}|\{(\w+)\}")


def is_task(path: Path) -> bool:
    """Return whether a file describes a task: by its suffix, and by a field that every task has."""
    if path.suffix not in SUFFIXES or not path.is_file():
        return False
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return any(_field(name, text) for name in NEEDED)


def _field(name: str, text: str) -> re.Match[str] | None:
    """Return the position of a field in the description."""
    return re.search(rf"^[ \t{{,\"']*{re.escape(name)}[\"']?\s*:", text, re.MULTILINE)


def read_task(path: Path) -> FewShotTask:
    """Read the task that a file describes."""
    with reading(path):
        fields = _Description(path)
        items = tuple(_items(fields, "items"))
    examples = tuple(_items(fields, "demonstrations")) if "demonstrations" in fields.content else None
    if not items:
        raise UserError(f"{fields.file('items')} has no items.")
    settings = {name: fields.content[name] for name in (*TEXTS, "max_tokens") if name in fields.content}
    if "until" in fields.content:
        settings["until"] = tuple(fields.texts("until"))
    settings.setdefault("metric", "choice" if "choices" in fields.content else "exact")
    try:
        return FewShotTask(fields.content.get("name", path.stem), items, examples, **settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _Description:
    """Fields of a description, with their types checked, and the lines in which they are."""

    def __init__(self, path: Path):
        self.path = path
        self.text = read_text(path)
        parse = parse_json if path.suffix == ".json" else parse_yaml
        self.content: dict[str, Any] = parse(self.text, path)
        if not isinstance(self.content, dict):
            raise UserError(f"{path} is {_kind(self.content)}, but a task is fields with values (see docs/tasks.md).")
        for name, value in self.content.items():
            require_known(f"field of a task (in {self.place(name)})", name, KINDS)
            if not isinstance(value, KINDS[name]) or isinstance(value, bool):
                raise UserError(f"{self.place(name)}: {name!r} is {_kind(value)}, which it cannot be.")
        for name in NEEDED:
            if name not in self.content:
                has = ", ".join(map(str, self.content)) or "nothing"
                raise UserError(f"{path}, line 1: the task has no field {name!r}, which it needs; it has {has}.")

    def place(self, name: str) -> str:
        """Return the file and line of a field, for errors."""
        match = _field(str(name), self.text)
        return f"{self.path}, line {self.text.count(chr(10), 0, match.start()) + 1 if match else 1}"

    def texts(self, name: str) -> list[str]:
        """Return a field that is one text or a list of texts as a list."""
        value = self.content[name]
        values = [value] if isinstance(value, str) else value
        if not values or not all(isinstance(text, str) and text for text in values):
            raise UserError(f"{self.place(name)}: {name!r} must be texts of a character or more, not {value!r}.")
        return values

    def file(self, name: str) -> Path:
        """Return the path of the table that a field names, relative to the description's folder."""
        path = self.path.parent / self.content[name]
        if not path.is_file():
            near = [str(file.relative_to(self.path.parent)) for file in self.path.parent.glob("*")]
            raise unknown(f"file for {name!r} (in {self.place(name)})", self.content[name], near)
        if path.suffix.lower() not in TABLES:
            raise UserError(f"{self.place(name)}: the name of {path} must end in {', '.join(TABLES)}.")
        return path


def _items(fields: _Description, name: str) -> Iterator[TaskItem]:
    """Yield an item for each row of the table that a field names."""
    template, answer, choices = fields.content["prompt"], fields.content["answer"], fields.content.get("choices")
    for row in read_records(fields.file(name)):
        prompt = _fill_template(template, row, fields.place("prompt"))
        if choices is None:
            answers = _texts(row, answer, fields.place("answer"))
            yield TaskItem(prompt, answers[0], (), tuple(answers[1:]))
            continue
        column = isinstance(choices, str)
        offered = _texts(row, choices, fields.place("choices")) if column else fields.texts("choices")
        yield TaskItem(prompt, _right(row, answer, offered, fields.place("answer")), tuple(offered))


def _fill_template(template: str, row: Row, field_use: str) -> str:
    """Insert the row's fields into the template. {{ and }} are braces."""

    def slot(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        value = _value(row, match[1], field_use)
        if isinstance(value, dict | list) or value is None:
            raise UserError(f"{row[0]}: the field {match[1]!r} is {_kind(value)}, and the prompt needs text.")
        return str(value)

    return SLOT.sub(slot, template)


def _value(row: Row, name: str, field_use: str) -> Any:
    where, cells = row
    if name not in cells:
        raise UserError(f"{where}: there is no field {name!r}, which {field_use} names; it has {listed(cells)}.")
    return cells[name]


def _texts(row: Row, name: str, field_use: str) -> list[str]:
    """Return a field with one text, or with a list of texts (written as JSON in a table without lists)."""
    value = _value(row, name, field_use)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _quietly(json.loads, value)
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(item, dict | list) or str(item or "") == "" and item != 0 for item in values):
        raise UserError(f"{row[0]}: the field {name!r} is {value!r}, and {field_use} needs text, or a list of texts.")
    return [str(item) for item in values]


def _right(row: Row, name: str, choices: list[str], field_use: str) -> str:
    """Return the right choice, from its text or from its number, which counts from 0."""
    value = _value(row, name, field_use)
    if str(value) in choices:
        return str(value)
    number = value if isinstance(value, int) else _quietly(int, str(value))
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(choices):
        return choices[number]
    raise UserError(f"{row[0]}: the field {name!r} is {value!r}, which is none of the choices {choices} nor a number "
                    f"from 0 to {len(choices) - 1}.")  # fmt: skip


def _quietly(function: Callable[[str], Any], text: str) -> Any:
    """Return function(text), or the text itself if the function fails."""
    with suppress(ValueError):
        return function(text)
    return text


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "a truth value", int: "a number",
            float: "a number"}.get(type(value), "nothing")  # fmt: skip

"""Tasks that need no file: topics and titles of Wikipedia articles, last words of speeches, arithmetic; knows no model.

Each is a function that makes it from the catalogue or from a rule, the same at every call.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import NamedTuple

from keifu.data import catalogue
from keifu.data.labelled import Labelled, read, split
from keifu.evaluation.prompts import Item, Task

HELD_OUT = 1000  # articles, chosen by a hash of their text as in the benchmark of classifiers
WORDS = 60  # of an article that a prompt shows
INSTANCES = 2000  # of each kind of arithmetic (section 3.9.1)
EXAMPLES = 200  # others, to draw demonstrations from


def topics() -> Task:
    """Which of 12 topics a Wikipedia article has, from the first 60 words of its title and summary."""
    learned, held = split(read("wiki-summaries"), HELD_OUT)
    labels = learned.classes

    def items(table: Labelled) -> tuple[Item, ...]:
        shown = (" ".join(text.split()[:WORDS]) for text in table.texts)
        pairs = zip(shown, table.labels, strict=True)
        return tuple(Item(f"Article: {text}\nTopic:", topic, labels) for text, topic in pairs)

    return Task("topics", items(held), items(learned), unconditional="Topic:")


class _Article(NamedTuple):
    title: str
    description: str
    topic: str

    @property
    def key(self) -> str:
        return hashlib.sha256(self.title.encode()).hexdigest()


def titles() -> Task:
    """Which of four articles of one topic a short description belongs to; the other three are drawn by a hash."""
    content = json.loads(catalogue.fetch("wiki-summaries").read_text(encoding="utf-8"))
    articles = [_Article(title, each.get("description") or "", each["topic"]) for title, each in content.items()]
    by_topic: dict[str, list[str]] = defaultdict(list)
    for article in articles:
        by_topic[article.topic].append(article.title)
    clear = [
        each for each in articles if len(each.description) > 9 and each.title.lower() not in each.description.lower()
    ]
    items = [_title_item(each, by_topic[each.topic]) for each in sorted(clear, key=lambda each: each.key)]
    return Task("titles", tuple(items[:HELD_OUT]), tuple(items[HELD_OUT:]), unconditional="Title:")


def _title_item(article: _Article, others: list[str]) -> Item:
    draw = Random(int(article.key, 16))
    wrong = draw.sample([title for title in others if title != article.title], 3)
    choices = draw.sample([article.title, *wrong], 4)
    return Item(f"Description: {article.description}\nTitle:", article.title, tuple(choices))


def last_word() -> Task:
    """The last word of a passage of 40 words or more that names it before, as in LAMBADA (Paperno et al., 2016), from
    the presidents' speeches."""
    passages = dict.fromkeys(each for speech in catalogue.documents("sotu") for each in _passages(speech))
    items = [Item(before, word) for before, word in passages]
    items.sort(key=lambda item: hashlib.sha256(item.prompt.encode()).digest())
    note = "The passages are of the catalogue's sotu: a model that was trained on it has read them."
    return Task("last-word", tuple(items[:HELD_OUT]), tuple(items[HELD_OUT:]), metric="cloze", note=note)


def _passages(speech: str) -> Iterator[tuple[str, str]]:
    """At most one passage of each paragraph: its words but the last one, and that."""
    for paragraph in speech.split("\n"):
        for end in re.finditer(r" ([a-z]{4,})[.?!]+(?= |$)", paragraph):
            before = paragraph[: end.start()]
            if 40 <= len(before.split()) <= 120 and re.search(rf"\b{end[1]}\b", before):
                yield before, end[1]
                break


OPERATIONS = {
    "addition": ("plus", int.__add__),
    "subtraction": ("minus", int.__sub__),
    "multiplication": ("times", int.__mul__),
}


def arithmetic(digits: int, operation: str) -> Task:
    """Questions such as "Q: What is 48 plus 76?", with numbers from 0 on, drawn evenly (GPT-3, section 3.9.1)."""
    word, compute = OPERATIONS[operation]

    def question(draw: Random) -> Item:
        a, b = draw.randrange(10**digits), draw.randrange(10**digits)
        return Item(f"Q: What is {a} {word} {b}?\nA:", str(compute(a, b)))

    return _generated(f"{digits}-digit-{operation}", question)


def composite() -> Task:
    """Questions such as "Q: What is 6+(4*8)?": three single digits, the last two in brackets (section 3.9.1)."""

    def question(draw: Random) -> Item:
        digits, (first, second) = [draw.randrange(10) for _ in range(3)], draw.choices("+-*", k=2)
        compute = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
        answer = compute[first](digits[0], compute[second](digits[1], digits[2]))
        return Item(f"Q: What is {digits[0]}{first}({digits[1]}{second}{digits[2]})?\nA:", str(answer))

    return _generated("1-digit-composite", question)


def _generated(name: str, question: Callable[[Random], Item]) -> Task:
    """Distinct questions, always the same ones; the first are asked, the others are there to be shown."""
    draw, items = Random(name), dict[Item, None]()
    while len(items) < INSTANCES + EXAMPLES:
        items[question(draw)] = None
    every = tuple(items)
    return Task(name, every[:INSTANCES], every[INSTANCES:], metric="exact", max_tokens=16)


ARITHMETIC = [(digits, name) for digits in (2, 3, 4, 5) for name in ("addition", "subtraction")] + [
    (2, "multiplication")
]
TASKS: dict[str, Callable[[], Task]] = {
    "topics": topics,
    "titles": titles,
    "last-word": last_word,
    **{f"{digits}-digit-{name}": partial(arithmetic, digits, name) for digits, name in ARITHMETIC},
    "1-digit-composite": composite,
}

"""Readers of the catalogue's file formats. Each converts a file into documents, sentence pairs or conversations.

A document is a string. A pair is a sentence and its translation. A conversation is a list of messages as chat templates
take them, `{"role": "user" or "assistant", "content": ...}`, with alternating roles.
"""

import gzip
import html
import json
import re
import tokenize
from collections.abc import Iterator, Mapping
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from keifu.data.classification.examples import Example, Examples
from keifu.untrusted import parse_yaml, read_text

Conversation = list[dict[str, str]]
HELD_OUT_ARTICLES = 1000  # Wikipedia summaries for tests of topic classification
TATOEBA = ("id", "ja", "en", "nl", "de", "fr", "es", "sv")  # the columns of the sentence file


def speeches(folder: Path) -> Iterator[str]:
    """Yield one document for each file, sorted by file name."""
    for file in sorted(folder.glob("*.txt")):
        yield file.read_text(encoding="utf-8").strip()


def plays(folder: Path) -> Iterator[str]:
    """Yield one document for each play, without titles and stage directions. A speech is the speaker's name with a
    colon, the lines, and an empty line."""
    for file in sorted(folder.glob("*.md")):
        marked_text = re.sub(r"\*\*(.+)\*\*", r"\1:", read_text(file))
        yield re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)^#.*$|[_*]((?!\n\n)[^_*])+[_*]?|\\| +$", "", marked_text)).strip()


def summaries(file: Path) -> Iterator[str]:
    """Yield one document for each article: its title, an empty line, its summary."""
    for article in _json(file).values():
        yield f"{article['title']}\n\n{article['extract']}"


def untested_summaries(file: Path) -> Iterator[str]:
    """Yield the summaries that the topic tests do not use."""
    topics = (article["topic"] for article in _json(file).values())
    rows = (Example(file.name, (text,), topic) for text, topic in zip(summaries(file), topics, strict=True))
    yield from Examples(file.name, tuple(rows)).split(HELD_OUT_ARTICLES)[0].texts


def recipes(file: Path) -> Iterator[str]:
    """Yield one document for each recipe: its title, its ingredients, its steps."""
    for recipe in _json(file).values():
        ingredients = "\n".join(f"- {item}" for item in recipe["ingredients"])
        steps = "\n".join(f"{number}. {step}" for number, step in enumerate(recipe["steps"], 1))
        parts = recipe["title"], ingredients and f"Ingredients:\n{ingredients}", steps and f"Steps:\n{steps}"
        yield "\n\n".join(filter(None, parts))


def sentences(file: Path, language: str) -> Iterator[str]:
    """Yield the distinct Tatoeba sentences of one language, in the order of their first appearance."""
    yield from dict.fromkeys(row[language] for row in tatoeba(file) if row[language] != "-")


def translations(file: Path, first: str, second: str) -> Iterator[tuple[str, str]]:
    """Yield the Tatoeba sentence pairs of two languages. A sentence with several translations occurs several times."""
    for row in tatoeba(file):
        if row[first] != "-" and row[second] != "-":
            yield row[first], row[second]


def dictionary(file: Path) -> Iterator[tuple[str, str]]:
    """Yield JMdict's common Japanese nouns, each with its first two English meanings of at most two words.

    A noun is common if a list of frequent words has it, or if it is usually written in kana, like animals and
    plants.
    """
    words, meanings, marks = list[str](), list[str](), set[str]()
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            tag, _, entry_text = line.partition(">")
            text = re.sub(r" ?\([^)]*\)", "", html.unescape(entry_text.partition("</")[0])).strip()
            if tag in ("<keb", "<reb"):
                words.append(text)
            elif tag in ("<ke_pri", "<re_pri", "<pos", "<misc"):
                marks |= {text, tag}
            elif tag == "<gloss" and re.fullmatch(r"[A-Za-z-]+( [A-Za-z-]+)?", text):
                meanings.append(text)
            elif tag.startswith("</entry"):
                if "&n;" in marks and marks & {"&uk;", "<ke_pri", "<re_pri"}:
                    forms = words if "&uk;" in marks else words[:1]
                    yield from ((word, meaning) for word in forms for meaning in meanings[:2])
                words, meanings, marks = [], [], set()


def read_chats(file: Path, turns: int = 4) -> Iterator[Conversation]:
    """Yield conversations between two people of at least `turns` turns.

    Consecutive messages of one person are joined, one on each line. The first speaker gets the role `user`.
    """
    for chat in _json(file).values():
        if len(conversation := conversation_of(chat)) >= turns:
            yield conversation


def conversation_of(chat: Mapping[str, Any]) -> Conversation:
    """Return the messages in the record of one conversation."""
    messages = [message for turn in chat["messages"] for message in turn if message["text"].strip()]
    turns = [[m["text"].strip() for m in group] for _, group in groupby(messages, key=lambda m: m["sender"])]
    return _taking_turns("\n".join(lines) for lines in turns)


def read_dialogues(folder: Path) -> Iterator[Conversation]:
    """Yield the distinct conversations in ChatterBot's YAML files that have at least two turns. Some are repeated 100
    times."""
    import yaml

    # BaseLoader keeps everything a string: "no" is an answer here, not a truth value.
    files = (parse_yaml(read_text(file), file, yaml.BaseLoader) for file in sorted(folder.glob("*.yml")))
    every = chain.from_iterable(content["conversations"] for content in files)
    for conversation in dict.fromkeys(tuple(turns) for turns in every if isinstance(turns, list) and len(turns) > 1):
        yield _taking_turns(turn.strip() for turn in conversation)


def python_files(folder: Path) -> Iterator[str]:
    """Yield the modules under a folder, without tests and installed packages, decoded as each file declares."""
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder).parts
        if not {"test", "tests", "idle_test", "site-packages", "dist-packages"} & set(inside):
            with tokenize.open(file) as source:
                text = source.read()
            if text.strip():  # many __init__.py are empty
                yield text


def as_document(conversation: Conversation) -> str:
    """Format a conversation as plain text: one line for each turn, which begins with the speaker's name, A or B."""
    names = {"user": "A", "assistant": "B"}
    return "\n".join(f"{names[turn['role']]}: {turn['content']}" for turn in conversation)


def _taking_turns(turns: Iterator[str]) -> Conversation:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def tatoeba(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8", newline="\n") as lines:
        for line in lines:
            yield dict(zip(TATOEBA, line.rstrip("\n").split("\t"), strict=False))  # a last column is about audio

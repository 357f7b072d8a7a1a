"""Prompts without answers, with whatever a reward needs to know beside them; knows no model and no token."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keifu.data import conversations
from keifu.data.conversations import Conversation, checked, objects
from keifu.data.records import listed
from keifu.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """What somebody is to answer, and the whole record that it stands in."""

    messages: Conversation
    record: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The last message."""
        return self.messages[-1]["content"]


def read(source: str | Path) -> Iterator[Prompt]:
    """The prompts of a .jsonl or .json file, whose objects have a "prompt", a text or messages, and other fields; or
    of conversations that keifu has by name, what is said before their last answer, and that as "answer"."""
    path = Path(source)
    if source in conversations.names():
        for number, talk in enumerate(conversations.read(str(source)), 1):
            yield prompt({"prompt": talk[:-1], "answer": talk[-1]["content"]}, f"{source}, conversation {number}")
        return
    if not path.is_file():
        raise UserError(f"There is no file {path} of prompts.")
    for place, record in objects(path, "prompt"):
        yield prompt(record, place)


def prompt(record: Mapping[str, Any], place: str) -> Prompt:
    """One record; a fault is a `UserError` that begins with the place."""
    if "prompt" not in record:
        raise UserError(f"{place}: there is no field prompt, only {listed(record)}.")
    given = record["prompt"]
    messages = given if isinstance(given, list) else [{"role": "user", "content": given}]
    return Prompt(checked([*messages, {"role": "assistant", "content": "?"}], place)[:-1], record)


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """A hash of all records, in their order."""
    digest = hashlib.sha256()
    for each in prompts:
        digest.update(json.dumps(each.record, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()

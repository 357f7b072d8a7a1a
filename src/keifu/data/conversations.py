"""Conversations to learn from, out of the files that people have: each is a list of messages; knows no template.

A file is one of records: .jsonl (an object a line), .json (a list of objects), or another that `keifu.data.records`
reads. Four forms are known by their fields, in this order:
{"messages": [{"role", "content"}]} (OpenAI), {"conversations": [{"from", "value"}]} (ShareGPT), {"instruction",
"input", "output"} (Alpaca), {"prompt", "response"} or {"prompt", "completion"}, texts or lists of messages.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keifu.data import catalogue
from keifu.data.instructions import INSTRUCTIONS
from keifu.data.records import Row, listed, read_records
from keifu.data.sources import in_catalogue
from keifu.errors import UserError, unknown

Message = dict[str, str]
Conversation = list[Message]
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FOLLOWS = {  # whom a turn may come after; None is the start
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


def read(source: str) -> Iterator[Conversation]:
    """The conversations of a file, of a catalogue entry that holds some, or of one made of an entry (`names`).

    A fault is a `UserError` that names the line and what is wrong: no form fits, roles out of order, an empty answer, a
    conversation that does not end with the assistant.
    """
    if source in INSTRUCTIONS:
        yield from INSTRUCTIONS[source]()
    elif in_catalogue(source):
        yield from map(_answered, catalogue.conversations(source))
    elif Path(source).is_file():
        yield from _of_file(Path(source))
    else:
        beside = [str(each) for each in Path(source).parent.glob("*.json*")] if Path(source).parent.is_dir() else []
        raise unknown("file or set of conversations", source, [*names(), *beside])


def names() -> list[str]:
    """The catalogue's conversations, and the instructions that are made of its texts."""
    return [*INSTRUCTIONS, *(name for name, entry in catalogue.CATALOGUE.items() if entry.gives == "conversations")]


def _answered(conversation: Conversation) -> Conversation:
    """Without a last turn that nobody answers: in talks between people either may have the last word."""
    return conversation[:-1] if conversation[-1]["role"] == "user" else conversation


def _of_file(path: Path) -> Iterator[Conversation]:
    for place, record in objects(path, "conversation"):
        yield checked(_form(record, place)(record), place)


def objects(path: Path, what: str) -> Iterator[Row]:
    """Each record of a file, with its place for errors; `what` each is, in a word."""
    found = False
    for place, record in read_records(path):
        found = True
        yield place, record
    if not found:
        raise UserError(f"There is no {what} in {path}: it is empty.")


def _form(record: Mapping[str, Any], place: str) -> Callable[[Mapping[str, Any]], Any]:
    """How to read a record, by its fields."""
    for fields, form in FORMS.items():
        if {*fields} <= record.keys():
            return form
    forms = "; ".join(" and ".join(fields) for fields in FORMS)
    raise UserError(f"{place}: a conversation has one of these sets of fields: {forms}. This has {listed(record)}.")


def _sharegpt(record: Mapping[str, Any]) -> Any:
    turns = record["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [{"role": SPEAKERS.get(turn.get("from"), turn.get("from")), "content": turn.get("value")} for turn in turns]


def _alpaca(record: Mapping[str, Any]) -> Any:
    asked = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]


def _prompted(answer: str, record: Mapping[str, Any]) -> Any:
    def messages(part: Any, role: str) -> Any:
        return part if isinstance(part, list) else [{"role": role, "content": part}]

    return [*messages(record["prompt"], "user"), *messages(record[answer], "assistant")]


FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Any]] = {
    ("messages",): lambda record: record["messages"],
    ("conversations",): _sharegpt,
    ("instruction", "output"): _alpaca,
    ("prompt", "response"): lambda record: _prompted("response", record),
    ("prompt", "completion"): lambda record: _prompted("completion", record),
}


def checked(messages: Any, place: str) -> Conversation:
    """The messages, once it is sure that they are a conversation whose last turn is an answer."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place}: a conversation is a list of messages, and this is {str(messages)[:40]!r}.")
    before = None
    for number, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in FOLLOWS:
            raise unknown(f"role in {place}, message {number}", str(role), FOLLOWS)
        if before not in FOLLOWS[role]:
            after = f"after {before}" if before else "at the start"
            rule = "user and assistant take turns"
            raise UserError(f"{place}, message {number}: {role} {after} is out of order; {rule}.")
        if not isinstance(content, str):
            raise UserError(f"{place}, message {number}: its content is {type(content).__name__}, not text.")
        if role == "assistant" and not content.strip():
            raise UserError(f"{place}, message {number}: the assistant's answer is empty; leave the conversation out.")
        before = role
    if before != "assistant":
        raise UserError(f"{place}: the conversation ends with {before}, so there is no answer to learn at its end.")
    return messages

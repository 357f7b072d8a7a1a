"""Conversations for fine-tuning: read from files of five common formats, or generated from the catalogue's texts.

A conversation is a list of messages. A file contains records: .jsonl (an object on each line), .json (a list of
objects), or another format that `keifu.data.records` reads. The format is recognised by the fields, in this order:
{"messages": [{"role", "content"}]} (OpenAI), {"conversations": [{"from", "value"}]} (ShareGPT), {"instruction",
"input", "output"} (Alpaca), {"prompt", "response"} or {"prompt", "completion"}, which are texts or lists of messages,
and {"question", "answer"}.

Synthetic conversations add a fixed question to a text of the catalogue. The answers come from Wikipedia, Wikibooks and
Tatoeba (`keifu data list` has licences and credits). Arithmetic problems are generated and solved here.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from keifu.data.catalogue import catalogue
from keifu.data.catalogue.readers import Conversation
from keifu.data.records import Row, listed, read_records
from keifu.data.text.synthetic_math import chain_sums
from keifu.errors import UserError, unknown
from keifu.folders import neighbours


def question_and_answer(question: str, answer: str) -> Conversation:
    """Return a conversation of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def titled(entry: str, question: str) -> Iterator[Conversation]:
    """Yield a question about each title of an entry's documents, answered by the text below the title."""
    for document in catalogue.documents(entry):
        title, _, text = document.partition("\n\n")
        if text.strip():
            yield question_and_answer(question.format(title.strip()), text.strip())


def translations() -> Iterator[Conversation]:
    """Yield requests to translate a sentence into Japanese, with Tatoeba's translation. Each sentence occurs once."""
    seen_sentences = set()
    for japanese, english in catalogue.pairs("tatoeba-ja-en"):
        if english not in seen_sentences:
            seen_sentences.add(english)
            yield question_and_answer(f"Translate into Japanese: {english}", japanese)


def arithmetic() -> Iterator[Conversation]:
    """Yield sums and differences of two to four numbers of one or two digits, with their results."""
    for record in chain_sums(10_000, (2, 4), 2, seed=1):
        yield question_and_answer(record["prompt"], record["answer"])


class SyntheticSource(NamedTuple):
    """Synthetic set: the catalogue entry it comes from ("" if none), a description, and a function that yields
    conversations."""

    entry: str
    how: str
    make: Callable[[], Iterator[Conversation]] | None = None


PHRASED = "questions are one phrase each, nobody asked them"
MADE_OF = {
    "summary-instructions": SyntheticSource("wiki-summaries", PHRASED, lambda: titled("wiki-summaries", "What is {}?")),
    "recipe-instructions": SyntheticSource("recipes", PHRASED, lambda: titled("recipes", "How do I make {}?")),
    "translation-instructions": SyntheticSource("tatoeba-ja-en", PHRASED, translations),
    "arithmetic-instructions": SyntheticSource("", "sums drawn and worked out here", arithmetic),
    "chitchat-preferences": SyntheticSource(
        "chitchat", "whole talks rated by their speakers; nobody compared two of them"
    ),
}
INSTRUCTIONS = {name: source.make for name, source in MADE_OF.items() if source.make}


Form = TypeVar("Form", bound=Callable[..., Any])
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FOLLOWS = {  # roles that may come before each role; None is the start
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant", "tool"},
}


def read(source: str) -> Iterator[Conversation]:
    """Yield the conversations of a file, of a catalogue entry, or of a synthetic set (see `names`).

    Raises `UserError`, with the line, if no format fits, roles are out of order, an answer is empty, or a conversation
    does not end with the assistant.
    """
    if source in INSTRUCTIONS:
        yield from INSTRUCTIONS[source]()
    elif source in catalogue.CATALOGUE:
        for talk in catalogue.conversations(source):  # a last user message has no answer
            yield talk[:-1] if talk[-1]["role"] == "user" else talk
    elif Path(source).is_file():
        for where, record in objects(Path(source), "conversation"):
            yield validate_messages(form_of(record, FORMS, where, "a conversation has")(record), where)
    else:
        raise unknown("file or set of conversations", source, [*names(), *neighbours(Path(source), "*.json*")])


def names() -> list[str]:
    """List the catalogue's conversations and the synthetic sets."""
    return [*INSTRUCTIONS, *catalogue.names("conversations")]


def objects(path: Path, what: str) -> list[Row]:
    """Return the records of a file with their positions for errors. what: a word for a record, also for errors."""
    rows = list(read_records(path))
    if not rows:
        raise UserError(f"There is no {what} in {path}: it is empty.")
    return rows


def form_of(record: Mapping[str, Any], forms: Mapping[tuple[str, ...], Form], where: str, what: str) -> Form:
    """Return the reader of the first form whose fields the record has. Raises `UserError` if there is none."""
    for fields, form in forms.items():
        if {*fields} <= record.keys():
            return form
    known_forms = "; ".join(" and ".join(fields) for fields in forms)
    raise UserError(f"{where}: {what} one of these sets of fields: {known_forms}. This has {listed(record)}.")


def prompt_of(prompt: Any, where: str) -> Conversation:
    """Convert a prompt (a string or a list of messages) to messages that expect an answer."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return validate_messages([*messages, {"role": "assistant", "content": "?"}], where)[:-1]


def parse_transcript(text: str, where: str) -> Conversation:
    """Parse a conversation written as one text, as in hh-rlhf: "\\n\\nHuman: ...\\n\\nAssistant: ...".

    Consecutive turns of one speaker are joined. Raises `UserError` for a text that does not begin with a speaker.
    """
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if before.strip() or not parts:
        forms = "a conversation is a list of messages, or a text of turns that begin with 'Human:' and 'Assistant:'"
        raise UserError(f"{where}: {forms}, and this is {text[:40]!r}.")
    messages: Conversation = []
    for speaker, words in zip(parts[::2], parts[1::2], strict=True):
        role = SPEAKERS.get(speaker.lower(), "assistant")
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{words.strip()}"
        else:
            messages.append({"role": role, "content": words.strip()})
    return messages


def _sharegpt(record: Mapping[str, Any]) -> Any:
    turns = record["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    spoken = [(turn.get("from"), turn.get("value")) for turn in turns]
    return [{"role": SPEAKERS.get(str(name), name), "content": value} for name, value in spoken]


def _alpaca(record: Mapping[str, Any]) -> Any:
    parts = [part for part in (record["instruction"], record.get("input")) if part]
    question = "\n\n".join(parts) if all(isinstance(part, str) for part in parts) else parts
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]


def _from_prompt(answer: str, record: Mapping[str, Any], prompt: str = "prompt") -> Any:
    def messages(part: Any, role: str) -> Any:
        return part if isinstance(part, list) else [{"role": role, "content": part}]

    return [*messages(record[prompt], "user"), *messages(record[answer], "assistant")]


FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Any]] = {
    ("messages",): lambda record: record["messages"],
    ("conversations",): _sharegpt,
    ("instruction", "output"): _alpaca,
    ("prompt", "response"): lambda record: _from_prompt("response", record),
    ("prompt", "completion"): lambda record: _from_prompt("completion", record),
    ("question", "answer"): lambda record: _from_prompt("answer", record, "question"),
}


def validate_messages(messages: Any, where: str) -> Conversation:
    """Return the messages. Raises `UserError` unless they are a conversation that ends with the assistant."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: a conversation must be a list of messages, not {str(messages)[:40]!r}.")
    before = None
    for number, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or role not in FOLLOWS:
            raise unknown(f"role in {where}, message {number}", str(role), FOLLOWS)
        if before not in FOLLOWS[role]:
            after = f"after {before}" if before else "at the start"
            rule = "user and assistant take turns"
            raise UserError(f"{where}, message {number}: {role} {after} is out of order; {rule}.")
        if not isinstance(content, str):
            raise UserError(f"{where}, message {number}: its content is {type(content).__name__}, not text.")
        if role == "assistant" and not content.strip():
            raise UserError(f"{where}, message {number}: the assistant's answer is empty; leave the conversation out.")
        before = role
    if before != "assistant":
        raise UserError(f"{where}: the conversation ends with {before}, so there is no answer to learn at its end.")
    return messages

"""Answers to the same prompt in the order of somebody's preference, out of the files that people have; knows no model.

A file is .jsonl or .json. Three forms are known by their fields: {"prompt", "chosen", "rejected"}, texts or lists of
messages; {"chosen", "rejected"}, two conversations that begin alike (Anthropic, TRL); {"prompt", "answers"}, the best
first, with {"scores"} in any order.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from keifu.data.conversations import Conversation, checked, objects
from keifu.data.ratings import PREFERENCES
from keifu.data.records import listed
from keifu.errors import UserError, unknown


@dataclass(frozen=True)
class Ranked:
    """A prompt, and at least two answers to it, the best first. `levels`: answers with the same number are as good."""

    prompt: Conversation
    answers: tuple[str, ...]
    levels: tuple[float, ...]

    def pairs(self) -> list[tuple[int, int]]:
        """Places of each better answer with each worse one."""
        places = combinations(range(len(self.answers)), 2)
        return [(first, second) for first, second in places if self.levels[first] > self.levels[second]]


def read(source: str | Path) -> Iterator[Ranked]:
    """The preferences of a file, or of those that keifu has by name. A fault is a `UserError` that names the line and
    what is wrong: no form fits, two conversations that do not begin alike, equal answers, scores that do not match."""
    path, made = Path(source), PREFERENCES.get(str(source))
    if made is None and not path.is_file():
        beside = [str(each) for each in path.parent.glob("*.json*")] if path.parent.is_dir() else []
        raise unknown("file or set of preferences", str(source), [*PREFERENCES, *beside])
    named = ((f"{source}, entry {number}", record) for number, record in enumerate(made(), 1)) if made else ()
    for place, record in named if made else objects(path, "preference"):
        for fields, form in FORMS.items():
            if {*fields} <= record.keys():
                yield _checked(form(record, place), place)
                break
        else:
            forms = "; ".join(" and ".join(fields) for fields in FORMS)
            known = f"preferences have one of these sets of fields: {forms}"
            raise UserError(f"{place}: {known}. This has {listed(record)}.")


def _pair(record: Mapping[str, Any], place: str) -> Ranked:
    answers = [_answer(record[name], f"{place}, {name}") for name in ("chosen", "rejected")]
    return Ranked(_prompt(record["prompt"], place), tuple(answers), (1.0, 0.0))


def _two_conversations(record: Mapping[str, Any], place: str) -> Ranked:
    better, worse = (checked(record[name], f"{place}, {name}") for name in ("chosen", "rejected"))
    if better[:-1] != worse[:-1]:
        raise UserError(f"{place}: chosen and rejected differ before their last message: they must share the prompt.")
    return Ranked(better[:-1], (better[-1]["content"], worse[-1]["content"]), (1.0, 0.0))


def _list(record: Mapping[str, Any], place: str) -> Ranked:
    given = record["answers"]
    if not isinstance(given, list) or len(given) < 2:
        raise UserError(f"{place}: answers is a list of at least two, and this is {str(given)[:40]!r}.")
    answers = [_answer(each, f"{place}, answer {number}") for number, each in enumerate(given, 1)]
    scores = record.get("scores", [-number for number in range(len(answers))])
    if not isinstance(scores, list) or len(scores) != len(answers):
        raise UserError(f"{place}: there are {len(answers)} answers, so as many scores are needed.")
    if not all(isinstance(score, int | float) for score in scores):
        raise UserError(f"{place}: scores are numbers, and these are {scores}.")
    order = sorted(range(len(answers)), key=lambda number: -scores[number])
    ranked = tuple(answers[number] for number in order), tuple(float(scores[number]) for number in order)
    return Ranked(_prompt(record["prompt"], place), *ranked)


FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any], str], Ranked]] = {
    ("prompt", "chosen", "rejected"): _pair,
    ("prompt", "answers"): _list,
    ("chosen", "rejected"): _two_conversations,
}


def _prompt(given: Any, place: str) -> Conversation:
    """Messages that somebody is to answer."""
    messages = given if isinstance(given, list) else [{"role": "user", "content": given}]
    return checked([*messages, {"role": "assistant", "content": "?"}], f"{place}, prompt")[:-1]


def _answer(given: Any, place: str) -> str:
    """The text of an answer, which may be given as a list of one message."""
    alone = isinstance(given, list) and len(given) == 1 and isinstance(given[0], dict)
    text = given[0].get("content") if alone else given
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: an answer is a text, and this is {str(given)[:40]!r}.")
    return text


def _checked(found: Ranked, place: str) -> Ranked:
    if len({*found.answers}) < len(found.answers):
        raise UserError(f"{place}: two answers are equal, so there is nothing to prefer; leave one out.")
    if not found.pairs():
        raise UserError(f"{place}: no answer is better than another; leave the prompt out.")
    return found

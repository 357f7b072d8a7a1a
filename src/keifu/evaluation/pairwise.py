"""Pairwise comparison of two models by people: the votes on disk, and the win rate with its interval."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from keifu.data.chat.conversations import Conversation
from keifu.errors import UserError
from keifu.evaluation.intervals import wilson
from keifu.files import write_atomic

Choice = Literal["A", "B", "even", "skipped"]
JUDGEMENTS, PREFERENCES = "judgements.jsonl", "preferences.jsonl"


class Judgement(NamedTuple):
    """A prompt, A's and B's answer to it, and which is better; even where both are equally good."""

    prompt: Conversation
    answers: tuple[str, str]
    choice: Choice


class Tally(NamedTuple):
    """How often A and B were better, neither, and how often nothing was said."""

    a: int
    b: int
    even: int
    skipped: int

    def figures(self) -> dict[str, float | int]:
        """The counts, and of those that were decided the share that B won, with its 95% interval (Wilson, 1927)."""
        decided = self.a + self.b
        low, high = wilson(self.b, decided)
        rate = self.b / decided if decided else math.nan
        return {**self._asdict(), "win_rate_of_b": rate, "from": low, "to": high}

    def sentence(self, a: str, b: str) -> str:
        """The same for people."""
        even = f", {self.even} even" if self.even else ""
        counts = f"A ({a}) was better {self.a} times, B ({b}) {self.b} times{even}."
        if not self.a + self.b:
            return f"{counts} Nothing is decided yet."
        told = self.figures()
        span = f"{told['from']:.1%} to {told['to']:.1%}"
        verdict = "which leaves open who is better" if told["from"] <= 0.5 <= told["to"] else "away from chance"
        rate = f"B wins {told['win_rate_of_b']:.1%} of {self.a + self.b} decided"
        return f"{counts} {rate}; 95% interval {span}, {verdict}."


def seed_of(seed: int, prompt: Conversation, what: str) -> int:
    """A number that a prompt has whatever other prompts there are."""
    said = json.dumps([seed, prompt, what], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:4])


def a_is_left(seed: int, prompt: Conversation) -> bool:
    """Whether A's answer stands on the left: a coin of the seed and the prompt."""
    return bool(seed_of(seed, prompt, "order") % 2)


class Judgements:
    """Choices in a folder, each written as it is made; a folder that holds some goes on.

    judgements.jsonl has what the comparison is about in its first line and then a choice a line; preferences.jsonl has
    those that were decided, as the recipes dpo and reward read them, but for pairs in which one answer says nothing. A
    folder that is about something else is a `UserError`.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]):
        self.path, self.about, self.made = directory / JUDGEMENTS, dict(about), list[Judgement]()
        if lines := self._lines():
            first, *rest = lines
            then = {name: first.get(name) for name in about}
            differs = [f"{name} {then[name]} → {value}" for name, value in about.items() if then[name] != value]
            if differs:
                raise UserError(
                    f"{directory} holds another comparison ({', '.join(differs)}): put that back, or choose another "
                    "folder with --out."
                )
            self.made = [_read(line) for line in rest]
        write_atomic(self.path, _lines([self.about, *map(_written, self.made)]))  # without a line that was cut off

    def holds(self, prompt: Conversation) -> bool:
        """Whether something was said about it."""
        return any(each.prompt == prompt for each in self.made)

    def add(self, judgement: Judgement) -> None:
        """Notes a choice; it is on disk afterwards."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines([_written(judgement)]))
            file.flush()
            os.fsync(file.fileno())
        self.made.append(judgement)
        decided = [each for each in self.made if each.choice in ("A", "B") and all(each.answers)]
        write_atomic(self.path.parent / PREFERENCES, _lines(map(self._preference, decided)))

    def tally(self) -> Tally:
        """What the choices add up to."""
        choices = [each.choice for each in self.made]
        return Tally(*(choices.count(each) for each in ("A", "B", "even", "skipped")))

    def _preference(self, judgement: Judgement) -> dict[str, Any]:
        chosen, rejected = judgement.answers if judgement.choice == "A" else judgement.answers[::-1]
        return {"prompt": judgement.prompt, "chosen": chosen, "rejected": rejected, "by": self.about.get("by")}

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        whole = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            return [json.loads(line) for line in whole if line.endswith("\n")]
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path} is damaged ({error.msg}): repair it, or choose another folder.") from error


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records)


def _written(judgement: Judgement) -> dict[str, Any]:
    return judgement._asdict()


def _read(line: Mapping[str, Any]) -> Judgement:
    first, second = line["answers"]
    return Judgement(line["prompt"], (first, second), line["choice"])

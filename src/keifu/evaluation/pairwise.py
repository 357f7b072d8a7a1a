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
    """A prompt, the responses of A and B, and which is better; "even" where both are equally good."""

    prompt: Conversation
    answers: tuple[str, str]
    choice: Choice


class Tally(NamedTuple):
    """How often A was better, B, neither, and how often the person skipped."""

    a: int
    b: int
    even: int
    skipped: int

    def figures(self) -> dict[str, float | int]:
        """Return the counts, and the share of decided pairs that B won with its 95% interval (Wilson, 1927)."""
        decided = self.a + self.b
        low, high = wilson(self.b, decided)
        rate = self.b / decided if decided else math.nan
        return {**self._asdict(), "win_rate_of_b": rate, "from": low, "to": high}

    def sentence(self, a: str, b: str) -> str:
        """Describe the same in a sentence."""
        even = f", {self.even} even" if self.even else ""
        counts = f"A ({a}) was better {self.a} times, B ({b}) {self.b} times{even}."
        if not self.a + self.b:
            return f"{counts} Nothing is decided yet."
        figures = self.figures()
        span = f"{figures['from']:.1%} to {figures['to']:.1%}"
        verdict = "which leaves open who is better" if figures["from"] <= 0.5 <= figures["to"] else "away from chance"
        rate = f"B wins {figures['win_rate_of_b']:.1%} of {self.a + self.b} decided"
        return f"{counts} {rate}; 95% interval {span}, {verdict}."


def seed_of(seed: int, prompt: Conversation, what: str) -> int:
    """Return a seed for one prompt that does not depend on the other prompts."""
    said = json.dumps([seed, prompt, what], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:4])


def a_is_left(seed: int, prompt: Conversation) -> bool:
    """Return whether A's response is shown on the left: a coin flip that depends only on the seed and the prompt."""
    return bool(seed_of(seed, prompt, "order") % 2)


class Judgements:
    """The choices of a comparison in a folder, each written as it is made; a comparison can be continued.

    judgements.jsonl describes the comparison in its first line and has one choice on each following line;
    preferences.jsonl has the decided ones, as the recipes dpo and reward read them, except where a response is empty. A
    folder with another comparison is a `UserError`.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]):
        self.path, self.about, self.made = directory / JUDGEMENTS, dict(about), list[Judgement]()
        if lines := self._lines():
            first, *rest = lines
            then = {name: first.get(name) for name in about}
            differs = [f"{name} {then[name]} → {value}" for name, value in about.items() if then[name] != value]
            if differs:
                raise UserError(f"{directory} holds another comparison ({', '.join(differs)}): choose another --out.")
            self.made = [_read(line) for line in rest]
        write_atomic(
            self.path, _lines([self.about, *map(Judgement._asdict, self.made)])
        )  # without a line that was cut off

    def holds(self, prompt: Conversation) -> bool:
        """Return whether there is a choice for this prompt already."""
        return any(each.prompt == prompt for each in self.made)

    def add(self, judgement: Judgement) -> None:
        """Add a choice and write it to disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines([judgement._asdict()]))
            file.flush()
            os.fsync(file.fileno())
        self.made.append(judgement)
        decided = [each for each in self.made if each.choice in ("A", "B") and all(each.answers)]
        write_atomic(self.path.parent / PREFERENCES, _lines(map(self._preference, decided)))

    def tally(self) -> Tally:
        """Count all choices."""
        choices = [each.choice for each in self.made]
        return Tally(*(choices.count(each) for each in ("A", "B", "even", "skipped")))

    def _preference(self, judgement: Judgement) -> dict[str, Any]:
        chosen, rejected = judgement.answers if judgement.choice == "A" else judgement.answers[::-1]
        return {"prompt": judgement.prompt, "chosen": chosen, "rejected": rejected, "by": self.about.get("by")}

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        *whole, _ = self.path.read_bytes().split(b"\n")  # behind the last line break stands what a crash cut off
        try:
            return [json.loads(line) for line in whole]
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path} is damaged ({error.msg}): repair it, or choose another folder.") from error


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _read(line: Mapping[str, Any]) -> Judgement:
    first, second = line["answers"]
    return Judgement(line["prompt"], (first, second), line["choice"])

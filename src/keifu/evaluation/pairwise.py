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
    """Prompt, the responses of A and B, and which is better; "even" if both are equally good."""

    prompt: Conversation
    answers: tuple[str, str]
    choice: Choice


class Tally(NamedTuple):
    """Numbers of votes: A better, B better, neither, and skipped."""

    a: int
    b: int
    even: int
    skipped: int

    def figures(self) -> dict[str, float | int]:
        """Return the counts, and the share of decided pairs that B won with its 95% interval (Wilson, 1927)."""
        decided = self.a + self.b
        low, high = wilson(self.b, decided)
        return {**self._asdict(), "win_rate_of_b": self.b / decided if decided else math.nan, "from": low, "to": high}

    def sentence(self, a: str, b: str) -> str:
        """Describe the figures in a sentence."""
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
    """Return a seed for one prompt. It does not depend on the other prompts."""
    said = json.dumps([seed, prompt, what], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:4])


def a_is_left(seed: int, prompt: Conversation) -> bool:
    """Return whether A's response is shown on the left: a coin flip that depends only on the seed and the prompt."""
    return bool(seed_of(seed, prompt, "order") % 2)


class Judgements:
    """Votes of a comparison in a folder. Each is written at once, so a comparison can be continued.

    The first line of judgements.jsonl describes the comparison; each further line is a vote. preferences.jsonl has the
    decided votes in the format of the recipes dpo and reward, without those that have an empty response. Raises
    `UserError` for a folder of another comparison.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]):
        self.path, self.about, self.judgements = directory / JUDGEMENTS, dict(about), list[Judgement]()
        if lines := self._lines():
            first, *judgement_lines = lines
            then = {name: first.get(name) for name in about}
            differs = [f"{name} {then[name]} → {value}" for name, value in about.items() if then[name] != value]
            if differs:
                raise UserError(f"{directory} holds another comparison ({', '.join(differs)}): choose another --out.")
            self.judgements = [
                Judgement(line["prompt"], tuple(line["answers"]), line["choice"]) for line in judgement_lines
            ]
        write_atomic(
            self.path, _lines([self.about, *map(Judgement._asdict, self.judgements)])
        )  # without a truncated line

    def holds(self, prompt: Conversation) -> bool:
        """Return whether there is already a vote for this prompt."""
        return any(judgement.prompt == prompt for judgement in self.judgements)

    def add(self, judgement: Judgement) -> None:
        """Add a vote and write it to disk."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines([judgement._asdict()]))
            file.flush()
            os.fsync(file.fileno())
        self.judgements.append(judgement)
        decided = [
            judgement for judgement in self.judgements if judgement.choice in ("A", "B") and all(judgement.answers)
        ]
        write_atomic(self.path.parent / PREFERENCES, _lines(map(self._preference, decided)))

    def tally(self) -> Tally:
        """Count the votes."""
        choices = [judgement.choice for judgement in self.judgements]
        return Tally(*(choices.count(choice) for choice in ("A", "B", "even", "skipped")))

    def _preference(self, judgement: Judgement) -> dict[str, Any]:
        preferred, rejected = judgement.answers if judgement.choice == "A" else judgement.answers[::-1]
        return {"prompt": judgement.prompt, "chosen": preferred, "rejected": rejected, "by": self.about.get("by")}

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        *complete_lines, _ = self.path.read_bytes().split(
            b"\n"
        )  # after the last line break there may be a truncated line
        try:
            return [json.loads(line) for line in complete_lines]
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path} is damaged ({error.msg}): repair it, or choose another folder.") from error


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

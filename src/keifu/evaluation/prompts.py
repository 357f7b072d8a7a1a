"""A task as prompts: items with demonstrations before them, as GPT-3 is told what to do; knows no model and no file.

Demonstrations are whole items with their answers (Brown et al., 2020, section 2: zero-, one- and few-shot); no weight
changes. They are drawn once by a seed and are the same before every item, so that a model reads them once.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from keifu.errors import UserError, unknown

METRICS = {
    "choice": "the likeliest of several answers, by four measures of likelihood",
    "exact": "a written answer that is one of the accepted ones when both are normalised",
    "cloze": "an answer each of whose tokens is the likeliest one",
}
SCORES = {
    "sum": "ln P of the answer",
    "token": "ln P a token",
    "character": "ln P a character, as lm-evaluation-harness's acc_norm",
    "unconditional": "ln P(answer | prompt) / P(answer | unconditional)",
}


@dataclass(frozen=True)
class Item:
    """What is asked, as it stands in the prompt, and its answer. `choices` has the answer among others, or is empty;
    `accepted` are other right answers where it is written."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    accepted: tuple[str, ...] = ()

    @property
    def right(self) -> int:
        """The place of the answer among the choices."""
        return self.choices.index(self.answer)


@dataclass(frozen=True)
class Task:
    """Items, and how they are put to a model.

    demonstrations: where examples are drawn from; None: from the items, of which those are then not asked.
    instruction: stands before everything, if it is not empty. delimiter: between a prompt and its answer. separator:
    between an example and what follows. unconditional: the prompt with which an answer's own likelihood is measured.
    metric, score: of `METRICS` and `SCORES`, the ones whose figure is the headline. until: strings that end a written
    answer, of at most `max_tokens` tokens. note: what a reader of the figures must know.
    """

    name: str
    items: tuple[Item, ...]
    demonstrations: tuple[Item, ...] | None = None
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
        for kind, value, known in (("metric", self.metric, METRICS), ("score", self.score, SCORES)):
            if value not in known:
                raise unknown(f"{kind} of a task", value, known)
        if self.metric == "choice" and not all(item.choices for item in self.items):
            raise UserError(f"{self.name} has no choices to choose from: evaluate it with the metric exact or cloze.")

    def drawn(self, most: int, seed: int = 0, limit: int | None = None) -> "Drawn":
        """Up to `most` examples, in the order in which they are drawn, and the items to ask, at most `limit`.

        Where the items have no demonstrations of their own, examples come from those beyond the limit, if there are
        enough, else from all. No item is its own example. Fewer than the shots are a `UserError`.
        """
        asked, pool = self.items[:limit], self.demonstrations
        if pool is None:
            spare = self.items[len(asked) :]
            pool = spare if len(spare) >= most else self.items
        known = {item.prompt for item in asked} if pool is not self.items else set()
        able = [item for item in pool if item.prompt not in known]
        if most > len(able) or (pool is self.items and most and most >= len(able)):
            left = "" if pool is not self.items else ", and one at least must be left to be asked"
            raise UserError(f"{most} shots were wanted, but {self.name} has {len(able)} items to draw them from{left}.")
        examples = sorted(able, key=lambda item: _key(seed, item))[:most]
        if pool is self.items:
            asked = tuple(item for item in self.items if item not in examples)[:limit]
        return Drawn(self, examples, asked)


@dataclass(frozen=True)
class Drawn:
    """A task's examples and the items that are asked."""

    task: Task
    examples: Sequence[Item]
    items: Sequence[Item]

    def prompts(self, shots: int) -> list[str]:
        """The whole prompt of each item, with the first `shots` examples before it."""
        task = self.task
        shown = [f"{each.prompt}{task.delimiter}{each.answer}" for each in self.examples[:shots]]
        front = "".join(part + task.separator for part in [task.instruction, *shown] if part)
        return [front + item.prompt for item in self.items]


def _key(seed: int, item: Item) -> bytes:
    """A number for an item that looks random, whatever order the items have."""
    return hashlib.blake2b(json.dumps([seed, item.prompt, item.answer]).encode(), digest_size=16).digest()

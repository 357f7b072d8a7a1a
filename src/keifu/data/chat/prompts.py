"""Prompts for reinforcement learning, with the data for their reward: from files, or from reasoning-gym.

reasoning-gym is an optional package. A set of its problems is called `gym:chain_sum`, optionally with settings of the
generator: `gym:chain_sum,min_terms=2,max_digits=1`. The package's scorers rate the responses.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from keifu.data.chat import conversations
from keifu.data.chat.conversations import Conversation, objects, prompt_of
from keifu.data.chat.thoughts import answer_of
from keifu.data.records import listed
from keifu.errors import UserError, install, require_known
from keifu.files import hash_of


@dataclass(frozen=True)
class Prompt:
    """Prompt as messages, with its record."""

    messages: Conversation
    record: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The last message."""
        return self.messages[-1]["content"]


def read_prompts(source: str | Path) -> Iterator[Prompt]:
    """Yield the prompts of a file or of a conversation set that keifu knows by name.

    Objects of a .jsonl or .json file have a "prompt" (a string or messages) and other fields. A conversation's last
    message becomes the "answer", the others the prompt.
    """
    path = Path(source)
    if source in conversations.names():
        for number, talk in enumerate(conversations.read(str(source)), 1):
            yield prompt({"prompt": talk[:-1], "answer": talk[-1]["content"]}, f"{source}, conversation {number}")
        return
    if not path.is_file():
        raise UserError(f"There is no file {path} of prompts.")
    for where, record in objects(path, "prompt"):
        yield prompt(record, where)


def prompt(record: Mapping[str, Any], where: str) -> Prompt:
    """Convert one record to a prompt. Raises a `UserError` that begins with `where`."""
    if "prompt" not in record:
        raise UserError(f"{where}: there is no field prompt, only {listed(record)}.")
    return Prompt(prompt_of(record["prompt"], where), record)


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """Return a hash of all records, in their order."""
    return hash_of(json.dumps(prompt.record, sort_keys=True, ensure_ascii=False) + "\n" for prompt in prompts)


PREFIX = "gym:"
SCORER = "reasoning-gym"


def reasoning_gym() -> Any:
    """Return the package. Raises `UserError` if it is not installed."""
    try:
        return import_module("reasoning_gym")
    except ImportError as error:
        raise UserError(f"reasoning-gym cannot be used ({error}): {install('gym')}.") from error


def gym_problems(source: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield `count` problems: {"prompt", "answer", "entry": the package's item}. The same seed gives the same
    problems."""
    name, *settings = source.removeprefix(PREFIX).split(",")
    generators = import_module(f"{reasoning_gym().__name__}.factory").DATASETS
    require_known("generator of reasoning-gym", name, generators)
    try:
        problems = reasoning_gym().create_dataset(name, size=count, seed=seed, **dict(map(_setting, settings)))
        for item in problems:
            yield {"prompt": item["question"], "answer": str(item["answer"]), "entry": item}
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"reasoning-gym refuses {source}: {error}.") from error


def gym_score(prompt: str, answer: str, example: Mapping[str, Any]) -> float:
    """Return the score of an answer by the package's scorer, from 0 to 1. example: a problem from `gym_problems`."""
    if "entry" not in example:
        raise UserError(f"the example is none of reasoning-gym's: choose --data {PREFIX}NAME, or another reward")
    entry = example["entry"]
    score = reasoning_gym().get_score_answer_fn(entry["metadata"]["source_dataset"])
    return float(score(answer_of(answer).strip(), entry))


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"A setting of reasoning-gym must be name=value, not {text!r}.")
    try:
        return name, json.loads(value.lower())  # a number, or true or false
    except ValueError:
        return name, value

"""Problems of reasoning-gym (an optional package) as prompts, and its own scorers; knows no model.

A set is named `gym:chain_sum`, with settings of its generator behind it: `gym:chain_sum,min_terms=2,max_digits=1`.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from keifu.errors import UserError, unknown

PREFIX = "gym:"
SCORER = "reasoning-gym"


def library() -> Any:
    """The package; a `UserError` where it is not installed."""
    try:
        return import_module("reasoning_gym")
    except ImportError as error:
        told = f"reasoning-gym cannot be used ({error})"
        raise UserError(f"{told}: pip install 'keifu[gym]'.") from error


def problems(source: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` problems: {"prompt", "answer", "entry": the item as the library has it}, the same for the same seed."""
    name, *given = source.removeprefix(PREFIX).split(",")
    known = import_module(f"{library().__name__}.factory").DATASETS
    if name not in known:
        raise unknown("generator of reasoning-gym", name, known)
    try:
        made = library().create_dataset(name, size=count, seed=seed, **dict(map(_setting, given)))
        for item in made:
            yield {"prompt": item["question"], "answer": str(item["answer"]), "entry": item}
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"reasoning-gym refuses {source}: {error}.") from error


def score(prompt: str, answer: str, example: Mapping[str, Any]) -> float:
    """What the library's scorer says, from 0 to 1; the example is one of `problems`."""
    if "entry" not in example:
        raise UserError(f"the example is none of reasoning-gym's: choose --data {PREFIX}NAME, or another reward")
    entry = example["entry"]
    return float(library().get_score_answer_fn(entry["metadata"]["source_dataset"])(answer.strip(), entry))


def _setting(given: str) -> tuple[str, Any]:
    name, equals, value = given.partition("=")
    if not equals:
        raise UserError(f"A setting of reasoning-gym is name=value, and this is {given!r}.")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, {"true": True, "false": False}.get(value.lower(), value)

"""Programmatic rewards: a Python function of the prompt, the answer and the example."""

import ast
import hashlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from keifu.data.chat import prompts as gym
from keifu.data.chat.prompts import Prompt
from keifu.data.chat.thoughts import answer_of
from keifu.data.text.synthetic_math import OPERATIONS
from keifu.errors import UserError, require_known

# arguments: the prompt, the answer, and the example that has the prompt
Reward = Callable[[str, str, Mapping[str, Any]], float]
Scorer = Callable[[Sequence[Prompt], Sequence[str]], list[float]]  # arguments: prompts, and an answer to each
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
EQUATION = re.compile(r"(-?\d{1,12}) ([-+*]) (-?\d{1,12}) = (-?\d{1,24})")
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
TERM = re.compile(r"[0-9 ()+*/-]{1,200}")  # stricter than Python, which also reads 1_2 and True as numbers


def last_number(prompt: str, answer: str, example: Mapping[str, Any]) -> float:
    """Return 1 if the last number of the answer is the example's "answer", otherwise 0."""
    right = str(_field(example, "answer")).replace(",", "").strip()
    return float(NUMBER.findall(answer_of(answer).replace(",", ""))[-1:] == [right])


def exact(prompt: str, answer: str, example: Mapping[str, Any]) -> float:
    """Return 1 if the answer is the example's "answer", otherwise 0."""
    return float(answer_of(answer).strip() == str(_field(example, "answer")).strip())


def worked_steps(prompt: str, answer: str, example: Mapping[str, Any]) -> float:
    """Return 1 if the last number is right and all equations of two numbers, at least one, are true, otherwise 0."""
    steps = EQUATION.findall(answer)
    true = all(OPERATIONS[sign](int(left), int(right)) == int(result) for left, sign, right, result in steps)
    return float(bool(steps) and true) * last_number(prompt, answer, example)


def countdown(prompt: str, answer: str, example: Mapping[str, Any]) -> float:
    """Return 1 if the last line is a term with the value of the example's "target" that uses each of its "numbers"
    once, otherwise 0. Text after "=" is ignored."""
    numbers, target = _field(example, "numbers"), _field(example, "target")
    lines = answer_of(answer).strip().splitlines() or [""]
    term = lines[-1].rpartition(":")[2].partition("=")[0].strip()
    if not TERM.fullmatch(term) or sorted(map(int, re.findall(r"\d+", term))) != sorted(numbers):
        return 0.0
    try:
        return float(_value(ast.parse(term, mode="eval").body) == target)
    except (SyntaxError, ValueError, ZeroDivisionError, MemoryError, RecursionError):
        return 0.0


def _value(node: ast.expr) -> Fraction:
    """Compute a term of whole numbers, + - * / and parentheses. Raises ValueError for anything else."""
    match node:
        case ast.Constant(value=int() as number):
            return Fraction(number)
        case ast.BinOp(left, ast.Div(), right):
            return _value(left) / _value(right)
        case ast.BinOp(left, ast.Add() | ast.Sub() | ast.Mult() as sign, right):
            return Fraction(OPERATIONS[SIGNS[type(sign)]](_value(left), _value(right)))
    raise ValueError(ast.dump(node))


def _field(example: Mapping[str, Any], name: str) -> Any:
    """Return a field of the example. Raises UserError if it is missing."""
    if name not in example:
        raise UserError(f"the example has no field {name}: give it one, or choose another reward")
    return example[name]


BUILT_IN: dict[str, Reward] = {
    "last-number": last_number, "exact": exact, "worked-steps": worked_steps, "countdown": countdown,
    gym.SCORER: gym.gym_score,
}  # fmt: skip
FIELDS = dict.fromkeys(BUILT_IN, ["answer"]) | {"countdown": ["numbers", "target"], gym.SCORER: ["entry"]}


def check_fields(name: str, prompts: Sequence[Prompt]) -> None:
    """Raise UserError for prompts that lack a field of this built-in reward, before anything is generated."""
    for prompt in prompts:
        for field in FIELDS.get(name, ()):
            if field not in prompt.record:
                text = f"The example with the prompt {prompt.text[:80]!r} has no field {field}"
                raise UserError(f"{text}, which the reward {name} reads: give it one, or choose another reward.")


def reward(name: str) -> Reward:
    """Return the built-in reward of that name, or the function of `file.py:function`; the file is then executed. Raises
    UserError for an unknown name, or a missing file or function."""
    path, function = code_file(name), name.rpartition(":")[2]
    if path is None:
        require_known("reward (or file.py:function)", name, BUILT_IN)
        return BUILT_IN[name]
    if not path.is_file():
        raise UserError(f"There is no file {path}: --reward is file.py:function, or one of {', '.join(BUILT_IN)}.")
    function_in_file: Reward | None = getattr(_module(path), function, None)
    if not callable(function_in_file):
        raise UserError(f"{path} has no function {function!r}, to be called with a prompt, an answer and an example.")
    return function_in_file


def code_file(name: str) -> Path | None:
    """Return the Python file that a reward's name executes; None for a built-in reward."""
    path, colon, _ = name.rpartition(":")
    return Path(path) if colon and path.endswith(".py") else None


def text_hash(name: str) -> str:
    """Return a hash of a reward's file, so that a resumed run notices a change; "" for built-in rewards."""
    path = code_file(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def _module(path: Path) -> Any:
    spec = spec_from_file_location(f"reward {path.resolve()}", path)  # no import statement has this name
    assert spec is not None and spec.loader is not None, "the name ends in .py"
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}.") from error
    return module


def score_responses(function: Reward) -> Scorer:
    """Return a scorer that calls a reward function on each answer."""
    return lambda prompts, answers: [
        score(function, prompt.text, answer, prompt.record) for prompt, answer in zip(prompts, answers, strict=True)
    ]


def score(function: Reward, prompt: str, answer: str, example: Mapping[str, Any]) -> float:
    """Return the reward of an answer. Raises UserError with the answer if the function raises, or returns no finite
    number."""
    of = f"for the answer {answer[:80]!r} to {prompt[:80]!r}"
    try:
        value = function(prompt, answer, example)
    except (Exception, SystemExit) as error:
        raise UserError(f"The reward raised {type(error).__name__} {of}: {error}.") from error
    try:
        number = float(value)
    except Exception:
        raise UserError(f"The reward is {value!r} {of}: it must be a number.") from None
    if not math.isfinite(number):
        raise UserError(f"The reward is {number} {of}: it must be a finite number.")
    return number

"""Synthetic arithmetic problems: sums in words and digits with checkable steps, and chains of sums and differences.

A problem is a question, steps that are equations of two numbers, and an answer, for instance:
    Question: 47 + 38 = ?
    7 + 8 = 15
    40 + 30 = 70
    70 + 15 = 85
    Answer: 85

Chains have the form of reasoning-gym's chain_sum; numbers and wording are generated here, not by that library.
"""

import random
from collections.abc import Callable, Iterator
from operator import add, mul, sub
from typing import Any, NamedTuple
from zlib import crc32

from keifu.errors import UserError

OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {"+": add, "-": sub, "*": mul}
NAMES = ("Aiko", "Ben", "Clara", "Daisuke", "Emma", "Hugo", "Ines", "Kenji", "Lars", "Mia", "Nora", "Yuki")
THINGS = ("apples", "books", "coins", "eggs", "pencils", "shells", "stamps", "tickets")
PROBLEMS = 8  # number in a document
VERSION = 1  # increased when the same numbers would give other problems


class Problem(NamedTuple):
    """Question, equations that lead to its answer, and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: int

    def text(self) -> str:
        """Return the problem as text for a model."""
        return "\n".join((f"Question: {self.question}", *self.steps, f"Answer: {self.answer}"))


def problem(number: int, seed: int = 0) -> Problem:
    """Return the problem with that number. It depends only on the number and the seed."""
    chance = random.Random(f"{seed}:{number}")
    return chance.choice((_sum, _difference, _product, _chain, _shopping, _giving))(chance)


def documents(count: int, held_out: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return training and held-out documents with the first `count` problems, eight in each. No question is in both
    parts."""
    both: tuple[dict[str, Problem], dict[str, Problem]] = {}, {}
    for number in range(count):
        example = problem(number, seed)
        both[crc32(example.question.encode()) < held_out * 2**32][example.question] = example
    texts = ([example.text() for example in part.values()] for part in both)
    training, validation = (
        ["\n\n".join(part[at : at + PROBLEMS]) for at in range(0, len(part), PROBLEMS)] for part in texts
    )
    return training, validation


def _step(left: int, sign: str, right: int) -> tuple[str, int]:
    """Return an equation and its result."""
    result = OPERATIONS[sign](left, right)
    return f"{left} {sign} {right} = {result}", result


def _solve(question: str, *steps: tuple[str, int]) -> Problem:
    return Problem(question, tuple(text for text, _ in steps), steps[-1][1])


def _sum(chance: random.Random) -> Problem:
    """Draw a sum: ones, tens and hundreds are added separately, then together."""
    digits = chance.choice((1, 2, 2, 3))
    a, b = chance.randrange(10**digits), chance.randrange(10**digits)
    parts = [_step(a // p % 10 * p, "+", b // p % 10 * p) for p in (10**n for n in range(digits))]
    steps, total = [parts[0]], parts[0][1]
    for part in parts[1:]:
        steps += [part, _step(part[1], "+", total)]
        total = steps[-1][1]
    return _solve(f"{a} + {b} = ?", *steps)


def _difference(chance: random.Random) -> Problem:
    """Draw a difference: first the tens are subtracted, then the ones."""
    a, b = chance.randrange(200), chance.randrange(100)
    tens, ones = b // 10 * 10, b % 10
    first = _step(a, "-", tens)
    return _solve(f"{a} - {b} = ?", first, _step(first[1], "-", ones))


def _product(chance: random.Random) -> Problem:
    """Draw a product of a number and a digit: the tens and the ones are multiplied, then added."""
    a, b = chance.randrange(10, 100), chance.randrange(2, 10)
    tens, ones = _step(a // 10 * 10, "*", b), _step(a % 10, "*", b)
    return _solve(f"{a} * {b} = ?", tens, ones, _step(tens[1], "+", ones[1]))


def _chain(chance: random.Random) -> Problem:
    """Draw a sum of three numbers, added from left to right."""
    a, b, c = (chance.randrange(1, 50) for _ in range(3))
    one, two = chance.choice("+-"), chance.choice("+-")
    first = _step(a, one, b)
    return _solve(f"{a} {one} {b} {two} {c} = ?", first, _step(first[1], two, c))


def _shopping(chance: random.Random) -> Problem:
    name, thing = chance.choice(NAMES), chance.choice(THINGS)
    have, bags, in_bag = chance.randrange(2, 60), chance.randrange(2, 10), chance.randrange(2, 13)
    bought = _step(bags, "*", in_bag)
    question = f"{name} has {have} {thing} and buys {bags} bags of {in_bag}. How many {thing} are there now?"
    return _solve(question, bought, _step(have, "+", bought[1]))


def _giving(chance: random.Random) -> Problem:
    (giver, friend), thing = chance.sample(NAMES, 2), chance.choice(THINGS)
    have, given_away, gained = chance.randrange(30, 90), chance.randrange(2, 30), chance.randrange(2, 30)
    remainder = _step(have, "-", given_away)
    question = (
        f"{giver} has {have} {thing}, gives {friend} {given_away} of them and finds {gained} more. How many are left?"
    )
    return _solve(question, remainder, _step(remainder[1], "+", gained))


def chain_sums(count: int, terms: tuple[int, int], digits: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield `count` different problems, or as many as exist: {"prompt": "What is 4 + 3 - 9?", "answer": "-2"}.

    terms: smallest and largest number of terms. digits: maximal digits of a number.
    """
    if not 2 <= terms[0] <= terms[1] or digits < 1:
        raise UserError(f"A chain must have at least 2 terms of at least 1 digit, not {terms} terms of {digits}.")
    chains: set[str] = set()
    for number in range(20 * count):  # if few problems exist, most draws are repetitions
        chance = random.Random(f"{VERSION}:{seed}:{number}")
        values = [chance.randrange(10**digits) for _ in range(chance.randint(*terms))]
        signs = [chance.choice("+-") for _ in values[1:]]
        chain = f"{values[0]}" + "".join(f" {s} {v}" for s, v in zip(signs, values[1:], strict=True))
        if chain not in chains and len(chains) < count:
            chains.add(chain)
            signed = (v if s == "+" else -v for s, v in zip(signs, values[1:], strict=True))
            yield {"prompt": f"What is {chain}?", "answer": str(values[0] + sum(signed))}


def arithmetic(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield `count` results of `problem` as prompts with answers: {"prompt": "47 + 38 = ?", "answer": "85"}."""
    for number in range(count):
        example = problem(number, seed)
        yield {"prompt": example.question, "answer": str(example.answer)}


def countdowns(count: int, terms: tuple[int, int], digits: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield `count` solvable problems: {"prompt", "numbers": [8, 3, 5], "target": 16, "answer": "8 + 3 + 5"}.

    terms: smallest and largest number of terms. digits: maximal digits of a number. The target is from 1 to 999.
    """
    if not 2 <= terms[0] <= terms[1] or digits < 1:
        raise UserError(f"A countdown has 2 numbers or more, of 1 digit or more, and not {terms} numbers of {digits}.")
    for number in range(count):
        chance, target, values, solution = random.Random(f"countdown {VERSION}:{seed}:{number}"), 0, [0], ""
        while not 1 <= target <= 999:
            values = [chance.randrange(1, 10**digits) for _ in range(chance.randint(*terms))]
            target, solution = values[0], str(values[0])
            for value in values[1:]:
                sign = chance.choice("+-*")
                target = OPERATIONS[sign](target, value)
                solution = f"({solution})" if sign == "*" and " " in solution else solution
                solution = f"{solution} {sign} {value}"
        numbers = chance.sample(values, len(values))
        question = f"Use each of {', '.join(map(str, numbers))} once, with + - * / and parentheses, to make {target}."
        yield {"prompt": question, "numbers": numbers, "target": target, "answer": solution}

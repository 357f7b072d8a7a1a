"""Chains of sums and differences, made on the spot, in the form of reasoning-gym's chain_sum; knows no token.

They are not that library's own problems: the numbers are drawn and the question is worded here.
"""

import random
from collections.abc import Iterator
from typing import Any

from keifu.errors import UserError

VERSION = 1  # goes up when the same numbers would give other problems


def chain_sums(count: int, terms: tuple[int, int], digits: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """`count` different problems, or all that there are: {"prompt": "What is 4 + 3 - 9?", "answer": "-2"}.

    terms: the fewest and the most numbers of a problem. digits: the most that a number has.
    """
    if not 2 <= terms[0] <= terms[1] or digits < 1:
        raise UserError(f"A chain has 2 terms or more, of 1 digit or more, and not {terms} terms of {digits}.")
    seen: set[str] = set()
    for number in range(20 * count):  # few problems are found again and again
        chance = random.Random(f"{VERSION}:{seed}:{number}")
        values = [chance.randrange(10**digits) for _ in range(chance.randint(*terms))]
        signs = [chance.choice("+-") for _ in values[1:]]
        chain = f"{values[0]}" + "".join(f" {s} {v}" for s, v in zip(signs, values[1:], strict=True))
        if chain not in seen and len(seen) < count:
            seen.add(chain)
            signed = (v if s == "+" else -v for s, v in zip(signs, values[1:], strict=True))
            yield {"prompt": f"What is {chain}?", "answer": str(values[0] + sum(signed))}

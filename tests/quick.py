"""The choice of combinations for `make test`; `make test-all` runs all of them."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def quick(cases: Iterable[Sequence[Any]], *groups: tuple[int, ...]) -> list[Any]:
    """Mark each case slow that shows nothing new: others have all its values.

    groups: numbers of arguments whose values count together; without groups each argument counts alone.
    """
    cases = [tuple(case) for case in cases]
    groups = groups or tuple((number,) for number in range(len(cases[0])))
    shown = [{(group, *(repr(case[number]) for number in group)) for group in groups} for case in cases]
    left, chosen = set[Any]().union(*shown), set[int]()
    while left:  # the case that shows most of what is left; of equal ones the first
        best = max(range(len(cases)), key=lambda number: len(shown[number] & left))
        chosen.add(best)
        left -= shown[best]
    marks = [() if number in chosen else pytest.mark.slow for number in range(len(cases))]
    return [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks, strict=True)]


def others_slow(cases: Iterable[str], *chosen: str) -> list[Any]:
    """Mark the cases slow that are not chosen."""
    cases = [*cases]
    assert {*chosen} <= {*cases}, {*chosen} - {*cases}
    return [pytest.param(case, marks=() if case in chosen else pytest.mark.slow) for case in cases]

"""Ranges of numbers, as annotations of dataclass fields: options of commands and recipes, and settings in Python.
Values of `Literal` fields are checked too.

`Count` is the type of a whole number of at least 1. Limits that depend on other settings are checked with those
settings.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from keifu.errors import UserError, require_known

LARGEST = 2**31 - 1  # maximum of whole numbers that count something
LIMIT = 10**6  # maximum of factors of logits, guidance and penalties, so that products fit float32


@dataclass(frozen=True)
class Range:
    """Range from `least` to `most`. `above` excludes `least`, and `below` excludes `most`. `is_integer`: integers only.
    `or_zero`: 0 is allowed too."""

    least: float | int
    most: float | int
    above: bool = False
    below: bool = False
    is_integer: bool = False
    or_zero: bool = False
    note: str = ""

    def holds(self, value: Any) -> bool:
        """Return whether the value is in the range."""
        number_type: Any = Integral if self.is_integer else Real
        if isinstance(value, bool) or not isinstance(value, number_type):
            return False
        inside = self.least <= value <= self.most
        excluded = (self.above and value == self.least) or (self.below and value == self.most)
        return inside and not excluded or (self.or_zero and value == 0)

    def __str__(self) -> str:
        numbers = "0 or " * self.or_zero + ("a whole number" if self.is_integer else "a number")
        low = f"above {self.least:,}" if self.above else f"from {self.least:,}"
        high = f"below {self.most:,}" if self.below else f"{'and at most' if self.above else 'to'} {self.most:,}"
        return f"{numbers} {low} {'and ' if self.below else ''}{high}{self.note}"


COUNT = Range(1, LARGEST, is_integer=True)
FROM_ZERO = Range(0, LARGEST, is_integer=True)
SEED = Range(0, 2**63 - 1, is_integer=True)
FINITE = Range(-LIMIT, LIMIT)
AT_LEAST_ZERO = Range(0, 10**12)
POSITIVE = Range(0, 10**12, above=True)
SHARE = Range(0, 1)
POSITIVE_SHARE = Range(0, 1, above=True)
BELOW_ONE = Range(0, 1, below=True)

Count = Annotated[int, COUNT]
Natural = Annotated[int, FROM_ZERO]
Seed = Annotated[int, SEED]
Finite = Annotated[float, FINITE]
NotNegative = Annotated[float, AT_LEAST_ZERO]
Positive = Annotated[float, POSITIVE]
Share = Annotated[float, SHARE]
PositiveShare = Annotated[float, POSITIVE_SHARE]
BelowOne = Annotated[float, BELOW_ONE]
SmallCount = Annotated[int, Range(1, 1_000_000, is_integer=True)]
Depth = Annotated[int, Range(1, 1000, is_integer=True)]
Port = Annotated[int, Range(0, 65_535, is_integer=True)]
Likeliest = Annotated[int, Range(0, 20, is_integer=True)]
Bias = Annotated[float, Range(-LIMIT, LARGEST)]
Temperature = Annotated[float, Range(1e-6, LIMIT, or_zero=True, note=" (0: always the likeliest token)")]
TopK = Annotated[int, Range(0, LARGEST, is_integer=True, note=" (0: all tokens)")]
TopP = Annotated[float, Range(0, 1, above=True, note=" (1: all tokens)")]
MinP = Annotated[float, Range(0, 1, note=" (0: all tokens)")]
Sigmas = Annotated[float, Range(0, LIMIT, note=" (0: all tokens)")]
RepetitionPenalty = Annotated[float, Range(1e-6, LIMIT, note=" (1 changes nothing)")]
Penalty = Annotated[float, Range(-LIMIT, LIMIT, note=" (0 changes nothing)")]


def range_of(hint: Any) -> Range | None:
    """Return the range in a type hint such as `Count | None` or `tuple[Count, ...]`; None if it has none."""
    if isinstance(hint, Range):
        return hint
    return next((limits for inner in get_args(hint) if (limits := range_of(inner))), None)


@cache
def _hints(settings_class: type) -> dict[str, Any]:
    return get_type_hints(settings_class, include_extras=True)


def check(settings: Any, label: Callable[[str], str] = str) -> None:
    """Check the fields of a dataclass against the ranges, or the literal values, of their types. label: converts a
    field's name for the error."""
    for name, hint in _hints(type(settings)).items():
        if get_origin(hint) is Literal:
            require_known(label(name), vars(settings)[name], get_args(hint))
        elif allowed := range_of(hint):
            check_value(label(name), vars(settings)[name], allowed)


def check_value(name: str, value: Any, allowed: Range) -> None:
    """Raise `UserError` for a value outside a range. None is allowed. Each number of a tuple is checked."""
    if value is not None and not all(map(allowed.holds, _numbers(value))):
        raise UserError(f"{name} must be {allowed}, not {value!r}.")


def _numbers(value: Any) -> Iterator[Any]:
    """Yield the value; for a tuple or list each nested value except strings."""
    if not isinstance(value, (tuple, list)):
        yield value
        return
    for item in value:
        if not isinstance(item, str):
            yield from _numbers(item)

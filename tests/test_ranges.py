"""Numbers outside their range are refused by the name of their option, whichever recipe or verb has it."""

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest

from keifu import cli
from keifu.commands.shared.command_names import COMMANDS, module_of
from keifu.errors import UserError
from keifu.ranges import AT_LEAST_ZERO, COUNT, Count, Range, check, check_value, range_of
from keifu.recipes.files import recipe_module, recipes
from keifu.recipes.options import check_ranges, paths, put, value_or
from keifu.training.settings import Settings


def kinds() -> Iterator[tuple[str, type]]:
    """Yield the dataclass of every recipe's and command's options."""
    for name in recipes():
        yield name, recipe_module(name).Recipe
    for verb in COMMANDS:
        module = import_module(module_of(verb))
        yield from ((verb, kind) for kind in vars(module).values() if is_own(kind, module))


def is_own(kind: Any, module: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind) and kind.__module__ == module.__name__


def is_numeric(hint: Any) -> bool:
    """Return whether a field may hold a number or several."""
    if get_origin(hint) in (Annotated, Union, UnionType, tuple):
        return any(is_numeric(each) for each in get_args(hint))
    return hint in (int, float)


def numeric_options(kind: type) -> Iterator[tuple[tuple[str, ...], Range | None]]:
    """Yield the paths of all numeric options, with their ranges."""
    hints, whole = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for name, inner in ((each.name, dataclass_of(hints[each.name])) for each in fields(kind)):
        if inner:
            yield from (((name, *path), allowed) for path, allowed in numeric_options(inner))
        elif is_numeric(hints[name]):
            yield (name,), range_of(whole[name])


def dataclass_of(hint: Any) -> type | None:
    return next((each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)), None)


def usual(kind: type, made: Any = None) -> dict[str, Any]:
    """Return the value of each option in `made`, or its default. It is None for required options."""
    found: dict[str, Any] = {}
    for each in fields(kind):
        value = None if each.default is MISSING else each.default
        value = value if each.default_factory is MISSING else each.default_factory()
        value = value if made is None else vars(made)[each.name]
        inner = dataclass_of(get_type_hints(kind)[each.name])
        found[each.name] = usual(inner, value) if inner else list(value) if isinstance(value, tuple) else value
    return found


ALL = [pytest.param(kind, id=f"{name}-{kind.__name__}") for name, kind in kinds()]


@pytest.mark.parametrize("kind", ALL)
def test_every_numeric_option_has_a_range_in_which_its_usual_value_lies(kind: type) -> None:
    check_ranges(kind, usual(kind))
    assert [path for path, allowed in numeric_options(kind) if allowed is None] == []


@pytest.mark.parametrize("kind", ALL)
def test_every_numeric_option_is_refused_by_name_outside_its_range(kind: type) -> None:
    values = usual(kind)
    names = {path: name for name, path in paths(kind, values).items()}
    for path, allowed in numeric_options(kind):
        assert allowed is not None
        low = -1 if path[-1] == "max_tokens" else allowed.least - 1 - allowed.or_zero
        for wrong in (low, math.nan, math.inf, -math.inf, allowed.most * 2 + 1):
            spoiled = deepcopy(values)
            put(spoiled, path, wrong)
            with pytest.raises(UserError, match=f"^--{names[path]} must be .*, not "):
                check_ranges(kind, spoiled)


@pytest.mark.parametrize("wrong", [True, "1", (0.5, math.nan), (1, None)])
def test_what_is_no_number_is_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match="^name must be .*, not "):
        check_value("name", wrong if isinstance(wrong, tuple) else [wrong, None], AT_LEAST_ZERO)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train gpt --steps 0", "--steps must be a whole number from 1 to 2,147,483,647, not 0."),
        ("train gpt --batch-size 0", "--batch-size must be a whole number from 1"),
        ("train gpt --depth 99999999999999999999", "--depth must be a whole number from 1 to 1,000"),
        ("train transformer --minutes -1", "--minutes must be a number above 0"),
        ("train transformer --minutes inf", "--minutes must be"),
        (f"train gpt --seed {2**64}", "--seed must be a whole number from 0 to 9,223,372,036,854,775,807"),
        ("train sft --epochs -1", "--epochs must be a number above 0"),
        ("train sft --epochs nan", "--epochs must be"),
        ("train sft --epochs 1e308", "--epochs must be"),
        ("train sft --lora.rank -1", "--lora.rank must be a whole number from 0"),
        ("train ppo --minibatches 0", "--minibatches must be"),
        ("train clip --betas 0.9 1.0", "betas must be a number from 0 and below 1"),
        ("generate smollm2 x --temperature 1e-320", "--temperature must be 0 or a number from 1e-06 to 1,000,000 (0"),
        (f"generate smollm2 x --top-k {10**25}", "--top-k must be a whole number from 0"),
        ("generate smollm2 x --top-p nan", "--top-p must be a number above 0 and at most 1 (1: all tokens), not nan"),
        ("draw x --count 1000000000000", "--count must be a whole number from 1 to 1,000,000"),
        ("embed x y --batch-size 0", "--batch-size must be"),
        ("evaluate x --on y --limit 0", "--limit must be"),
        ("translate x y --beam 0", "--beam must be"),
    ],
)
def test_the_command_line_refuses_it_before_any_work(words: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        cli.parse(words.split())
    assert said in str(error.value)


def test_zero_is_a_value_where_it_is_allowed() -> None:
    assert value_or(0.0, 2e-3) == 0.0 and value_or(None, 2e-3) == 2e-3


def test_a_range_holds_its_bounds_and_whole_numbers_where_it_says_so() -> None:
    assert Range(0, 1).holds(0) and Range(0, 1).holds(1.0) and not Range(0, 1).holds(True)
    assert not Range(0, 1, above=True).holds(0) and not Range(0, 1, below=True).holds(1)
    assert not Range(0, 9, is_integer=True).holds(1.5) and not Range(0, 9).holds("1") and not Range(0, 9).holds(10**400)
    assert Range(1, 2, or_zero=True).holds(0) and not Range(1, 2, or_zero=True).holds(0.5)
    assert range_of(Count | None) is COUNT and range_of(tuple[tuple[str, Count], ...]) is COUNT and not range_of(int)
    check(Settings(batch_stages=((8, 5), (16, 9)), rate_shares=(("head", 0.5),), minutes=None))
    with pytest.raises(UserError, match="rate_shares"):
        check(Settings(rate_shares=(("head", -0.5),)))

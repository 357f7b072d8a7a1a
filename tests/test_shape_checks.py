"""The checks of shapes that every test runs under: a wrong call is caught, the first time and after right ones."""

from dataclasses import dataclass, field

import pytest
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import Float, TypeCheckError
from shape_checks import CALLS, LATER, begin_test, check_once
from torch import Tensor

Matrix = Float[Tensor, "rows dim"]


def add(x: Matrix, y: Matrix, by: dict[str, int] | None = None) -> Float[Tensor, "rows"]:
    return (x + y).sum(1 if by is None else by["axis"])


def test_shapes_are_checked_the_first_time_and_after_right_calls() -> None:
    checked = check_once(add, typechecker=beartype)
    two, three = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(TypeCheckError, match="parameters"):
        checked(two, three)
    assert checked(two, two).tolist() == [8.0, 8.0] == checked(two, two).tolist()
    for wrong in (three, two.long(), two[0], [two]):
        begin_test()
        with pytest.raises(TypeCheckError, match="parameters"):
            checked(two, wrong)
    assert checked(three, three).shape == (3,)


def test_a_result_of_another_shape_is_caught_though_the_arguments_look_the_same() -> None:
    checked = check_once(add, typechecker=beartype)
    two = torch.ones(2, 4)
    assert checked(two, two, {"axis": 1}).shape == (2,)
    for _ in range(2):
        with pytest.raises(TypeCheckError, match="return value"):
            checked(two, two, {"axis": 0})


def test_a_function_without_shapes_is_checked_too() -> None:
    def double(number: int) -> int:
        return number * 2

    checked = check_once(double, typechecker=beartype)
    assert checked(2) == 4
    with pytest.raises(BeartypeCallHintParamViolation):
        checked("2")


@pytest.mark.parametrize("wrong", [torch.ones(2), "two", None])
def test_what_is_named_before_it_is_there_is_checked_too(wrong: object) -> None:
    """The first time and after right calls, once for each kind of arguments."""
    checked, pair = check_once(joined, typechecker=beartype), Pair(torch.ones(1, 4))
    for _ in range(2):
        with pytest.raises(TypeCheckError, match="parameters"):
            checked(wrong, torch.ones(2, 4))
        assert checked(pair, torch.ones(2, 4)).shape == (3, 4)
    begin_test()
    with pytest.raises(TypeCheckError, match="parameters"):
        checked(pair, torch.ones(4))


def joined(pair: "Pair", more: Matrix) -> Float[Tensor, "all dim"]:
    return torch.cat([pair.left, more])


@dataclass(frozen=True)
class Pair:
    left: Matrix
    names: list[str] = field(default_factory=list)

    @property
    def rows(self) -> Float[Tensor, "rows"]:
        return self.left if self.names else self.left.sum(1)

    @staticmethod
    def of(x: Matrix) -> "Pair":
        return Pair(x)

    @classmethod
    def twice(cls, x: Matrix) -> "Pair":
        return cls(2 * x)


def test_properties_and_methods_are_checked_the_first_time_and_after_right_calls() -> None:
    class Checked(Pair):
        rows = check_once(vars(Pair)["rows"], typechecker=beartype)
        of = check_once(vars(Pair)["of"], typechecker=beartype)
        twice = check_once(vars(Pair)["twice"], typechecker=beartype)

    checked = dataclass(frozen=True)(Checked)
    right, wrong = torch.ones(2, 4), torch.ones(2)
    for _ in range(2):
        for make in (checked.of, checked.twice):
            assert make(right).left.shape == (2, 4)
            with pytest.raises(TypeCheckError, match="parameters"):
                make(wrong)
        assert checked(right).rows.shape == (2,)
        with pytest.raises(TypeCheckError, match="return value"):
            _ = checked(right, ["a"]).rows


def test_a_long_loop_is_looked_at_now_and_then_and_the_next_test_again() -> None:
    checked, right, wrong = check_once(add, typechecker=beartype), torch.ones(2, 4), torch.ones(3, 1)
    for _ in range(CALLS):
        checked(right, right)
    broken = 0
    for _ in range(2 * LATER):
        try:
            checked(right[:1], wrong)
        except TypeCheckError:
            broken += 1
    assert broken == 2
    begin_test()
    with pytest.raises(TypeCheckError):
        checked(right[:1], wrong)


def test_copies_of_an_inner_function_are_checked_each() -> None:
    def copy(axis: int):
        def total(x: Matrix) -> Float[Tensor, "rows"]:
            return x.sum(axis)

        return check_once(total, typechecker=beartype)

    assert copy(1)(torch.ones(2, 4)).tolist() == [4.0, 4.0]
    with pytest.raises(TypeCheckError, match="return value"):
        copy(0)(torch.ones(2, 4))
    with pytest.raises(TypeCheckError, match="parameters"):
        copy(1)(torch.ones(2))

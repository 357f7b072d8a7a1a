"""The checks of shapes that every test runs under: a wrong call is caught, the first time and after right ones."""

from dataclasses import dataclass, field

import pytest
import shape_checks
import torch
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import Float, TypeCheckError
from shape_checks import begin_test, check_more, check_once
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


def test_the_fields_of_a_dataclass_are_checked_the_first_time_and_after_right_ones() -> None:
    @dataclass(frozen=True)
    class Sums:
        of: Matrix
        axis: int = 0

    checked = check_once(Sums, typechecker=beartype)
    for _ in range(2):
        begin_test()
        assert checked(torch.ones(2, 4), axis=1) is not None
        for wrong in ((torch.ones(2),), (torch.ones(2, 4), "1")):
            with pytest.raises(TypeCheckError, match="parameters"):
                checked(*wrong)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Begin with the calls that `make test` looks at."""
    monkeypatch.setattr(shape_checks, "CALLS", 4)
    monkeypatch.setattr(shape_checks, "LATER", 64)
    return monkeypatch


@pytest.mark.parametrize(("more", "first", "later"), [(False, 4, 64), (True, 16, 16)])
def test_a_long_loop_is_looked_at_now_and_then_and_the_next_test_again(
    more: bool, first: int, later: int, rates: pytest.MonkeyPatch
) -> None:
    if more:
        check_more()
    checked, right, wrong = check_once(add, typechecker=beartype), torch.ones(2, 4), torch.ones(3, 1)
    for number in range(first):
        begin_test()
        for _ in range(number):
            checked(right, right)
        with pytest.raises(TypeCheckError):
            checked(right[:1], wrong)
    begin_test()
    for _ in range(first):
        checked(right, right)
    broken = 0
    for _ in range(2 * later):
        try:
            checked(right[:1], wrong)
        except TypeCheckError:
            broken += 1
    assert broken == 2
    begin_test()
    with pytest.raises(TypeCheckError):
        checked(right[:1], wrong)


def test_tests_that_are_run_with_slow_ones_look_at_more_calls(request: pytest.FixtureRequest) -> None:
    with_slow = any(item.get_closest_marker("slow") for item in request.session.items)
    assert ((16, 16) if with_slow else (4, 64)) == (shape_checks.CALLS, shape_checks.LATER)


@pytest.mark.slow
def test_slow_tests_look_at_more_calls() -> None:
    assert (shape_checks.CALLS, shape_checks.LATER) == (16, 16)


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

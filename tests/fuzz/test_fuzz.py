"""Damaged files of every kind are refused with a sentence, or load and work: no other exception, no crash, no hang."""

import fuzzing
import pytest
from fuzzing import FINE, Case, fuzz


def wrong(cases: list[Case]) -> list[Case]:
    return [case for case in cases if case.outcome not in FINE]


@pytest.mark.parametrize("count", [40, pytest.param(150, marks=pytest.mark.slow)])
def test_mutants_of_both_styles(count: int) -> None:
    cases = fuzz(count, 20_000, (), "bytes", "structure")
    assert wrong(cases) == [] and len(cases) == 2 * count


@pytest.mark.slow
@pytest.mark.parametrize("style", ["bytes", "structure"])
def test_10_000_mutants(style: str) -> None:
    cases = fuzz(10_000, 0, (), style)
    assert wrong(cases) == []
    assert {case.outcome for case in cases} == {*FINE}, "some mutants load, some are refused"


def test_the_fuzzer_sees_what_is_wrong(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(place) -> None:
        raise KeyError("damage")

    assert fuzzing.outcome_of(fail, tmp_path) == ("traceback", "KeyError: 'damage'")

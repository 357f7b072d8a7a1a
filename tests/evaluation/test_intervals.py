"""Intervals: against their definition and published numbers."""

import math

import pytest

from keifu.evaluation.intervals import bootstrap, wilson


@pytest.mark.parametrize(("wins", "of"), [(0, 5), (5, 5), (9, 20), (70, 100)])
def test_wilson(wins: int, of: int) -> None:
    """Its ends are the shares p for which the wins are 1.96 deviations away (Wilson, 1927)."""
    for end in wilson(wins, of):
        assert abs(wins / of - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / of), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_intervals() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 3.8415 / 13.8415), abs=1e-5)  # z² / (n + z²)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe, 1998, table I
    assert wilson(10, 10)[1] == pytest.approx(1) and wilson(0, 0) == (0.0, 1.0)
    low, high = bootstrap([1.0, 2.0, 3.0] * 30)
    assert 1.8 < low < 2 < high < 2.2 and bootstrap([1.0, 2.0, 3.0] * 30) == (low, high)


def test_a_cluster_is_resampled_whole() -> None:
    """Eight copies of each of 6 values say no more than the 6 values."""
    values, copies = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0], [n for n in range(6) for _ in range(8)]
    repeated = [value for value in values for _ in range(8)]
    assert bootstrap(repeated, clusters=copies) == pytest.approx(bootstrap(values))
    low, high = bootstrap(repeated)
    wide_low, wide_high = bootstrap(repeated, clusters=copies)
    assert wide_high - wide_low > 2 * (high - low)

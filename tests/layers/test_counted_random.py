"""Normal numbers by a hash of seed and place: of the right distribution, and the same in any batch."""

import math
from inspect import unwrap

import pytest
import torch

from keifu.layers.counter_rng import bits, bits16, normal


def test_a_row_draws_the_same_alone() -> None:
    seeds = torch.tensor([3, 2**62, 7])
    together = normal(seeds, (3, 5, 5))
    assert together.shape == (3, 3, 5, 5) and together.dtype == torch.float32
    for row, seed in enumerate(seeds):
        assert torch.equal(normal(seed[None], (3, 5, 5))[0], together[row])


def test_moments_and_tails_are_those_of_the_normal_distribution() -> None:
    drawn = normal(torch.arange(40), (10_001,)).flatten().double()
    error = 1 / math.sqrt(len(drawn))
    assert abs(drawn.mean()) < 4 * error and abs(drawn.var() - 1) < 6 * error
    assert abs((drawn**3).mean()) < 16 * error and abs((drawn**4).mean() - 3) < 40 * error
    for bound in (0.5, 1.0, 2.0, 3.0):
        expected = math.erfc(bound / math.sqrt(2))
        assert abs(float((drawn.abs() > bound).double().mean()) - expected) < 5 * math.sqrt(expected) * error
    pairs = drawn[: len(drawn) // 2 * 2].reshape(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 6 * error


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_bits_are_all_used(seed: int) -> None:
    drawn = bits(torch.full((4000,), seed), torch.arange(4000))
    for place in range(64):
        assert abs(float(((drawn >> place) & 1).double().mean()) - 0.5) < 0.05


@pytest.mark.slow
def test_compiled_numbers_are_the_same_and_stay_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a count that is no multiple of a vector's: its index overflowed in the compiled loop, which ran on."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # one kernel needs no pool of processes
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)
    seeds = torch.arange(4) * 1234567891
    compiled = torch.compile(unwrap(bits16), dynamic=False)  # without the check of shapes, which is not compiled
    assert torch.equal(compiled(seeds, 2178), bits16(seeds, 2178))

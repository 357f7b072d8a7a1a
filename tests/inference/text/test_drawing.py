"""Draws by a hash of seed and position: uniform, independent, and of the right frequencies."""

import pytest
import torch

from keifu.inference.text.sampler import sample
from keifu.layers.counter_rng import BITS, UniformStreams, uniform

N = 40_000


def splitmix(state: int) -> int:
    """Return SplitMix64's finaliser of a state, in integers of any size (Steele, Lea and Flood, 2014, figure 14)."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (1, 5), (2**63 - 1, 100_000), (1234567890123456789, 8191)])
def test_equals_the_published_function(seed: int, position: int) -> None:
    golden = 0x9E3779B97F4A7C15
    state = splitmix((seed + golden) % 2**64)
    expected = (splitmix((state + (position + 1) * golden) % 2**64) >> (64 - BITS)) / 2**BITS
    assert uniform(torch.tensor([seed]), torch.tensor([position])).tolist() == [expected]


@pytest.mark.parametrize("along", ["positions", "seeds"])
def test_uniform_and_without_memory(along: str) -> None:
    many, one = torch.arange(N), torch.full((N,), 3)
    u = uniform(one, many) if along == "positions" else uniform(many, one)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u.float(), 50, 0, 1)
    chi_squared = ((counts - N / 50) ** 2 / (N / 50)).sum().item()
    assert 20 < chi_squared < 95  # 49 degrees of freedom: both bounds are beyond one in ten thousand
    for lag in (1, 2, 7):
        assert abs(torch.corrcoef(torch.stack([u[lag:], u[:-lag]]))[0, 1]) < 0.02


def test_draws_have_the_probabilities() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, float("-inf"), 1.0])
    u = uniform(torch.arange(N), torch.zeros(N, dtype=torch.long))
    counts = sample(logits.expand(N, 5), u).bincount(minlength=5)
    expected = logits.softmax(-1) * N
    assert counts[3] == 0
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 1e-9).all()


def test_ends_of_the_interval_never_draw_what_has_no_probability() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 3.0, float("-inf")]])
    assert sample(logits, torch.tensor([0.0], dtype=torch.float64)).tolist() == [1]
    assert sample(logits, torch.tensor([1 - 2.0**-BITS], dtype=torch.float64)).tolist() == [2]


def test_rows_do_not_depend_on_each_other() -> None:
    logits = torch.randn(6, 1001) * 3
    u = uniform(torch.arange(6), torch.full((6,), 9))
    together = sample(logits, u)
    assert together.tolist() == [sample(logits[i : i + 1], u[i : i + 1]).item() for i in range(6)]


def test_streams_give_the_numbers_of_their_seeds_and_positions() -> None:
    seeds, first = torch.tensor([0, 7, -(2**63), 2**63 - 1]), torch.tensor([0, 3, 2**40, 2**63 - 3])
    streams = UniformStreams(seeds, first)
    for step in range(5):
        assert torch.equal(streams.next(), uniform(seeds, first + step))

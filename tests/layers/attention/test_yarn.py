"""YaRN's bounds: which pairs of a head keep their frequency, which get the whole factor, where the bounds are cut."""

import math

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from keifu.layers.attention.positions import RopeScaling, Rotary

CASES = {
    "usual": {"factor": 4.0, "original": 4096},
    "low bound below 0": {"factor": 8.0, "original": 64},
    "high bound beyond the last pair": {"factor": 4.0, "original": 100_000, "beta_slow": 0.01},
    "both bounds are one": {"factor": 2.0, "original": 16, "beta_fast": 1.0, "beta_slow": 1.0},
    "not rounded": {"factor": 4.0, "original": 4096, "truncate": False},
    "other rotations": {"factor": 40.0, "original": 4096, "beta_fast": 17.0, "beta_slow": 2.5},
}  # fmt: skip


@pytest.mark.parametrize("theta", [1e4, 5e5, 500.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers(case: str, head_dim: int, theta: float) -> None:
    wanted = dict(CASES[case])
    factor, original = wanted.pop("factor"), int(wanted.pop("original"))
    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original}
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_parameters=rope | wanted,
        max_position_embeddings=int(original * factor),
    )  # fmt: skip
    theirs, size = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    scaling = RopeScaling("yarn", factor, original, **wanted)
    ours = Rotary(head_dim, theta, scaling)(torch.tensor([1]))
    angles = torch.atan2(ours.sin[0], ours.cos[0])
    torch.testing.assert_close(angles, theirs, rtol=2e-6, atol=1e-9)
    assert scaling.magnitude() == pytest.approx(size) == 0.1 * math.log(factor) + 1


def test_short_waves_stay_and_long_ones_are_stretched_by_the_whole_factor() -> None:
    plain, scaled = (Rotary(64, 1e4, each)(torch.tensor([1])) for each in (None, RopeScaling("yarn", 4.0, 4096)))
    ratio = torch.atan2(plain.sin[0], plain.cos[0]) / torch.atan2(scaled.sin[0], scaled.cos[0])
    rotations = 4096 * 1e4 ** (-torch.arange(0, 64, 2) / 64) / (2 * math.pi)
    low, high = (64 * math.log(4096 / (times * 2 * math.pi)) / (2 * math.log(1e4)) for times in (32, 1))
    pairs = torch.arange(32)
    torch.testing.assert_close(ratio[pairs <= math.floor(low)], torch.ones(math.floor(low) + 1))
    torch.testing.assert_close(ratio[pairs >= math.ceil(high)], torch.full((32 - math.ceil(high),), 4.0))
    assert (ratio[(pairs > low + 1) & (pairs < high - 1)] > 1).all() and ratio[rotations < 1].min() > 3.9


def test_longrope_uses_the_long_divisors_beyond_the_trained_length_and_not_at_it() -> None:
    """As in transformers: a sequence of exactly the trained length has the short ones."""
    scaling = RopeScaling("longrope", 4.0, 8, short_divisors=(1.0, 2.0), long_divisors=(4.0, 16.0))
    exponents = torch.tensor([0.0, 0.5])
    found = scaling.of_lengths(torch.tensor([[7], [8], [9]]), 100.0, exponents)
    torch.testing.assert_close(found, torch.tensor([[1, 1 / 20], [1, 1 / 20], [1 / 4, 1 / 160]]))

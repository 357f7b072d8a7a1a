"""The bigram baseline against counting by hand."""

import math
from collections import Counter

import numpy as np
import pytest

from keifu.evaluation.text import perplexity


def test_equals_counting_by_hand():
    random = np.random.default_rng(5)
    training, held_out = random.integers(0, 7, 200), random.integers(0, 7, 50)
    pairs, singles = Counter(zip(training[:-1], training[1:], strict=True)), Counter(training)
    before = Counter(training[:-1])
    losses = []
    for strength in perplexity.STRENGTHS:
        total = 0.0
        for a, b in zip(held_out[:-1], held_out[1:], strict=True):
            prior = (singles[b] + 1) / (len(training) + 7)
            total -= math.log((pairs[a, b] + strength * prior) / (before[a] + strength))
        losses.append(total / 49)
    assert perplexity.bigram_loss(training, held_out, 7) == pytest.approx(min(losses))


def test_a_rule_without_exception_costs_almost_nothing():
    tokens = np.arange(10_000) % 5
    assert perplexity.bigram_loss(tokens, tokens[:100], 5) < 0.01


def test_tokens_never_seen_are_finite():
    assert math.isfinite(perplexity.bigram_loss(np.array([0, 1, 0, 1]), np.array([2, 3, 2]), 4))

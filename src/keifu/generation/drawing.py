"""One token from each distribution by one uniform number that only the row's seed and place decide; knows no text.

There is no generator whose state could be shared: the number is a hash of (seed, position), so a row draws the same
whatever the other rows do and however many there are.

Axes: rows = independent distributions, vocab.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

BITS = 48  # of a uniform number: enough for any vocabulary, and its product with a total stays below the total


def uniform(seeds: Int[Tensor, " rows"], positions: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """A number in [0, 1), float64, for each seed and position: SplitMix64 (Steele, Lea and Flood, 2014), keyed by a
    hash of the seed, and counted by the position."""
    step = _signed(0x9E3779B97F4A7C15)
    mixed = _mix(_mix(seeds + step) + (positions + 1) * step)
    return _shifted(mixed, 64 - BITS).double() * 2.0**-BITS


def draw(logits: Float[Tensor, "rows vocab"], u: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """The first token at which the running sum of probabilities passes u (inverse transform sampling).

    One number a row suffices, where the Gumbel trick needs one for each token of the vocabulary. The sum is float64, so
    that rare tokens keep their share; tokens with no probability are never drawn.
    """
    mass = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True)[:, 0]


def _mix(x: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Int[Tensor, " rows"], bits: int) -> Int[Tensor, " rows"]:
    """x >> bits with zeros coming in, as for unsigned numbers; torch's shift repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(constant: int) -> int:
    """A constant of 64 bits as the signed number that an int64 tensor holds; products wrap round all the same."""
    return constant - 2**64 if constant >= 2**63 else constant

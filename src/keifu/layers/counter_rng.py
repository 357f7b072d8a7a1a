"""Counter-based random numbers (SplitMix64): a function of a seed and a position alone, without a generator's state.

A row's numbers are the same whatever the other rows are and however many there are, on any device.

Axes: rows = independent streams; the `...` after it are positions in a stream.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.layers.wide import narrow, wide

# SplitMix64's constants, as the signed numbers of an int64; products wrap round all the same. The counter's step is
# a tensor: an index times a plain number would be signed arithmetic of C++ in what torch.compile writes, where
# overflowing is undefined, and the loop around it ran past its end.
STEP = torch.tensor(0x9E3779B97F4A7C15 - 2**64, device="cpu")
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
BITS = 48  # of a uniform number: enough for any vocabulary, and its product with a total stays below the total


def bits(seeds: Int[Tensor, "*shape"], positions: Int[Tensor, "*#shape"]) -> Int[Tensor, "*shape"]:
    """Return 64 random bits for each seed and position: SplitMix64 (Steele, Lea and Flood, 2014), keyed by a hash of
    the seed, and counted by the position."""
    return _mix(_mix(seeds + STEP) + (positions + 1) * STEP)


def uniform(seeds: Int[Tensor, "*shape"], positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Draw a number in [0, 1) for each seed and position, float64 if the device has it."""
    return narrow(_unit(bits(wide(seeds), wide(positions))), seeds.device)


class UniformStreams:
    """Numbers of `uniform` for some seeds, from these positions on; a seed is hashed once and not at each position."""

    def __init__(self, seeds: Int[Tensor, " rows"], positions: Int[Tensor, " rows"]):
        self._device, self._keys = seeds.device, _mix(wide(seeds) + STEP)
        self._counts = (wide(positions) + 1) * STEP

    def next(self) -> Float[Tensor, " rows"]:
        """Draw the next number of each seed."""
        drawn = _unit(_mix(self._keys + self._counts))
        self._counts = self._counts + STEP
        return narrow(drawn, self._device)


def bits16(seeds: Int[Tensor, " rows"], count: int) -> Int[Tensor, "rows count"]:
    """Return 16 random bits for each of `count` places of each seed, as numbers from -2^15 to 2^15 - 1: for masks.

    Four places share one product of 64 bits, which is mixed less than in `bits` and has no bit that is not used:
    in place and without the masks of unsigned shifts, since a training step asks for billions.
    """
    counters = torch.arange((count + 3) // 4, device=seeds.device) * STEP
    mixed = seeds[:, None] + counters
    mixed ^= mixed >> 32
    mixed *= FIRST
    mixed ^= mixed >> 29
    mixed *= SECOND
    return mixed.view(torch.int16)[:, :count]


def normal(seeds: Int[Tensor, " rows"], shape: Sequence[int]) -> Float[Tensor, "rows ..."]:
    """Draw standard normal numbers of this shape for each seed, float32: the positions from 0 on, two numbers each.

    Box and Muller (1958) on two halves of 32 bits; so nothing lies beyond 6.7 standard deviations.
    """
    count, device, seeds = math.prod(shape), seeds.device, wide(seeds)
    counters = torch.arange((count + 1) // 2, device=seeds.device)
    drawn = bits(seeds[:, None].expand(-1, len(counters)), counters[None])
    radius = (_half(drawn, 32)).log_().mul_(-2).sqrt_()
    angle = _half(drawn, 0).mul_(2 * math.pi)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return pairs.flatten(1)[:, :count].float().reshape(-1, *shape).to(device)


def gumbel(seeds: Int[Tensor, " rows"], shape: Sequence[int]) -> Float[Tensor, "rows ..."]:
    """Return numbers of the standard Gumbel distribution of this shape for each seed, float32: the positions from 0 on.

    The largest of some logarithms of probabilities with such a number added to each is a draw from them (Gumbel, 1954).
    """
    device, seeds = seeds.device, wide(seeds)
    counters = torch.arange(math.prod(shape), device=seeds.device)
    drawn = bits(seeds[:, None].expand(-1, len(counters)), counters[None])
    return _half(drawn, 32).log_().neg_().log_().neg_().float().reshape(-1, *shape).to(device)


def _half(drawn: Int[Tensor, "*shape"], shift: int) -> Float[Tensor, "*shape"]:
    """Return 32 of the bits as a number between 0 and 1, neither of them, float64."""
    return ((drawn >> shift) & (2**32 - 1)).double().add_(0.5).mul_(2.0**-32)


def _unit(drawn: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return _shift(drawn, 64 - BITS).double() * 2.0**-BITS


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def _shift(x: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """Return x >> bits with zeros coming in, as for unsigned numbers; torch's shift repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)

"""Counter-based random numbers (SplitMix64): they depend only on a seed and a position; there is no generator state.

The numbers of a row do not depend on the other rows, their number, or the device.

Axes: rows = independent streams; `...` after it = positions in a stream.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.layers.wide import narrow, wide

# SplitMix64's constants, as signed int64 numbers; multiplication wraps around all the same. STEP is a tensor:
# torch.compile would multiply an index with a plain number in signed C++ arithmetic, whose overflow is undefined, and a
# loop ran past its end.
STEP = torch.tensor(0x9E3779B97F4A7C15 - 2**64, device="cpu")
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
BITS = 48  # bits of a uniform number: enough for any vocabulary, and the number times a total stays below the total


def bits(seeds: Int[Tensor, "*shape"], positions: Int[Tensor, "*#shape"]) -> Int[Tensor, "*shape"]:
    """Return 64 random bits for each seed and position: SplitMix64 (Steele, Lea and Flood, 2014) with a hash of the
    seed as key and the position as counter."""
    return _mix(_mix(seeds + STEP) + (positions + 1) * STEP)


def uniform(seeds: Int[Tensor, "*shape"], positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Draw a number in [0, 1) for each seed and position, float64 if the device supports it."""
    return narrow(_unit(bits(wide(seeds), wide(positions))), seeds.device)


class UniformStreams:
    """The numbers of `uniform` for some seeds, at consecutive positions. A seed is hashed once, not at each
    position."""

    def __init__(self, seeds: Int[Tensor, " rows"], positions: Int[Tensor, " rows"]):
        self._device, self._keys = seeds.device, _mix(wide(seeds) + STEP)
        self._counts = (wide(positions) + 1) * STEP

    def next(self) -> Float[Tensor, " rows"]:
        """Draw the next number of each seed."""
        uniform = _unit(_mix(self._keys + self._counts))
        self._counts = self._counts + STEP
        return narrow(uniform, self._device)


def bits16(seeds: Int[Tensor, " rows"], count: int) -> Int[Tensor, "rows count"]:
    """Return 16 random bits for each of `count` positions of each seed, as numbers from -2^15 to 2^15 - 1: for masks.

    Four positions share 64 bits, which are mixed less than in `bits`, in place and without unsigned shifts: speed
    matters, since a training step needs billions.
    """
    mixed = seeds[:, None] + torch.arange((count + 3) // 4, device=seeds.device) * STEP
    mixed ^= mixed >> 32
    mixed *= FIRST
    mixed ^= mixed >> 29
    mixed *= SECOND
    return mixed.view(torch.int16)[:, :count]


def normal(seeds: Int[Tensor, " rows"], shape: Sequence[int]) -> Float[Tensor, "rows ..."]:
    """Draw standard normal float32 numbers of this shape for each seed. Each position from 0 on gives two numbers.

    It uses the method of Box and Muller (1958) with two halves of 32 bits, so that no number exceeds 6.7 standard
    deviations.
    """
    count = math.prod(shape)
    random_bits = _first_bits(seeds, (count + 1) // 2)
    radius = (_half(random_bits, 32)).log_().mul_(-2).sqrt_()
    angle = _half(random_bits, 0).mul_(2 * math.pi)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
    return pairs.flatten(1)[:, :count].float().reshape(-1, *shape).to(seeds.device)


def gumbel(seeds: Int[Tensor, " rows"], shape: Sequence[int]) -> Float[Tensor, "rows ..."]:
    """Draw float32 numbers from the standard Gumbel distribution, of this shape for each seed, at the positions from 0
    on.

    The index of the largest sum of such a number and a log-probability is a sample of the distribution (Gumbel, 1954).
    """
    uniform = _half(_first_bits(seeds, math.prod(shape)), 32)
    return uniform.log_().neg_().log_().neg_().float().reshape(-1, *shape).to(seeds.device)


def _first_bits(seeds: Int[Tensor, " rows"], count: int) -> Int[Tensor, "rows count"]:
    """Return `bits` of the first `count` positions, on a device with 64-bit numbers."""
    seeds = wide(seeds)
    return bits(seeds[:, None].expand(-1, count), torch.arange(count, device=seeds.device)[None])


def _half(random_bits: Int[Tensor, "*shape"], shift: int) -> Float[Tensor, "*shape"]:
    """Return 32 of the bits as a float64 number between 0 and 1, both excluded."""
    return ((random_bits >> shift) & (2**32 - 1)).double().add_(0.5).mul_(2.0**-32)


def _unit(random_bits: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return _shift(random_bits, 64 - BITS).double() * 2.0**-BITS


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def _shift(x: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """Return x >> bits with zeros shifted in, as for unsigned numbers; torch's shift repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)

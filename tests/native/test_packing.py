"""Packed numbers compared with NumPy: the rounding error of int8 and int4, measured against the best possible codes.

The other tests compare native code with what packing made. Here the packing itself is compared with the numbers.
"""

from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from keifu.native import library as native
from keifu.native.library import open_library

pytestmark = pytest.mark.usefixtures("opened")
PAIR, GROUP = 64, 32  # columns that share a scale in int8, and a scale and a minimum in int4


def matrix(kind: str) -> Tensor:
    """Return 33 rows of 272 numbers: the last tile and the last super block are not full."""
    generator = torch.Generator().manual_seed(len(kind))
    x = torch.randn(33, 272, generator=generator)
    if kind == "outliers":
        x[:, ::41] *= 12
    if kind == "one sign":
        x = x.abs() + 0.1
    if kind == "tiny":
        x *= 1e-3
    if kind == "largest first":  # the scale of a pair of groups is that of its first number
        x[:, ::PAIR] = 5.0
    if kind == "largest last":
        x[:, PAIR - 1 :: PAIR] = -5.0
    return x


KINDS = ("normal", "outliers", "one sign", "tiny", "largest first", "largest last")


def round_trip(x: Tensor, format_: int) -> np.ndarray:
    """Return what the packed numbers stand for."""
    library = open_library()
    packed = torch.zeros(library.call("packed_size", format_, *x.shape) + 64, dtype=torch.uint8)
    start = packed.data_ptr() + -packed.data_ptr() % 64
    library.call("pack", format_, 0, x.data_ptr(), *x.shape, x.stride(0), start)
    out = torch.empty_like(x)
    library.call("unpack", format_, start, *x.shape, 0, len(x), out.data_ptr())
    return out.numpy().astype(np.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_wrong_by_half_a_scale_at_most(kind: str, instructions: str) -> None:
    x = matrix(kind)
    error = np.abs(round_trip(x, native.INT8_64) - x.numpy())
    for start in range(0, x.shape[1], PAIR):
        largest = x[:, start : start + PAIR].abs().amax(1, keepdim=True).numpy()
        scale = (largest / 127).astype(np.float16).astype(np.float64)
        assert (error[:, start : start + PAIR] <= scale / 2 * (1 + 1e-4)).all()


def best_affine(x: np.ndarray) -> np.ndarray:
    """Return the least squared error of codes 0 to 15 with a scale and a minimum of at most 0, for each group.

    Brute force: all pairs of 30 lower and 30 upper ends, each refined twice by least squares.
    """
    low = np.minimum(x.min(1, keepdims=True), 0.0)
    high = x.max(1, keepdims=True)
    least = np.full(len(x), np.inf)
    for shrink_low in np.linspace(0.6, 1.05, 30):
        for shrink_high in np.linspace(0.6, 1.05, 30):
            least_end = low * shrink_low
            scale = np.maximum((high * shrink_high - least_end) / 15, 1e-12)
            for _ in range(3):
                codes = np.clip(np.rint((x - least_end) / scale), 0, 15)
                least = np.minimum(least, ((codes * scale + least_end - x) ** 2).sum(1))
                centred = codes - codes.mean(1, keepdims=True)
                spread = np.maximum((centred**2).sum(1, keepdims=True), 1e-12)
                scale = np.maximum((centred * x).sum(1, keepdims=True) / spread, 1e-12)
                least_end = (x - codes * scale).mean(1, keepdims=True)
                through_zero = (codes * x).sum(1, keepdims=True) / np.maximum((codes**2).sum(1, keepdims=True), 1e-12)
                scale = np.where(least_end > 0, np.maximum(through_zero, 1e-12), scale)
                least_end = np.minimum(least_end, 0.0)
    return least


def grouped(kind: str) -> np.ndarray:
    """Return the numbers of a matrix in groups that share a scale in int4."""
    return matrix(kind)[:, :256].numpy().astype(np.float64).reshape(-1, GROUP)


@cache
def least_error(kind: str) -> float:
    """Return the least squared error of a matrix in int4, whatever packs it."""
    return float(best_affine(grouped(kind)).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_int4_is_nearly_as_good_as_the_best_affine_codes(kind: str, instructions: str) -> None:
    """The 4% are the rounding of scales and minima: to 8 bits, with 16 steps between the two groups of a pair."""
    packed = round_trip(matrix(kind)[:, :256], native.INT4_64).reshape(-1, GROUP)
    error = np.sqrt(((packed - grouped(kind)) ** 2).sum())
    best = np.sqrt(least_error(kind))
    assert error <= 1.04 * best

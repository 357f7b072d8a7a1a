"""Dequantisation of GGUF tensors: the commonest types by PyTorch on several threads, all others by the gguf package.

Both give the gguf package's numbers bit for bit. Axes: blocks = groups of numbers that share a scale, bytes = of one
block as it is stored, then its numbers.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Stored = UInt8[Tensor, "blocks bytes"]
Numbers = Float[Tensor, "blocks numbers"]
PIECE = 8192  # blocks that are read at once, so that what is computed stays in the processor's cache


def _q8_0(stored: Stored, out: Numbers) -> None:
    """Return a scale in float16, then 32 whole numbers."""
    out.copy_(stored[:, 2:].view(torch.int8)).mul_(_half(stored[:, :2]))


def _q4_0(stored: Stored, out: Numbers) -> None:
    """Return a scale in float16, then 32 numbers of four bits, of which 8 is zero."""
    _nibbles(stored[:, 2:], out).sub_(8).mul_(_half(stored[:, :2]))


def _q4_1(stored: Stored, out: Numbers) -> None:
    """Return a scale and the least number in float16, then 32 numbers of four bits."""
    _nibbles(stored[:, 4:], out).mul_(_half(stored[:, :2])).add_(_half(stored[:, 2:4]))


def _half(stored: Stored) -> Float[Tensor, "blocks 1"]:
    return stored.contiguous().view(torch.float16).float()


def _nibbles(stored: Stored, out: Numbers) -> Numbers:
    """Return the lower four bits of all bytes, then the upper ones."""
    out[:, :16] = stored & 15
    out[:, 16:] = stored >> 4
    return out


READERS: dict[str, Callable[[Stored, Numbers], None]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}


def _by_package(kind: str) -> Callable[[Stored, Numbers], None]:
    from gguf import GGMLQuantizationType, dequantize

    def read(stored: Stored, out: Numbers) -> None:
        out.copy_(torch.from_numpy(dequantize(stored.numpy(), GGMLQuantizationType[kind])))

    return read


def read_blocks(stored: Stored, kind: str, size: int) -> Numbers:
    """Return the numbers of blocks of this type, `size` of them in each, as float32."""
    read = READERS.get(kind) or _by_package(kind)
    numbers = torch.empty(len(stored), size, dtype=torch.float32, device="cpu")
    for start in range(0, len(stored), PIECE):
        read(stored[start : start + PIECE], numbers[start : start + PIECE])
    return numbers

"""Frozen linear layers whose matrices stay in GGUF blocks: the base of adapters (QLoRA, Dettmers et al., 2023), and
GGUF models on GPUs.

A block of Q4_0 has 32 numbers of a row. Each is a multiple, from -8 to 7, of the block's float16 scale. (The paper's
NF4 has 16 levels at quantiles of the normal distribution.) The numbers equal the gguf package's bit for bit. Axes:
blocks = groups of numbers that share a scale; bytes of a stored block; numbers of a block.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.linear import linear, product, product_dtype, triton_kernels

Stored = UInt8[Tensor, "blocks bytes"]
Numbers = Float[Tensor, "blocks numbers"]
SIZE = 32  # numbers of a block of Q4_0
IN_CACHE = 8192 * SIZE  # numbers unpacked at a time on a CPU, so that they fit its cache
AT_A_TIME = 2**24  # numbers unpacked at a time on a GPU, so that few are in float32


class Format(NamedTuple):
    """A type of blocks: the numbers and the bytes of a block, and the function that reads blocks."""

    numbers: int
    bytes: int
    read: Callable[[Stored, Numbers], None]


def _half(stored: Stored) -> Float[Tensor, "blocks 1"]:
    return stored.contiguous().view(torch.float16).float()


def _nibbles(stored: Stored, out: Numbers) -> Numbers:
    """Write the lower four bits of all bytes, then the upper ones, to `out`, and return it."""
    half = stored.shape[1]
    out[:, :half] = stored & 15
    out[:, half:] = stored >> 4
    return out


def _q8_0(stored: Stored, out: Numbers) -> None:
    """Read a scale in float16, then 32 signed bytes."""
    out.copy_(stored[:, 2:].view(torch.int8)).mul_(_half(stored[:, :2]))


def _q4_0(stored: Stored, out: Numbers) -> None:
    """Read a scale in float16, then 32 four-bit numbers, offset by 8."""
    _nibbles(stored[:, 2:], out).sub_(8).mul_(_half(stored[:, :2]))


def _q4_1(stored: Stored, out: Numbers) -> None:
    """Read a scale and a minimum in float16, then 32 four-bit numbers."""
    _nibbles(stored[:, 4:], out).mul_(_half(stored[:, :2])).add_(_half(stored[:, 2:4]))


def _q4_k(stored: Stored, out: Numbers) -> None:
    """Read two factors in float16, 8 scales and 8 minima of six bits, then 8 groups of 32 four-bit numbers."""
    low, middle, high = stored[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([low & 63, (high & 15) | (low >> 2 & 48)], 1) * _half(stored[:, :2])
    minima = torch.cat([middle & 63, high >> 4 | (middle >> 2 & 48)], 1) * _half(stored[:, 2:4])
    pairs = stored[:, 16:].reshape(-1, SIZE)
    groups = _nibbles(pairs, out.view(len(pairs), 2 * SIZE)).view(-1, 8, SIZE)
    groups.mul_(scales[..., None]).sub_(minima[..., None])


def _q6_k(stored: Stored, out: Numbers) -> None:
    """Read 256 six-bit numbers, offset by 32: their lower four bits and upper two bits; then 16 scales and their
    factor."""
    low, high = stored[:, :128].unflatten(1, (2, 1, 64)), stored[:, 128:192].unflatten(1, (2, 1, SIZE))
    lower = torch.cat([low & 15, low >> 4], 2).view(-1, 2, 4, SIZE)
    upper = torch.cat([high & 3, high >> 2 & 3, high >> 4 & 3, high >> 6], 2)
    scales = stored[:, 192:208].view(torch.int8) * _half(stored[:, 208:])
    out.copy_((lower | upper << 4).flatten(1)).sub_(32)
    out.view(-1, 16, 16).mul_(scales[..., None])


FORMATS = {
    "Q4_0": Format(SIZE, 18, _q4_0), "Q4_1": Format(SIZE, 20, _q4_1), "Q8_0": Format(SIZE, 34, _q8_0),
    "Q4_K": Format(256, 144, _q4_k), "Q6_K": Format(256, 210, _q6_k),
}  # fmt: skip


def pack(weight: Float[Tensor, "out in"]) -> Stored:
    """Quantise a matrix to blocks of Q4_0. In each block, the number farthest from 0 becomes -8 times the scale."""
    blocks = weight.detach().float().view(-1, SIZE)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    steps = (blocks / torch.where(scale == 0, 1.0, scale) + 8.5).floor().clamp(0, 15).to(torch.uint8)
    return torch.cat([scale.half().view(torch.uint8), steps[:, :16] | steps[:, 16:] << 4], 1)


def unpack(stored: Stored, format: str, dtype: torch.dtype = torch.float32) -> Numbers:
    """Return the numbers of blocks of a type of `FORMATS`, computed in float32 and rounded once."""
    kernels = triton_kernels(stored.device)
    if kernels is not None and format in kernels.KINDS:
        return kernels.unpack(stored, kernels.KINDS[format], dtype)
    size, _, read_blocks = FORMATS[format]
    numbers = stored.new_empty(len(stored), size, dtype=dtype)
    step = (IN_CACHE if stored.device.type == "cpu" else AT_A_TIME) // size
    for start in range(0, len(stored), step):
        part = numbers[start : start + step]
        exact = part if dtype == torch.float32 else part.new_empty(part.shape, dtype=torch.float32)
        read_blocks(stored[start : start + step], exact)
        if exact is not part:
            part.copy_(exact)
    return numbers


class QuantizedLinear(nn.Module):
    """Frozen linear layer that unpacks its matrix for each forward and backward pass, and does not store it.

    Each row must be whole blocks. The blocks are not in the state dict: they are read again from the model's file.

    parts: blocks of consecutive rows, each with their type; None quantises the matrix of `layer` to Q4_0.
    """

    def __init__(self, layer: nn.Linear, parts: Sequence[tuple[str, Stored]] | None = None):
        super().__init__()
        if parts is None and layer.in_features % SIZE:
            raise UserError(f"{layer.in_features} inputs are no whole blocks of {SIZE}: leave --lora.base at float.")
        by_format = groupby(parts or [("Q4_0", pack(layer.weight))], key=lambda part: part[0])
        joined = [(format, [blocks for _, blocks in group]) for format, group in by_format]
        self.shape, self.kinds = layer.weight.shape, [format for format, _ in joined]
        for number, (_, blocks) in enumerate(joined):
            self.register_buffer(f"blocks{number}", torch.cat(blocks), persistent=False)
        self.layer = layer  # its bias and dtype are used; merging adapters fills in its weight
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        dtype = product_dtype(x)
        return _Product.apply(x.to(dtype), self, None if self.bias is None else self.bias.to(dtype))

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of the layer."""
        return self.layer.bias

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Return the unpacked matrix."""
        return self.unpacked(self.layer.weight.dtype)

    @property
    def stored(self) -> list[tuple[str, Stored]]:
        """Return the blocks, with their types."""
        return [(format, self.get_buffer(f"blocks{number}")) for number, format in enumerate(self.kinds)]

    def unpacked(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the unpacked matrix in a dtype."""
        parts = [unpack(blocks, format, dtype).view(-1, self.shape[1]) for format, blocks in self.stored]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def product(self, x: Float[Tensor, "*batch in"], bias: Tensor | None) -> Float[Tensor, "*batch out"]:
        """Return x @ weight.T + bias. For few tokens, kernels multiply with the blocks directly, if there are
        kernels."""
        kernels = triton_kernels(x.device)
        if kernels is None or x.numel() > kernels.FEW * x.shape[-1] or not {*self.kinds} <= kernels.KINDS.keys():
            return linear(x, self.unpacked(x.dtype), bias)
        rows = x.reshape(-1, x.shape[-1])
        parts = [kernels.product(rows, blocks, kernels.KINDS[format]) for format, blocks in self.stored]
        y = torch.cat(parts, -1).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return layer.product(x, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        bias = upstream[0].reshape(-1, ctx.layer.shape[0]).sum(0) if ctx.needs_input_grad[2] else None
        return product(upstream[0], ctx.layer.unpacked(upstream[0].dtype)), None, bias

"""Frozen linear layers in blocks of 4 bits, as the base of adapters (QLoRA, Dettmers et al., 2023).

A block is GGUF's Q4_0: 32 numbers of a row, each a multiple from -8 to 7 of the block's scale in float16. (The paper's
NF4 has 16 levels at quantiles of the normal distribution.) Axes: blocks, bytes = 18 of a block.
"""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.linear import linear, product

SIZE = 32  # numbers of a block
Blocks = UInt8[Tensor, "blocks 18"]


def pack(weight: Float[Tensor, "out in"]) -> Blocks:
    """Return the blocks of a matrix; its number farthest from 0 is -8 times a block's scale."""
    blocks = weight.detach().float().view(-1, SIZE)
    farthest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = farthest / -8
    steps = (blocks / torch.where(scale == 0, 1.0, scale) + 8.5).floor().clamp(0, 15).to(torch.uint8)
    return torch.cat([scale.half().view(torch.uint8), steps[:, :16] | steps[:, 16:] << 4], 1)


def unpack(blocks: Blocks, dtype: torch.dtype) -> Float[Tensor, "blocks 32"]:
    """Return the numbers of blocks."""
    scale, steps = blocks[:, :2].contiguous().view(torch.float16), blocks[:, 2:]
    both = torch.cat([steps & 15, steps >> 4], 1)
    return ((both.to(torch.float32) - 8) * scale.float()).to(dtype)


class QuantizedLinear(nn.Module):
    """Frozen linear layer whose matrix is unpacked when it is needed, forward and backward, and not kept between.

    Its rows must be whole blocks. The blocks are no part of a state: they are made again from the model's file.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        if layer.in_features % SIZE:
            raise UserError(f"{layer.in_features} inputs are no whole blocks of {SIZE}: leave --lora.base at float.")
        self.shape, self.dtype = layer.weight.shape, layer.weight.dtype
        self.register_buffer("blocks", pack(layer.weight), persistent=False)
        self.blocks: Tensor
        self.layer = layer  # its bias, and what it is when adapters are merged
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return _Product.apply(x.to(kind), self.blocks, self.shape, None if self.bias is None else self.bias.to(kind))

    @property
    def bias(self) -> Tensor | None:
        """Return the bias of the layer."""
        return self.layer.bias

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """Return the matrix, unpacked."""
        return unpack(self.blocks, self.dtype).view(self.shape)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor, shape: torch.Size, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(blocks)
        ctx.shape = shape
        return linear(x, unpack(blocks, x.dtype).view(shape), bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (blocks,) = ctx.saved_tensors
        return product(upstream[0], unpack(blocks, upstream[0].dtype).view(ctx.shape)), None, None, None

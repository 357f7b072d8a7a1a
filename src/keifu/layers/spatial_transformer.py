"""Transformer blocks over the pixels of a picture that look at something else too, such as a text; knows no model.

What is looked at does not change from step to step of a drawing, so its keys and values are made once (`memories`) and
handed to every block. Axes: batch, channels, height, width; seen = tokens of what is looked at.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.layers.attention import CrossAttention, Mask
from keifu.layers.blocks import CrossPreNorm
from keifu.layers.convolution import EVERYWHERE, Pixels

Memories = Mapping[nn.Module, tuple[Tensor, Tensor]]  # of each cross-attention: [batch, heads, seen, head_dim] twice


class PixelLinear(nn.Linear):
    """A `Linear` over the channels of each pixel: a 1×1 convolution whose weight is a plain matrix."""

    def forward(self, input: Pixels) -> Pixels:  # noqa: A002 (torch's name)
        return F.linear(input.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class SpatialTransformer(nn.Module):
    """x + last(blocks(first(norm(x)))), a pixel a token (Rombach et al., 2022, appendix E.2.1).

    first, last: from pixels to pixels, 1×1 convolutions or `PixelLinear`.
    """

    def __init__(self, norm: nn.Module, first: nn.Module, blocks: Sequence[CrossPreNorm], last: nn.Module):
        super().__init__()
        self.norm, self.first, self.blocks, self.last = norm, first, nn.ModuleList(blocks), last

    def forward(self, x: Pixels, memories: Memories, memory_mask: Mask) -> Pixels:
        tokens = self.first(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2)
        for block in self.blocks:
            assert isinstance(block, CrossPreNorm)
            tokens = block(tokens, memories[block.cross_attention], memory_mask, mask=EVERYWHERE)
        return x + self.last(tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))


def memories(network: nn.Module, context: Float[Tensor, "batch seen context_dim"]) -> Memories:
    """Keys and values of a context for every cross-attention of a network."""
    return {module: module.project(context) for module in network.modules() if isinstance(module, CrossAttention)}

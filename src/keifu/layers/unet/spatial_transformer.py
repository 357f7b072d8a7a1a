"""Spatial transformer: self-attention over the pixels of an image, and cross-attention to a condition such as a text.

The condition is the same at every sampling step, so its keys and values are computed once (`memories`) and passed to
every block. Axes: batch, channels, height, width; seen = tokens of the condition.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.attention import CrossAttention, attend
from keifu.layers.attention.masks import Mask
from keifu.layers.linear import JoinedLinear, Linear, linear
from keifu.layers.transformer.blocks import CrossPreNorm
from keifu.layers.unet.conv import EVERYWHERE, Norm, Pixels

# keys and values of each attention, (batch, heads, seen, head_dim) both
Memories = Mapping[nn.Module, tuple[Tensor, Tensor]]


class PixelLinear(nn.Linear):
    """A `Linear` over the channels of each pixel: a 1×1 convolution whose weight is a plain matrix."""

    def forward(self, input: Pixels) -> Pixels:  # noqa: A002 (torch's name)
        return linear(input.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class SpatialTransformer(nn.Module):
    """Layer x + last(blocks(first(norm(x)))), where each pixel is a token (Rombach et al., 2022, appendix E.2.1).

    first, last: 1×1 convolutions or `PixelLinear`.
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


class JointAttention(nn.Module):
    """Layer x + attention(norm(x)) from pixels to a context and to the pixels, in one softmax: the context's keys and
    values precede the pixels' (GLIDE, Nichol et al., 2021, section 2.3)."""

    def __init__(self, channels: int, head_dim: int, context_dim: int, norm: Norm):
        super().__init__()
        if channels % head_dim:
            raise UserError(f"head_dim ({head_dim}) must divide {channels} channels; choose another number.")
        self.head_dim, self.norm = head_dim, norm(channels)
        self.qkv, self.kv = JoinedLinear(channels, (channels,) * 3), JoinedLinear(context_dim, (channels,) * 2)
        self.out = Linear(channels, channels)

    def project(self, context: Float[Tensor, "batch seen context_dim"]) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a context, (batch, heads, seen, head_dim) each."""
        k, v = self._heads(self.kv(context), 2)
        return k, v

    def forward(self, x: Pixels, memories: Memories, memory_mask: Mask) -> Pixels:
        q, *keys_values = self._heads(self.qkv(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)), 3)
        k, v = (torch.cat(both, 2) for both in zip(memories[self], keys_values, strict=True))
        visible = memory_mask.visible(k.shape[2] - q.shape[2], None)
        if isinstance(visible, Tensor):
            visible = F.pad(visible, (0, q.shape[2]), value=True)
        return x + self.out(attend(q, k, v, visible)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _heads(self, joined: Float[Tensor, "batch length rows"], parts: int) -> tuple[Tensor, ...]:
        split = joined.chunk(parts, -1)
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in split)


def memories(network: nn.Module, context: Float[Tensor, "batch seen context_dim"]) -> Memories:
    """Return the keys and values of a context for every attention of a network that attends to one."""
    return {module: module.project(context) for module in network.modules() if isinstance(module, CROSS)}


CROSS = CrossAttention, JointAttention  # attentions whose keys and values are computed outside of their blocks

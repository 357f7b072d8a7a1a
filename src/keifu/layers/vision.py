"""What a network sees pictures with: patches as tokens, a residual block that does not alias, pooling by attention.

It knows no model. Axes: batch, channels, rows and columns of pixels or of what is left of them, patches, dim.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention import attend
from keifu.layers.linear import JoinedLinear, Linear
from keifu.layers.positions import LearnedPositions

Pixels = Float[Tensor, "batch channels rows columns"]


class PatchEmbedding(nn.Module):
    """A picture as a sequence of tokens (ViT, Dosovitskiy et al., 2020): its patches, each through one matrix, after a
    learned token for the whole; learned positions are added. What is left over at the right and below is not seen."""

    def __init__(self, image_size: int, patch_size: int, channels: int, dim: int):
        super().__init__()
        if not 0 < patch_size <= image_size:
            raise UserError(f"A patch of {patch_size} pixels does not fit a picture of {image_size}.")
        self.image_size = image_size
        self.patches = nn.Conv2d(channels, dim, patch_size, patch_size, bias=False)
        self.whole = nn.Parameter(torch.empty(dim))
        self.positions = LearnedPositions((image_size // patch_size) ** 2 + 1, dim)

    def forward(self, pixels: Pixels) -> Float[Tensor, "batch length dim"]:
        check_size(pixels, self.image_size)
        x = self.patches(pixels).flatten(2).mT
        return torch.cat([self.whole.expand(len(x), 1, -1), x], 1) + self.positions.weight


def check_size(pixels: Tensor, image_size: int) -> None:
    """A ValueError with the one size that a network with learned positions takes, where a picture has another one."""
    rows, columns = pixels.shape[-2:]
    if (rows, columns) != (image_size, image_size):
        raise UserError(f"Pictures of {columns} x {rows} pixels: this network takes {image_size} x {image_size}.")


class AntialiasedBottleneck(nn.Module):
    """ResNet's block of 1 x 1, 3 x 3 and 1 x 1 convolutions, four times as wide at its end (He et al., 2015), where a
    stride is an average over its pixels instead of leaving pixels out (Zhang, 2019; CLIP, section 2.4)."""

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut, self.shortcut_norm = None, None
        if stride > 1 or channels != 4 * width:
            self.shortcut, self.shortcut_norm = nn.Conv2d(channels, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)

    def forward(self, x: Pixels) -> Float[Tensor, "batch out_channels out_rows out_columns"]:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        y = self.norm3(self.conv3(self.pool(y)))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(self.pool(x)))
        return F.relu(y + x, inplace=True)


class AttentionPool(nn.Module):
    """One vector for all places of a picture: their mean asks, all of them and the mean answer (CLIP, section 2.4)."""

    def __init__(self, places: int, dim: int, n_heads: int, out_dim: int):
        super().__init__()
        if dim % n_heads:
            raise UserError(f"n_heads ({n_heads}) must divide {dim}, the width of what is pooled.")
        self.n_heads = n_heads
        self.positions = LearnedPositions(places + 1, dim)
        self.q, self.kv, self.out = Linear(dim, dim), JoinedLinear(dim, (dim, dim)), Linear(dim, out_dim)

    def forward(self, x: Pixels) -> Float[Tensor, "batch out_dim"]:
        x = x.flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positions.weight
        q, k, v = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in (self.q(x[:, :1]), *self.kv(x).chunk(2, -1))
        )
        return self.out(attend(q, k, v)[:, 0])

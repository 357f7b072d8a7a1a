"""CLIP's image encoders (Radford et al., 2021, section 2.4): a vision transformer with an additional norm at its start;
and a ResNet with three changes: three convolutions in the stem, antialiased strides (average pooling), and attention
pooling instead of global average pooling.

Axes: batch, channels, rows and columns of pixels or of a feature map; length = 1 + patches, dim, embedding = the space
shared with captions.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.attention import attend
from keifu.layers.attention.masks import PaddingMask
from keifu.layers.attention.positions import LearnedPositions
from keifu.layers.initialisation import multihead_
from keifu.layers.linear import JoinedLinear, Linear
from keifu.models.clip.text import ENCODER_FIELDS, block, layer_names, with_projection
from keifu.models.hf import config as hf
from keifu.ranges import BelowOne, Count, NotNegative

Pixels = Float[Tensor, "batch channels rows columns"]


class PatchEmbedding(nn.Module):
    """Conversion of an image to tokens (ViT, Dosovitskiy et al., 2020): a learned class token, then each patch
    multiplied by a matrix, plus learned positions. Pixels at the right and bottom that do not fill a patch are cut off.
    """

    def __init__(self, image_size: int, patch_size: int, channels: int, dim: int):
        super().__init__()
        if not 0 < patch_size <= image_size:
            raise UserError(f"A patch of {patch_size} pixels does not fit an image of {image_size}.")
        self.image_size = image_size
        self.patches = nn.Conv2d(channels, dim, patch_size, patch_size, bias=False)
        self.whole = nn.Parameter(torch.empty(dim))
        self.positions = LearnedPositions((image_size // patch_size) ** 2 + 1, dim)

    def forward(self, pixels: Pixels) -> Float[Tensor, "batch length dim"]:
        check_size(pixels, self.image_size)
        x = self.patches(pixels).flatten(2).mT
        return torch.cat([self.whole.expand(len(x), 1, -1), x], 1) + self.positions.weight


def check_size(pixels: Tensor, image_size: int) -> None:
    """Raise UserError for images of another size than `image_size`, which the learned positions require."""
    rows, columns = pixels.shape[-2:]
    if (rows, columns) != (image_size, image_size):
        raise UserError(f"Pictures of {columns} x {rows} pixels: this network takes {image_size} x {image_size}.")


class AntialiasedBottleneck(nn.Module):
    """ResNet's block of 1 x 1, 3 x 3 and 1 x 1 convolutions, four times as wide at its end (He et al., 2015). A stride
    averages pixels instead of skipping them (Zhang, 2019; CLIP, section 2.4)."""

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        same = stride == 1 and channels == 4 * width
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, 4 * width, 1, bias=False)
        self.shortcut_norm = nn.Identity() if same else nn.BatchNorm2d(4 * width)

    def forward(self, x: Pixels) -> Float[Tensor, "batch out_channels out_rows out_columns"]:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        y = self.norm3(self.conv3(self.pool(y)))
        return F.relu(y + self.shortcut_norm(self.shortcut(self.pool(x))), inplace=True)


class AttentionPool(nn.Module):
    """Attention pooling of a feature map: the query is the mean of all positions; keys and values are the mean and all
    positions (CLIP, section 2.4)."""

    def __init__(self, positions: int, dim: int, n_heads: int, out_dim: int):
        super().__init__()
        if dim % n_heads:
            raise UserError(f"n_heads ({n_heads}) must divide {dim}, the width of what is pooled.")
        self.n_heads = n_heads
        self.positions = LearnedPositions(positions + 1, dim)
        self.q, self.kv, self.out = Linear(dim, dim), JoinedLinear(dim, (dim, dim)), Linear(dim, out_dim)

    def forward(self, x: Pixels) -> Float[Tensor, "batch out_dim"]:
        x = x.flatten(2).mT
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positions.weight
        q, k, v = (
            part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in (self.q(x[:, :1]), *self.kv(x).chunk(2, -1))
        )
        return self.out(attend(q, k, v)[:, 0])


@dataclass(frozen=True)
class Config:
    """The defaults are the vision transformer of ViT-B/32. projected: False leaves out the last matrix, into the shared
    space. The sizes are in clip.py, with their text encoders."""

    image_size: Count = 224  # side of the image in pixels
    patch_size: Count = 32  # side of a patch in pixels
    channels: Count = 3  # channels of the image
    dim: Count = 768  # width of the hidden states
    hidden_dim: Count = 3072  # width inside the feed-forward layers
    n_layers: Count = 12  # Transformer blocks
    n_heads: Count = 12  # attention heads
    norm_eps: NotNegative = 1e-5  # number ε in the normalisation
    activation: str = "quick_gelu"  # activation of the feed-forward layers
    attention_dropout: BelowOne = 0.0  # share of dropped attention weights
    embedding_dim: Count = 512  # width of the shared space
    projected: bool = True  # whether there is a matrix into the shared space
    class_tokens: ClassVar[int] = 1


@dataclass(frozen=True)
class ResNetConfig:
    """The defaults are RN50. The blocks of the first stage widen `width` four times; the pooling's width is 32 times
    `width`."""

    image_size: Count = 224  # side of the image in pixels
    width: Count = 64  # width of the first stage
    layers: tuple[Count, ...] = (3, 4, 6, 3)  # blocks of the four stages
    n_heads: Count = 32  # attention heads of the pooling
    embedding_dim: Count = 1024  # width of the shared space


class VisionTransformer(nn.Module):
    """A class token and patches through blocks. The class token's last state represents the image."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = PatchEmbedding(config.image_size, config.patch_size, config.channels, config.dim)
        self.first_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.projection = Linear(config.dim, config.embedding_dim, bias=False) if config.projected else nn.Identity()

    def encode(self, pixels: Pixels) -> Float[Tensor, "batch length dim"]:
        """Return the hidden states of the class token and of each patch, before the last norm. Pixels are normalised as
        in training."""
        return deque(self.states(pixels), maxlen=1).pop()

    def states(self, pixels: Pixels) -> Iterator[Float[Tensor, "batch length dim"]]:
        """Yield the normalised embeddings, then the hidden states after each block."""
        x, everything = self.first_norm(self.embedding(pixels)), PaddingMask()
        yield x
        for layer in self.blocks:
            x = layer(x, mask=everything)
            yield x

    def forward(self, pixels: Pixels) -> Float[Tensor, "batch embedding"]:
        """Return an embedding for each image, not normalised. Without a projection: the class token's state after its
        norm."""
        return self.projection(self.norm(self.encode(pixels)[:, 0]))


class ResNet(nn.Module):
    """Three convolutions, four stages of blocks, attention pooling."""

    def __init__(self, config: ResNetConfig):
        super().__init__()
        if len(config.layers) != 4 or config.image_size < 32:
            raise UserError(f"A ResNet has 4 stages and sees 32 pixels: not {config.layers} and {config.image_size}.")
        self.config, width = config, config.width
        self.conv1, self.norm1 = nn.Conv2d(3, width // 2, 3, 2, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.norm2 = nn.Conv2d(width // 2, width // 2, 3, 1, 1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.norm3 = nn.Conv2d(width // 2, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stages = nn.ModuleDict()
        for number, layers in enumerate(config.layers):
            inner, before = width * 2**number, width * (2 ** (number + 1) if number else 1)
            first = AntialiasedBottleneck(before, inner, stride=2 if number else 1)
            later_blocks = (AntialiasedBottleneck(4 * inner, inner) for _ in range(layers - 1))
            self.stages[f"layer{number + 1}"] = nn.Sequential(first, *later_blocks)
        self.pool = AttentionPool((config.image_size // 32) ** 2, 32 * width, config.n_heads, config.embedding_dim)

    def forward(self, pixels: Pixels) -> Float[Tensor, "batch embedding"]:
        """Return an embedding for each image, not normalised. Pixels are normalised as in training."""
        check_size(pixels, self.config.image_size)
        x = F.relu(self.norm1(self.conv1(pixels)), inplace=True)
        x = F.relu(self.norm2(self.conv2(x)), inplace=True)
        x = F.avg_pool2d(F.relu(self.norm3(self.conv3(x)), inplace=True), 2)
        for stage in self.stages.values():
            x = stage(x)
        return self.pool(x)


def build(config: Config) -> VisionTransformer:
    """Build a vision transformer with the released code's initialisation: PyTorch's default, but embeddings and
    projection scaled by the width."""
    model, std = VisionTransformer(config), config.dim**-0.5
    multihead_(model)
    nn.init.normal_(model.embedding.whole, std=std)
    nn.init.normal_(model.embedding.positions.weight, std=std)
    if isinstance(model.projection, Linear):
        nn.init.normal_(model.projection.weight, std=std)
    return model


def build_resnet(config: ResNetConfig) -> ResNet:
    """Build a ResNet with the released code's initialisation: pooling scaled by its width, and the last norm of every
    block zero."""
    model, std = ResNet(config), (32 * config.width) ** -0.5
    nn.init.normal_(model.pool.positions.weight, std=std)
    for linear in (model.pool.q, model.pool.kv, model.pool.out):
        nn.init.normal_(linear.weight, std=std)
    for name, parameter in model.stages.named_parameters():
        if name.endswith("norm3.weight"):
            nn.init.zeros_(parameter)
    return model


BUILDERS: dict[type, Any] = {Config: build, ResNetConfig: build_resnet}

_EMBEDDINGS = "vision_model.embeddings"
WEIGHT_NAMES = {
    "embedding.whole": f"{_EMBEDDINGS}.class_embedding",
    "embedding.patches": f"{_EMBEDDINGS}.patch_embedding",
    "embedding.positions": f"{_EMBEDDINGS}.position_embedding",
    "first_norm": "vision_model.pre_layrnorm",  # the published spelling
    **layer_names("vision_model"),
    "norm": "vision_model.post_layernorm",
    "projection": "visual_projection",
}
PREFIX = "vision_model."
WITHOUT_PREFIX = ("CLIPVisionModel",)
NOT_WEIGHTS = ("vision_model.embeddings.position_ids",)
MODEL_TYPES = {"clip_vision_model": "CLIPVisionModel"}
KEIFU_TYPE = "keifu_clip_image"
WRITES_TEXT = False
IN_FILE = {"projected": "visual_projection.weight"}

FIELDS: hf.Fields = ENCODER_FIELDS | {
    "dim": hf.Field("hidden_size", 768),
    "hidden_dim": hf.Field("intermediate_size", 3072),
    "n_heads": hf.Field("num_attention_heads", 12),
    "image_size": hf.Field("image_size", 224, lambda size: square(size, "image_size")),
    "patch_size": hf.Field("patch_size", 32, lambda size: square(size, "patch_size")),
    "channels": hf.Field("num_channels", 3),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a config.json of model_type clip_vision_model, or of the vision_config in a CLIP's."""
    return Config(**hf.read_fields(json, FIELDS), projected=with_projection(json, "CLIPVisionModel"))


def square(size: Any, name: str) -> int:
    """Read a size that may be written as two equal numbers. Raises UserError for others."""
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1 or not isinstance(next(iter(sides)), int):
        raise UserError(f"{name} is {size!r}, and CLIP is implemented for squares only.")
    return sides.pop()


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers reads."""
    return {
        **hf.write(config, MODEL_TYPES, FIELDS),
        "architectures": [f"CLIPVisionModel{'WithProjection' if config.projected else ''}"],
    }

"""CLIP's image towers (Radford et al., 2021, section 2.4): a vision transformer with one more norm at its start, and a
ResNet with three changes: three small convolutions at the start, strides that average, attention in place of the last
average. This file knows nothing of words, training or files.

Axes: batch, channels, rows, columns of pixels; length = 1 + patches, dim, embedding = the space shared with captions.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention import PaddingMask
from keifu.layers.initialisation import multihead_
from keifu.layers.linear import Linear
from keifu.layers.vision import AntialiasedBottleneck, AttentionPool, PatchEmbedding, check_size
from keifu.models._published import activation_name
from keifu.models.clip_text import block, layer_names, projected, tower_to_published

Pixels = Float[Tensor, "batch channels rows columns"]


@dataclass(frozen=True)
class Config:
    """The defaults are the vision transformer of ViT-B/32. Without `projected` the last matrix, into the shared space,
    is left out."""

    image_size: int = 224
    patch_size: int = 32
    channels: int = 3
    dim: int = 768
    hidden_dim: int = 3072
    n_layers: int = 12
    n_heads: int = 12
    norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    attention_dropout: float = 0.0
    embedding_dim: int = 512
    projected: bool = True


@dataclass(frozen=True)
class ResNetConfig:
    """The defaults are RN50. `width` is that of the first stage, which its blocks widen four times; `layers` are the
    blocks of the four stages, `n_heads` those of the pooling, whose dim is 32 times the width."""

    image_size: int = 224
    width: int = 64
    layers: tuple[int, ...] = (3, 4, 6, 3)
    n_heads: int = 32
    embedding_dim: int = 1024


SIZES: dict[str, Config] = {}  # they come with their text towers, in clip.py
PAPER_PARAMETERS: dict[str, float] = {}


class VisionTransformer(nn.Module):
    """Patches and a token for the whole, through blocks; the token for the whole stands for the picture."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = PatchEmbedding(config.image_size, config.patch_size, config.channels, config.dim)
        self.first_norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.projection = Linear(config.dim, config.embedding_dim, bias=False) if config.projected else None

    def encode(self, pixels: Pixels) -> Float[Tensor, "batch length dim"]:
        """Hidden states of the whole and of each patch, before the last norm. Pixels are normalised as in training."""
        x, everything = self.first_norm(self.embedding(pixels)), PaddingMask()
        for each in self.blocks:
            x = each(x, mask=everything)
        return x

    def forward(self, pixels: Pixels) -> Float[Tensor, "batch embedding"]:
        """A vector for each picture, of any length; without `projected` that of the whole after its norm."""
        pooled = self.norm(self.encode(pixels)[:, 0])
        return pooled if self.projection is None else self.projection(pooled)


class ResNet(nn.Module):
    """Three convolutions, four stages of blocks, pooling by attention."""

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
            rest = (AntialiasedBottleneck(4 * inner, inner) for _ in range(layers - 1))
            self.stages[f"layer{number + 1}"] = nn.Sequential(first, *rest)
        self.pool = AttentionPool((config.image_size // 32) ** 2, 32 * width, config.n_heads, config.embedding_dim)

    def forward(self, pixels: Pixels) -> Float[Tensor, "batch embedding"]:
        """A vector for each picture, of any length. Pixels are normalised as in training."""
        check_size(pixels, self.config.image_size)
        x = F.relu(self.norm1(self.conv1(pixels)), inplace=True)
        x = F.relu(self.norm2(self.conv2(x)), inplace=True)
        x = F.avg_pool2d(F.relu(self.norm3(self.conv3(x)), inplace=True), 2)
        for stage in self.stages.values():
            x = stage(x)
        return self.pool(x)


def build(config: Config) -> VisionTransformer:
    """A vision transformer as the released code begins it: torch's own layers but for what is drawn by its width."""
    model, std = VisionTransformer(config), config.dim**-0.5
    multihead_(model)
    nn.init.normal_(model.embedding.whole, std=std)
    nn.init.normal_(model.embedding.positions.weight, std=std)
    if model.projection is not None:
        nn.init.normal_(model.projection.weight, std=std)
    return model


def build_resnet(config: ResNetConfig) -> ResNet:
    """A ResNet as the released code begins it: pooling drawn by its width, and every block adds nothing at first."""
    model, std = ResNet(config), (32 * config.width) ** -0.5
    nn.init.normal_(model.pool.positions.weight, std=std)
    for linear in (model.pool.q, model.pool.kv, model.pool.out):
        nn.init.normal_(linear.weight, std=std)
    for module in model.stages.modules():
        if isinstance(module, AntialiasedBottleneck):
            nn.init.zeros_(module.norm3.weight)
    return model


BUILDERS: dict[type, Any] = {Config: build, ResNetConfig: build_resnet}

_EMBEDDINGS = "vision_model.embeddings"
WEIGHT_NAMES = {
    "embedding.whole": f"{_EMBEDDINGS}.class_embedding",
    "embedding.patches": f"{_EMBEDDINGS}.patch_embedding",
    "embedding.positions": f"{_EMBEDDINGS}.position_embedding",
    "first_norm": "vision_model.pre_layrnorm",  # so it is spelled there
    **layer_names("vision_model"),
    "norm": "vision_model.post_layernorm",
    "projection": "visual_projection",
}
PREFIX = "vision_model."
WITHOUT_PREFIX = ("CLIPVisionModel",)
NOT_WEIGHTS = ("vision_model.embeddings.position_ids",)
MODEL_TYPES = {"clip_vision_model": "CLIPVisionModel"}
UNSUPPORTED: dict[str, Any] = {}
IN_FILE = {"projected": "visual_projection.weight"}


def from_published(json: dict[str, Any]) -> Config:
    """The Config of a config.json of model_type clip_vision_model, or of the vision_config in a CLIP's."""
    return Config(
        image_size=square(json.get("image_size", 224), "image_size"),
        patch_size=square(json.get("patch_size", 32), "patch_size"),
        channels=json.get("num_channels", 3),
        dim=json.get("hidden_size", 768),
        hidden_dim=json.get("intermediate_size", 3072),
        n_layers=json.get("num_hidden_layers", 12),
        n_heads=json.get("num_attention_heads", 12),
        norm_eps=float(json.get("layer_norm_eps", 1e-5)),
        activation=activation_name(json.get("hidden_act", "quick_gelu")),
        attention_dropout=float(json.get("attention_dropout", 0.0)),
        embedding_dim=json.get("projection_dim", 512),
        projected=projected(json, "CLIPVisionModel"),
    )


def square(size: Any, name: str) -> int:
    """A size that may be written as two equal ones."""
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if len(sides) != 1 or not isinstance(next(iter(sides)), int):
        raise UserError(f"{name} is {size!r}, and CLIP here sees squares only.")
    return sides.pop()


def to_published(config: Config) -> dict[str, Any]:
    """The config.json that transformers reads."""
    return {
        "model_type": "clip_vision_model",
        "architectures": [f"CLIPVisionModel{'WithProjection' if config.projected else ''}"],
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.channels,
        **tower_to_published(config),
    }

"""SigLIP's image encoder (Zhai et al., 2023, "Sigmoid Loss for Language Image Pre-Training"): CLIP's vision
transformer without a class token and without a norm at its start.

Axes: batch, channels, rows and columns of pixels; length = patches, dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.masks import PaddingMask
from keifu.layers.attention.positions import LearnedPositions
from keifu.layers.initialisation import multihead_
from keifu.models.clip.image import Pixels, check_size, square
from keifu.models.clip.text import ENCODER_FIELDS, block, layer_names
from keifu.models.hf import config as hf
from keifu.ranges import BelowOne, Count, NotNegative


@dataclass(frozen=True)
class Config:
    """The defaults are SigLIP-B/16."""

    image_size: Count = 224
    patch_size: Count = 16
    channels: Count = 3
    dim: Count = 768
    hidden_dim: Count = 3072
    n_layers: Count = 12
    n_heads: Count = 12
    norm_eps: NotNegative = 1e-6
    activation: str = "gelu_tanh"
    attention_dropout: BelowOne = 0.0
    class_tokens: ClassVar[int] = 0


class PatchesAlone(nn.Module):
    """An image as a sequence of patches, each through one matrix with a bias; learned positions are added."""

    def __init__(self, image_size: int, patch_size: int, channels: int, dim: int):
        super().__init__()
        if not 0 < patch_size <= image_size:
            raise UserError(f"A patch of {patch_size} pixels does not fit an image of {image_size}.")
        self.image_size = image_size
        self.patches = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.positions = LearnedPositions((image_size // patch_size) ** 2, dim)

    def forward(self, pixels: Pixels) -> Float[Tensor, "batch length dim"]:
        check_size(pixels, self.image_size)
        return self.patches(pixels).flatten(2).mT + self.positions.weight


class SiglipTower(nn.Module):
    """Patches through blocks; a norm at the end."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = PatchesAlone(config.image_size, config.patch_size, config.channels, config.dim)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)

    def states(self, pixels: Pixels) -> Iterator[Float[Tensor, "batch length dim"]]:
        """Yield the embeddings, then the hidden states after each block; the last ones are not normalised."""
        x, everything = self.embedding(pixels), PaddingMask()
        yield x
        for each in self.blocks:
            x = each(x, mask=everything)
            yield x


def build(config: Config) -> SiglipTower:
    """Build a tower with PyTorch's initialisation, but positions scaled by the width."""
    model = SiglipTower(config)
    multihead_(model)
    nn.init.normal_(model.embedding.positions.weight, std=config.dim**-0.5)
    return model


WEIGHT_NAMES = {
    "embedding.patches": "embeddings.patch_embedding",
    "embedding.positions": "embeddings.position_embedding",
    **{ours: theirs.removeprefix("vision_model.") for ours, theirs in layer_names("vision_model").items()},
    "norm": "post_layernorm",
}


def _published_activation(name: str) -> str:
    return "gelu_pytorch_tanh" if name == "gelu_tanh" else hf.published_activation(name)


FIELDS: hf.Fields = {ours: field for ours, field in ENCODER_FIELDS.items() if ours != "embedding_dim"} | {
    "dim": hf.Field("hidden_size", 768),
    "hidden_dim": hf.Field("intermediate_size", 3072),
    "n_heads": hf.Field("num_attention_heads", 12),
    "norm_eps": hf.Field("layer_norm_eps", 1e-6, float),
    "activation": hf.Field("hidden_act", "gelu_pytorch_tanh", hf.activation_name, _published_activation),
    "image_size": hf.Field("image_size", 224, lambda size: square(size, "image_size")),
    "patch_size": hf.Field("patch_size", 16, lambda size: square(size, "patch_size")),
    "channels": hf.Field("num_channels", 3),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a vision_config of model_type siglip_vision_model, whose pooling head is not used."""
    if json.get("vision_use_head", True):
        raise UserError("its vision_config has a pooling head (vision_use_head), and only a tower without is read.")
    return Config(**hf.read_fields(json, FIELDS))


def to_published(config: Config) -> dict[str, Any]:
    """Return the vision_config that transformers reads."""
    return {"model_type": "siglip_vision_model", "vision_use_head": False, **hf.write_fields(config, FIELDS)}

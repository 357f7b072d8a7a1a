"""SigLIP's image encoder (Zhai et al., 2023, "Sigmoid Loss for Language Image Pre-Training"): CLIP's vision transformer
without a class token and without a norm at its start.

Axes: batch, channels, rows and columns of pixels; length = patches, dim.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.positions import LearnedPositions
from keifu.models.clip import image as clip_image
from keifu.models.clip.image import Pixels, check_size
from keifu.models.hf import config as hf


@dataclass(frozen=True)
class Config(clip_image.Config):
    """The defaults are SigLIP-B/16."""

    patch_size: int = 16
    norm_eps: float = 1e-6
    activation: str = "gelu_tanh"
    projected: bool = False
    class_tokens: ClassVar[int] = 0


class PatchesAlone(nn.Module):
    """Conversion of an image to patches, each multiplied by a matrix with a bias, plus learned positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.image_size = config.image_size
        self.patches = nn.Conv2d(config.channels, config.dim, config.patch_size, config.patch_size)
        self.positions = LearnedPositions((config.image_size // config.patch_size) ** 2, config.dim)

    def forward(self, pixels: Pixels) -> Float[Tensor, "batch length dim"]:
        check_size(pixels, self.image_size)
        return self.patches(pixels).flatten(2).mT + self.positions.weight


def build(config: Config) -> nn.Module:
    """Build CLIP's image encoder with these patches, and positions scaled by the width."""
    model: Any = clip_image.build(config)
    model.embedding, model.first_norm = PatchesAlone(config), nn.Identity()
    nn.init.normal_(model.embedding.positions.weight, std=config.dim**-0.5)
    return model


FIELDS: hf.Fields = {ours: theirs for ours, theirs in clip_image.FIELDS.items() if ours != "embedding_dim"} | {
    "patch_size": hf.Field("patch_size", 16, lambda size: clip_image.square(size, "patch_size")),
    "norm_eps": hf.Field("layer_norm_eps", 1e-6, float),
    "activation": hf.activation_field("hidden_act", "gelu_pytorch_tanh"),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a vision_config of model_type siglip_vision_model. Raises UserError if it has a
    pooling head."""
    if json.get("vision_use_head", True):
        raise UserError("its vision_config has a pooling head (vision_use_head), and only a tower without is read.")
    return Config(**hf.read_fields(json, FIELDS))


def to_published(config: Config) -> dict[str, Any]:
    """Return the vision_config that transformers reads."""
    return {"model_type": "siglip_vision_model", "vision_use_head": False, **hf.write_fields(config, FIELDS)}

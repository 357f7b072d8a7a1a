"""CLIP (Radford et al., 2021, "Learning Transferable Visual Models From Natural Language Supervision"): an image
encoder and a text encoder, trained by a contrastive loss over the image-caption pairs of a batch, so that a matching
pair has similar embeddings. Any set of captions is then a zero-shot classifier.

Axes: images, texts, length = tokens, channels, rows and columns of pixels, embedding = the shared space.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.models.clip import image as clip_image, text as clip_text
from keifu.models.hf.image_processor import Pixels, read_pixels, write_pixels

Images = Float[Tensor, "images channels rows columns"]
Tokens = Int[Tensor, "texts length"]
TextMask = Bool[Tensor, "texts length"]


@dataclass(frozen=True)
class Config(clip_text.WithText):
    """The defaults are ViT-B/32 as OpenAI released it. pixels: the preprocessing of images."""

    text: clip_text.Config = field(default_factory=clip_text.Config)
    image: clip_image.Config | clip_image.ResNetConfig = field(default_factory=clip_image.Config)
    pixels: Pixels = field(default_factory=Pixels)


def _with_text(image: clip_image.Config | clip_image.ResNetConfig, dim: int) -> Config:
    text = clip_text.Config(dim=dim, hidden_dim=4 * dim, n_heads=dim // 64, embedding_dim=image.embedding_dim)
    return Config(text, image, Pixels(image.image_size, image.image_size))


def _vit(dim: int, layers: int, patch: int, text_dim: int, embedding: int, size: int = 224) -> Config:
    image = clip_image.Config(size, patch, 3, dim, 4 * dim, layers, dim // 64, embedding_dim=embedding)
    return _with_text(image, text_dim)


def _resnet(width: int, layers: tuple[int, ...], text_dim: int, embedding: int, size: int) -> Config:
    return _with_text(clip_image.ResNetConfig(size, width, layers, width // 2, embedding), text_dim)


# The paper gives no numbers of parameters; open_clip counted those in sizes.json in the released weights.
SIZES = {  # the paper's tables 19 and 20
    "clip-rn50": _resnet(64, (3, 4, 6, 3), 512, 1024, 224),
    "clip-rn101": _resnet(64, (3, 4, 23, 3), 512, 512, 224),
    "clip-rn50x4": _resnet(80, (4, 6, 10, 6), 640, 640, 288),
    "clip-rn50x16": _resnet(96, (6, 8, 18, 8), 768, 768, 384),
    "clip-rn50x64": _resnet(128, (3, 15, 36, 10), 1024, 1024, 448),
    "clip-vit-b32": _vit(768, 12, 32, 512, 512),
    "clip-vit-b16": _vit(768, 12, 16, 512, 512),
    "clip-vit-l14": _vit(1024, 24, 14, 768, 768),
    "clip-vit-l14-336": _vit(1024, 24, 14, 768, 768, 336),
}


class Clip(nn.Module):
    """The two encoders, and the logarithm of the scale of the logits (the inverse temperature)."""

    def __init__(self, config: Config, text: nn.Module, image: nn.Module):
        super().__init__()
        if not config.text.projected or config.text.embedding_dim != config.image.embedding_dim:
            sizes = f"{config.text.embedding_dim} and {config.image.embedding_dim}"
            raise UserError(f"Both towers must be projected into one space, and theirs have {sizes} numbers.")
        self.config, self.text, self.image = config, text, image
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, pixels: Images) -> Float[Tensor, "images embedding"]:
        """Return an embedding for each image, not normalised. The images are preprocessed as in the config's
        `pixels`."""
        return self.image(pixels)

    def encode_text(self, tokens: Tokens, mask: TextMask | None = None) -> Float[Tensor, "texts embedding"]:
        """Return an embedding for each caption, not normalised. mask: True on real tokens (see `TextTower.encode`)."""
        return self.text(tokens, mask)

    def forward(self, pixels: Images, tokens: Tokens, mask: TextMask | None = None) -> Float[Tensor, "images texts"]:
        """Return the logits of every image and caption: the cosine of their embeddings times exp(logit_scale)."""
        return self.logits(self.encode_image(pixels), self.encode_text(tokens, mask))

    def logits(
        self, images: Float[Tensor, "images embedding"], texts: Float[Tensor, "texts embedding"]
    ) -> Float[Tensor, "images texts"]:
        """Return the logits of embeddings, which need not be normalised."""
        return self.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


def build(config: Config) -> Clip:
    """Build a model with the released code's initialisation. The logits' scale starts at 1 / 0.07."""
    return Clip(config, clip_text.build(config.text), clip_image.BUILDERS[type(config.image)](config.image))


WEIGHT_NAMES = {
    **{f"text.{ours}": theirs for ours, theirs in clip_text.WEIGHT_NAMES.items()},
    **{f"image.{ours}": theirs for ours, theirs in clip_image.WEIGHT_NAMES.items()},
    "logit_scale": "logit_scale",
}
NOT_WEIGHTS = clip_text.NOT_WEIGHTS + clip_image.NOT_WEIGHTS
MODEL_TYPES = {"clip": "CLIPModel"}
OTHER_MODEL_TYPES = ("open_clip",)


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a Hugging Face config.json of model_type clip, and of preprocessor_config.json if it exists.

    text_config_dict and vision_config_dict of old files have precedence, as in transformers.
    """
    architecture = (json.get("architectures") or ["CLIPModel"])[0]
    if architecture != "CLIPModel":
        raise ValueError(f"the architecture {architecture!r} is not CLIPModel.")
    text, image = (json.get(f"{part}_config_dict") or json.get(f"{part}_config") or {} for part in ("text", "vision"))
    projection = {"embedding_dim": json.get("projection_dim", 512), "projected": True}
    image = replace(clip_image.from_published({**image, "architectures": None}), **projection)
    text = replace(clip_text.from_published({**text, "architectures": None}), **projection)
    return Config(text, image, read_pixels(json.get("preprocessor_config"), image.image_size))


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers reads, with the content of preprocessor_config.json.

    It has no fields for a ResNet, which is left out. The Config read back then differs, so open_clip's config is
    written instead.
    """
    vision = clip_image.to_published(config.image) if isinstance(config.image, clip_image.Config) else {}
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": config.text.embedding_dim,
        "text_config": _inner(clip_text.to_published(config.text)),
        "vision_config": _inner(vision),
        "preprocessor_config": write_pixels(config.pixels),
    }


def _inner(json: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in json.items() if key != "architectures"}

"""LLaVA (Liu et al., 2023, "Visual Instruction Tuning"): a language model that reads pictures.

New: the patches of a picture become tokens of the prompt. CLIP's image encoder computes a state for each patch, a
projector of two matrices converts it to an embedding of LLaMA, and LLaMA reads pictures and words as one sequence.

Axes: images, channels, rows and columns of pixels; patches = tokens of a picture; batch, length = tokens, dim, vocab.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.activations import Activation, activation
from keifu.layers.linear import Linear
from keifu.layers.transformer.decoder import DecoderLM, Inserted, State
from keifu.models import llama
from keifu.models.clip import image as clip_image
from keifu.models.clip.text import WithText
from keifu.models.hf import config as hf
from keifu.models.hf.image_processor import Pixels, read_pixels, write_pixels
from keifu.models.multimodal import siglip

Tokens = Int[Tensor, "batch length"]
Images = Float[Tensor, "images channels rows columns"]


def _clip(size: int) -> clip_image.Config:
    return clip_image.Config(size, 14, 3, 1024, 4096, 24, 16, embedding_dim=768, projected=False)


@dataclass(frozen=True)
class Config(WithText):
    """The defaults are LLaVA-1.5-7B.

    image_token: id of a picture's tokens in a prompt. feature_layers: the hidden states of the image encoder that are
    concatenated (0: its embeddings; -1: the last). full: whether they include the class token. pixels: the
    preprocessing of pictures.
    """

    text: llama.Config = field(  # LLaMA 2 7B
        default_factory=lambda: llama.Config(vocab_size=32_064, context_length=4096, norm_eps=1e-5)
    )
    image: clip_image.Config = field(default_factory=lambda: _clip(336))
    pixels: Pixels = field(default_factory=lambda: Pixels(336, 336))
    image_token: int = 32_000
    feature_layers: tuple[int, ...] = (-2,)
    full: bool = False
    projector_activation: str = "gelu"
    projector_bias: bool = True

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.text.tied

    @property
    def image_tokens(self) -> int:
        """The number of tokens of one picture."""
        patches = (self.image.image_size // self.image.patch_size) ** 2
        return patches + self.image.class_tokens - (not self.full)


def tie(config: Config, tied: bool) -> Config:
    """Return the config with its head tied to the embedding, or untied."""
    return replace(config, text=replace(config.text, tied=tied))


# The paper's numbers of parameters in sizes.json were counted in the released weights.
SIZES = {"llava-1.5-7b": Config(), "llava-1.5-13b": Config(replace(llama.SIZES["llama2-13b"], vocab_size=32_064))}


class Projector(nn.Module):
    """Two matrices with an activation between them, from the image encoder's width to the decoder's (LLaVA-1.5,
    2023)."""

    def __init__(self, width: int, dim: int, between: Activation, bias: bool):
        super().__init__()
        self.first, self.second = Linear(width, dim, bias), Linear(dim, dim, bias)
        self.activation = between

    def forward(self, x: Float[Tensor, "images patches width"]) -> Float[Tensor, "images patches dim"]:
        return self.second(self.activation(self.first(x)))


class Llava(DecoderLM):
    """A decoder with an image encoder (`tower`) and a projector."""

    def __init__(self, config: Any, decoder: DecoderLM, tower: Any, projector: nn.Module):
        super().__init__(
            decoder.embedding, list(decoder.blocks), decoder.norm, decoder.positions, decoder.head,
            config.text.dropout, config,
        )  # fmt: skip
        self.tower, self.projector = tower, projector

    def encode_images(self, pixels: Images) -> Float[Tensor, "images patches dim"]:
        """Return the embeddings of each picture's tokens. The pixels are preprocessed as in the config's `pixels`."""
        count = self.config.image.n_layers + 1
        layers = [layer % count for layer in self.config.feature_layers]
        states = list(islice(self.tower.states(pixels), max(layers) + 1))
        return self.projector(torch.cat([states[layer] for layer in layers], -1)[:, 0 if self.config.full else 1 :])

    def insertion(self, tokens: Tokens, images: Float[Tensor, "images patches dim"]) -> Inserted:
        """Return the positions of the pictures' tokens, with the embeddings for them in order."""
        positions = (tokens.flatten() == self.config.image_token).nonzero()[:, 0]
        if len(positions) != images.shape[:2].numel():
            raise UserError(f"{len(images)} images: {images.shape[:2].numel()} tokens; the prompt: {len(positions)}.")
        return Inserted(positions, images.flatten(0, 1))

    def forward(
        self, tokens: Tokens, state: State | None = None, padding: Int[Tensor, " batch"] | None = None,
        pixels: Images | None = None,
    ) -> Float[Tensor, "batch length vocab"]:  # fmt: skip
        """Return logits of the token after each; see `DecoderLM`. pixels: the pictures of these tokens, in order."""
        inserted = None if pixels is None else self.insertion(tokens, self.encode_images(pixels))
        return self.logits(self.hidden(tokens, state, padding, inserted=inserted))


TOWERS: dict[type, Any] = {clip_image.Config: clip_image.build, siglip.Config: siglip.build}


def build(config: Config) -> Llava:
    """Build a model with LLaMA's and CLIP's initialisation, and PyTorch's for the projector."""
    return attach(config, llama.build(config.text))


def attach(config: Config, decoder: DecoderLM) -> Llava:
    """Return a decoder with a new image encoder and a new projector."""
    count = config.image.n_layers + 1
    if not config.feature_layers or not all(-count <= layer < count for layer in config.feature_layers):
        raise UserError(f"feature_layers is {config.feature_layers}, and the tower has {count} hidden states.")
    width, between = config.image.dim * len(config.feature_layers), activation(config.projector_activation)
    projector = Projector(width, config.text.dim, between, config.projector_bias)
    return Llava(config, decoder, TOWERS[type(config.image)](config.image), projector)


TOWER_NAMES = {
    ours: theirs.removeprefix("vision_model.")
    for ours, theirs in clip_image.WEIGHT_NAMES.items()
    if ours != "projection"
}
WEIGHT_NAMES = {
    **{ours: f"language_model.{theirs}" for ours, theirs in llama.WEIGHT_NAMES.items()},
    **{f"tower.{ours}": f"vision_tower.{theirs}" for ours, theirs in TOWER_NAMES.items()},
    "projector.first": "multi_modal_projector.linear_1",
    "projector.second": "multi_modal_projector.linear_2",
}
OLD_BEGINNINGS = {"vision_tower.": "vision_tower.vision_model."}  # in files of transformers 4
NOT_WEIGHTS = tuple(f"{old}embeddings.position_ids" for old in OLD_BEGINNINGS.values())
MODEL_TYPES = {"llava": "LlavaForConditionalGeneration"}
STRATEGIES = {"default": False, "full": True}

FIELDS: hf.Fields = {
    "image_token": hf.Field("image_token_index", 32_000),
    "feature_layers": hf.Field(
        "vision_feature_layer", -2, lambda layers: (layers,) if isinstance(layers, int) else tuple(layers),
        lambda layers: layers[0] if len(layers) == 1 else list(layers),
    ),
    "full": hf.choice("vision_feature_select_strategy", STRATEGIES),
    "projector_activation": hf.activation_field("projector_hidden_act", "gelu"),
    "projector_bias": hf.Field("multimodal_projector_bias", True),
}  # fmt: skip


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a config.json of model_type llava, and of preprocessor_config.json if it exists."""
    text, vision = json["text_config"], json["vision_config"]
    if (name := text.get("model_type", "llama")) not in llama.MODEL_TYPES:
        raise UserError(f"its text_config is of model_type {name!r}, and read are {', '.join(llama.MODEL_TYPES)}.")
    readers = {"clip_vision_model": _read_clip, "siglip_vision_model": siglip.from_published}
    if (name := vision.get("model_type", "clip_vision_model")) not in readers:
        raise UserError(f"its vision_config is of model_type {name!r}, and read are {', '.join(readers)}.")
    if (json.get("preprocessor_config") or {}).get("do_pad"):
        raise UserError("its preprocessor_config pads pictures to squares (do_pad), and only crops are implemented.")
    decoder = llama.from_published({**TEXT_DEFAULTS, **text})
    if "tie_word_embeddings" not in text:
        decoder = replace(decoder, tied=bool(json.get("tie_word_embeddings", False)))
    image = readers[name](vision)
    pixels = read_pixels(json.get("preprocessor_config"), image.image_size)
    return Config(decoder, image, pixels, **hf.read_fields(json, FIELDS))


TEXT_DEFAULTS: Mapping[str, Any] = {  # LLaMA-7B's values, which transformers leaves out
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip


def _read_clip(vision: dict[str, Any]) -> clip_image.Config:
    return replace(clip_image.from_published({**vision, "architectures": None}), projected=False)


WRITERS: dict[type, Any] = {clip_image.Config: clip_image.to_published, siglip.Config: siglip.to_published}


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers reads, with the content of the files for pictures."""
    image_config = config.image
    vision = WRITERS[type(image_config)](image_config)
    text = llama.to_published(config.text)
    fields = hf.write_fields(config, FIELDS)
    processor = {
        "processor_class": "LlavaProcessor", "patch_size": image_config.patch_size,
        "num_additional_image_tokens": image_config.class_tokens,
        "vision_feature_select_strategy": fields["vision_feature_select_strategy"],
    }  # fmt: skip
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "tie_word_embeddings": config.tied,
        "image_seq_length": config.image_tokens,
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        "vision_config": {key: value for key, value in vision.items() if key != "architectures"},
        **fields,
        "preprocessor_config": write_pixels(config.pixels),
        "processor_config": processor,
    }

"""SmolVLM (Marafioti et al., 2025, "SmolVLM: Redefining small and efficient multimodal models"), with the network of
Idefics3 (Laurençon et al., 2024): a small model that reads pictures in tiles.

New: pixel shuffle joins a square of neighbouring patches to one token, so that a picture has 9 or 16 times fewer
tokens. A large picture is cut into tiles of the image encoder's size. The prompt names each tile's row and column, and
the whole picture follows the tiles. One matrix without an activation projects to the decoder's width.

Axes: images = tiles, channels, rows and columns of pixels; patches of a tile, tokens of a tile, dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.linear import Linear
from keifu.models import llama
from keifu.models.clip.text import WithText
from keifu.models.hf import config as hf
from keifu.models.hf.image_processor import Tiles, read_tiles, write_tiles
from keifu.models.multimodal import llava, siglip
from keifu.models.multimodal.llava import Images, Llava


def _text(name: str, **changes: Any) -> llama.Config:
    return replace(llama.SIZES[name], tied=False, **{"vocab_size": 49_280, **changes})


@dataclass(frozen=True)
class Config(WithText):
    """The defaults are SmolVLM-256M.

    image_token: id of a tile's tokens in a prompt. shuffle: `shuffle` x `shuffle` patches become one token. pixels: the
    preprocessing of pictures, whose tiles have the size that `image` reads.
    """

    text: llama.Config = field(  # SmolLM2-135M
        default_factory=lambda: llama.Config(
            vocab_size=49_280, context_length=8192, dim=576, hidden_dim=1536, n_layers=30, n_heads=9, n_kv_heads=3,
            norm_eps=1e-5, rope_theta=100_000.0,
        )
    )  # fmt: skip
    image: siglip.Config = field(default_factory=lambda: siglip.Config(512))
    pixels: Tiles = field(default_factory=Tiles)
    image_token: int = 49_190
    shuffle: int = 4

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.text.tied

    @property
    def image_tokens(self) -> int:
        """The number of tokens of one tile."""
        return (self.image.image_size // self.image.patch_size // self.shuffle) ** 2

    def picture_text(self, rows: int, columns: int) -> str:
        """Return the prompt text of a picture with this many rows and columns of tiles, with one `<image>` for each
        tile."""
        lines = "".join(
            "".join(f"{AROUND}<row_{row + 1}_col_{column + 1}><image>" for column in range(columns)) + "\n"
            for row in range(rows)
        )
        return lines + "\n" * bool(lines) + f"{AROUND}<global-img><image>{AROUND}"


AROUND = "<fake_token_around_image>"
tie = llava.tie
SIZES = {
    "smolvlm-256m": Config(),
    "smolvlm-500m": Config(_text("smollm2-360m")),
    "smolvlm-2.2b": Config(
        _text("smollm2-1.7b", vocab_size=49_155, context_length=16_384, rope_theta=273_768.0),
        siglip.Config(384, 14, 3, 1152, 4304, 27, 16), Tiles(1536, 384), 49_153, 3,
    ),
}  # fmt: skip


class PixelShuffle(nn.Module):
    """Layer that joins squares of neighbouring patches and multiplies them by a matrix."""

    def __init__(self, width: int, dim: int, side: int):
        super().__init__()
        self.side, self.projection = side, Linear(width * side**2, dim, bias=False)

    def forward(self, x: Float[Tensor, "images patches width"]) -> Float[Tensor, "images tokens dim"]:
        count = isqrt(x.shape[1]) // self.side
        squares = x.unflatten(1, (count, self.side, count, self.side)).transpose(2, 3)
        return self.projection(squares.flatten(3).flatten(1, 2))


class SmolVLM(Llava):
    """A decoder with SigLIP's encoder and pixel shuffle."""

    def encode_images(self, pixels: Images) -> Float[Tensor, "images tokens dim"]:
        """Return the embeddings of each tile's tokens. The pixels are preprocessed as in the config's `pixels`."""
        return self.projector(self.tower.norm(self.tower.encode(pixels)))


def build(config: Config) -> SmolVLM:
    """Build a model with LLaMA's and SigLIP's initialisation, and PyTorch's for the projection."""
    side, square = config.image.image_size // config.image.patch_size, config.shuffle
    if side % square:
        raise UserError(f"A tile has {side} x {side} patches, and {square} x {square} cannot be joined.")
    projector: Any = PixelShuffle(config.image.dim, config.text.dim, config.shuffle)
    return SmolVLM(config, llama.build(config.text), siglip.build(config.image), projector)


WEIGHT_NAMES = {
    **{ours: theirs.replace("model.", "model.text_model.", 1) for ours, theirs in llama.WEIGHT_NAMES.items()},
    **{f"tower.{ours}": f"model.vision_model.{theirs}" for ours, theirs in llava.TOWER_NAMES.items()},
    "projector.projection": "model.connector.modality_projection.proj",
}
MODEL_TYPES = {"idefics3": "Idefics3ForConditionalGeneration", "smolvlm": "SmolVLMForConditionalGeneration"}
FIELDS: hf.Fields = {"image_token": hf.Field("image_token_id", 128_257), "shuffle": hf.Field("scale_factor", 2)}
TEXT_DEFAULTS = {**llava.TEXT_DEFAULTS, "rms_norm_eps": 1e-5}
VISION_DEFAULTS: Mapping[str, Any] = {  # the image encoder's defaults, which transformers leaves out
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a config.json of model_type idefics3 or smolvlm, and of preprocessor_config.json if it
    exists."""
    text = {**TEXT_DEFAULTS, **json["text_config"], "tie_word_embeddings": json.get("tie_word_embeddings", False)}
    if (name := text["model_type"]) not in llama.MODEL_TYPES:
        raise UserError(f"its text_config is of model_type {name!r}, and read are {', '.join(llama.MODEL_TYPES)}.")
    image = siglip.from_published({**VISION_DEFAULTS, **json["vision_config"], "vision_use_head": False})
    if not _plain(side := image.image_size // image.patch_size):
        raise UserError(f"its tiles have {side} x {side} patches, whose positions transformers rounds to others.")
    pixels = read_tiles(json.get("preprocessor_config"), image.image_size)
    return Config(llama.from_published(text), image, pixels, **hf.read_fields(json, FIELDS))


def _plain(side: int) -> bool:
    """Return whether transformers gives each patch of a row its own position in float32: true for the published 26, 27
    and 32 patches, false for 19 or 25."""
    edges, parts = torch.arange(1 / side, 1.0, 1 / side), torch.arange(side) * (1.0 / torch.tensor(side))
    return torch.bucketize(parts.clamp(max=1 - 1e-6), edges, right=True).tolist() == [*range(side)]


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers reads, with the content of the files for pictures.

    It is Idefics3's, which has the same network, and whose processor needs no video library.
    """
    vision = {**siglip.to_published(config.image), "model_type": "idefics3_vision"}
    return {
        "model_type": "idefics3",
        "architectures": [MODEL_TYPES["idefics3"]],
        "tie_word_embeddings": config.tied,
        "text_config": {key: value for key, value in llama.to_published(config.text).items() if key != "architectures"},
        "vision_config": {key: value for key, value in vision.items() if key != "vision_use_head"},
        **hf.write_fields(config, FIELDS),
        "preprocessor_config": write_tiles(config.pixels),
        "processor_config": {"processor_class": "Idefics3Processor", "image_seq_len": config.image_tokens},
    }

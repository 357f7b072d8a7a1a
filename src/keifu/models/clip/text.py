"""CLIP's text encoder (Radford et al., 2021): GPT-2's layers. The hidden state at a caption's end token represents the
caption.

It is also the text encoder of Stable Diffusion.

Axes: batch, length = tokens, dim, embedding = the space shared with pictures.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.masks import CausalMask, CausalPaddingMask
from keifu.layers.attention.positions import LearnedPositions
from keifu.layers.linear import Linear
from keifu.layers.transformer.blocks import PreNorm
from keifu.models import gpt2
from keifu.models.hf import config as hf
from keifu.ranges import BelowOne, Count, Natural, NotNegative

Tokens = Int[Tensor, "batch length"]
Mask = Bool[Tensor, "batch length"]
Hidden = Float[Tensor, "batch length dim"]


@dataclass(frozen=True)
class Config:
    """The defaults are the text encoder of ViT-B/32. A caption ends at the first `end_id`; None: at its highest id,
    which is the end token in OpenAI's vocabulary. projected: False leaves out the last matrix, into the shared space.
    """

    vocab_size: Count = 49_408  # tokens in the vocabulary
    context_length: Count = 77  # longest caption in tokens
    dim: Count = 512  # width of the hidden states
    hidden_dim: Count = 2048  # width inside the feed-forward layers
    n_layers: Count = 12  # Transformer blocks
    n_heads: Count = 8  # attention heads
    norm_eps: NotNegative = 1e-5  # number ε in the normalisation
    activation: str = "quick_gelu"  # activation of the feed-forward layers
    attention_dropout: BelowOne = 0.0  # share of dropped attention weights
    end_id: Natural | None = None  # token that ends a caption; None: the highest id
    embedding_dim: Count = 512  # width of the shared space
    projected: bool = True  # whether there is a matrix into the shared space


class WithText:
    """A mixin for the Config of a model with a text encoder, whose Config is `text`."""

    text: Config

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary."""
        return self.text.vocab_size

    @property
    def context_length(self) -> int:
        """The longest text in tokens, including its start and end. Image generators pad shorter texts to it."""
        return self.text.context_length


SIZES = {  # that of ViT-L/14; Stable Diffusion's model card gives 123 M
    "stable-diffusion-text": Config(dim=768, hidden_dim=3072, n_heads=12, embedding_dim=768, projected=False),
}


class TextTower(nn.Module):
    """Embedding, blocks, norm, and optionally the projection."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.positions = LearnedPositions(config.context_length, config.dim)
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.projection = Linear(config.dim, config.embedding_dim, bias=False) if config.projected else nn.Identity()

    def encode(self, tokens: Tokens, mask: Mask | None = None) -> Hidden:
        """Return the hidden states after the last norm. mask: True on real tokens; not needed if padding is at the end,
        since attention is causal."""
        length = tokens.shape[1]
        if length > self.config.context_length:
            room = f"the {self.config.context_length} positions of the text tower"
            raise UserError(f"A caption of {length} tokens does not fit {room}; shorten it.")
        x = self.embedding(tokens) + self.positions.weight[:length]
        visible = CausalMask(0, length) if mask is None else CausalPaddingMask(mask)
        for block in self.blocks:
            x = block(x, mask=visible)
        return self.norm(x)

    def pool(self, hidden: Hidden, tokens: Tokens) -> Float[Tensor, "batch dim"]:
        """Return the hidden state at the end of each caption; at the first token if `end_id` is missing, as in the
        published code."""
        ends = tokens if self.config.end_id is None else (tokens == self.config.end_id).int()
        return hidden[torch.arange(len(tokens), device=tokens.device), ends.argmax(-1)]

    def forward(self, tokens: Tokens, mask: Mask | None = None) -> Float[Tensor, "batch embedding"]:
        """Return an embedding for each caption, not normalised. Without a projection: the pooled hidden state."""
        return self.projection(self.pool(self.encode(tokens, mask), tokens))


def block(config: Any) -> PreNorm:
    """Build a block of the text or the image encoder."""
    return gpt2.block(config, Attention(config.dim, config.n_heads, dropout=config.attention_dropout))


def build(config: Config) -> TextTower:
    """Build a text encoder with the released code's initialisation: blocks depending on their width and number, biases
    with PyTorch's default."""
    model, dim = TextTower(config), config.dim
    nn.init.normal_(model.embedding.weight, std=0.02)
    nn.init.normal_(model.positions.weight, std=0.01)
    residual = dim**-0.5 * (2 * config.n_layers) ** -0.5
    deviations = {"qkv": dim**-0.5, "out": residual, "up": (2 * dim) ** -0.5, "down": residual}
    for name, module in model.blocks.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in deviations and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=deviations[leaf])
            if leaf in ("qkv", "out"):
                nn.init.zeros_(module.bias)
    if isinstance(model.projection, Linear):
        nn.init.normal_(model.projection.weight, std=dim**-0.5)
    return model


def layer_names(where: str) -> dict[str, str]:
    """Return transformers' weight names of a block of the text or the image encoder. where: the encoder's prefix."""
    parts = {
        "attention_norm": "layer_norm1",
        "attention.qkv": "self_attn.[q_proj,k_proj,v_proj]",
        "attention.out": "self_attn.out_proj",
        "feedforward_norm": "layer_norm2",
        "feedforward.up": "mlp.fc1",
        "feedforward.down": "mlp.fc2",
    }
    return {f"blocks.*.{ours}": f"{where}.encoder.layers.*.{theirs}" for ours, theirs in parts.items()}


WEIGHT_NAMES = {
    "embedding": "text_model.embeddings.token_embedding",
    "positions": "text_model.embeddings.position_embedding",
    **layer_names("text_model"),
    "norm": "text_model.final_layer_norm",
    "projection": "text_projection",
}
PREFIX = "text_model."
WITHOUT_PREFIX = ("CLIPTextModel",)
NOT_WEIGHTS = ("text_model.embeddings.position_ids",)
MODEL_TYPES = {"clip_text_model": "CLIPTextModel"}
KEIFU_TYPE = "keifu_clip_text"
IN_FILE = {"projected": "text_projection.weight"}
START = 49_406  # transformers' default for the first token of a caption
HIGHEST_ID = 2  # the eos_token_id of old files; transformers then uses the highest id as the end

ENCODER_FIELDS: hf.Fields = {  # fields of both encoders, whose defaults differ
    "hidden_dim": hf.Field("intermediate_size", 2048),
    "dim": hf.Field("hidden_size", 512),
    "n_layers": hf.Field("num_hidden_layers", 12),
    "n_heads": hf.Field("num_attention_heads", 8),
    "norm_eps": hf.Field("layer_norm_eps", 1e-5, float),
    "activation": hf.activation_field("hidden_act", "quick_gelu"),
    "attention_dropout": hf.Field("attention_dropout", 0.0, float),
    "embedding_dim": hf.Field("projection_dim", 512),
}
FIELDS: hf.Fields = ENCODER_FIELDS | {
    "vocab_size": hf.Field("vocab_size", 49_408),
    "context_length": hf.Field("max_position_embeddings", 77),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a config.json of model_type clip_text_model, or of the text_config in a CLIP's."""
    end = json.get("eos_token_id", 49_407)
    if not isinstance(end, int):
        raise UserError(f"eos_token_id is {end!r}; a caption must end with one token.")
    projected = with_projection(json, "CLIPTextModel")
    return Config(**hf.read_fields(json, FIELDS), end_id=None if end == HIGHEST_ID else end, projected=projected)


def with_projection(json: dict[str, Any], plain: str) -> bool:
    """Return whether an encoder has a projection, according to its architecture."""
    names = {plain: False, f"{plain}WithProjection": True}
    architecture = (json.get("architectures") or [plain])[0]
    if architecture not in names:
        raise ValueError(f"the architecture {architecture!r} is not among {', '.join(names)}.")
    return names[architecture]


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers reads."""
    return {
        **hf.write(config, MODEL_TYPES, FIELDS),
        "architectures": [f"CLIPTextModel{'WithProjection' if config.projected else ''}"],
        "eos_token_id": HIGHEST_ID if config.end_id is None else config.end_id,
        **({} if config.vocab_size > START else {"bos_token_id": None}),
    }

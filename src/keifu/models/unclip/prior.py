"""The diffusion prior of unCLIP (Ramesh et al., 2022, section 2.2; DALL-E 2): a diffusion model of CLIP's image
embedding, conditioned on a caption. A causal Transformer reads the caption, the timestep and the noisy embedding. At
its last token it predicts the embedding itself, not the noise.

Axes: batch, length = tokens of a caption, embedding = numbers of CLIP's embeddings.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.masks import CausalPaddingMask, PaddingMask
from keifu.layers.feedforward import FeedForward
from keifu.layers.initialisation import normal_, scale_residual_
from keifu.layers.linear import Linear
from keifu.layers.transformer.blocks import PreNorm
from keifu.layers.unet.timestep_embedding import TimeEmbedding, TimestepSinusoids
from keifu.models.hf import config as hf
from keifu.models.hf.unet import BLOCK, TIME, nested

Embedding = Float[Tensor, "batch embedding"]
Caption = Float[Tensor, "batch caption_dim"]
Tokens = Float[Tensor, "batch length embedding"]
Mask = Bool[Tensor, "batch length"]


@dataclass(frozen=True)
class Config:
    """The defaults are those of Karlo, whose weights are public; OpenAI's are not.

    Attributes:
        context_length: tokens of every caption.
        embedding_dim: dimension of an image embedding, and of each token of an encoded caption.
        caption_dim: dimension of a caption's embedding; None for embedding_dim.
        predicted_dim: dimension of the prediction; None for embedding_dim.
        first_norm: whether there is a norm before the first block.
        caption_norm: whether there is a norm before the matrix that reads the caption's embedding.
        query: whether a learned last token gives the prediction; otherwise the noisy embedding's token does.
        time_dim: hidden dimension of the timestep embedding; None for the width of the blocks.
    """

    context_length: int = 77
    embedding_dim: int = 768
    caption_dim: int | None = None
    predicted_dim: int | None = None
    n_layers: int = 20
    n_heads: int = 32
    head_dim: int = 64
    first_norm: bool = False
    caption_norm: bool = False
    query: bool = True
    time_dim: int | None = None
    dropout: float = 0.0

    @property
    def dim(self) -> int:
        """The width of the blocks."""
        return self.n_heads * self.head_dim

    @property
    def n_extra_tokens(self) -> int:
        """Number of tokens after the caption's: its embedding, the noise level, the noisy embedding, the query."""
        return 3 + self.query


# Its authors rounded the number of parameters; DALL-E 2's prior has about as many.
SIZES = {"karlo-prior": Config()}


class Prior(nn.Module):
    """Transformer that predicts normalised image embeddings.

    mean, std: statistics of the image embeddings in training; diffusion runs in embeddings normalised by them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.config, dim, caption_dim = config, config.dim, config.caption_dim or config.embedding_dim
        predicted = config.predicted_dim or config.embedding_dim
        self.time = TimeEmbedding(TimestepSinusoids(dim, 0.0, True), dim, config.time_dim or dim, dim)
        self.tokens, self.noisy = Linear(config.embedding_dim, dim), Linear(config.embedding_dim, dim)
        self.caption_norm = nn.LayerNorm(caption_dim) if config.caption_norm else nn.Identity()
        self.caption = Linear(caption_dim, dim)
        self.query = nn.Parameter(torch.empty(1, 1, dim)) if config.query else None
        self.positions = nn.Parameter(torch.empty(1, config.context_length + config.n_extra_tokens, dim))
        self.first_norm = nn.LayerNorm(dim) if config.first_norm else nn.Identity()
        self.blocks = nn.ModuleList(_block(config) for _ in range(config.n_layers))
        self.norm, self.out = nn.LayerNorm(dim), Linear(dim, predicted)
        self.register_buffer("mean", torch.zeros(1, predicted))
        self.register_buffer("std", torch.ones(1, predicted))

    def forward(
        self, x: Embedding, timestep: Num[Tensor, "*batch"], caption: Caption, tokens: Tokens, mask: Mask | None = None
    ) -> Float[Tensor, "batch predicted"]:
        """Return the prediction of the normalised embedding from noisy ones. timestep: one for all, or one for each.

        caption, tokens: CLIP's embedding of each caption, and its hidden states. mask: True on real tokens, for causal
        attention; None: all tokens see all, as in diffusers.
        """
        if tokens.shape[1] != self.config.context_length:
            raise UserError(f"The prior reads captions of {self.config.context_length} tokens, not {tokens.shape[1]}.")
        dtype, inner_dtype = x.dtype, self.positions.dtype
        time = self.time(timestep.reshape(-1).expand(len(x)))
        extra = [self.caption(self.caption_norm(caption)), time.to(inner_dtype), self.noisy(x.to(inner_dtype))]
        parts = [self.tokens(tokens), torch.stack(extra, 1)]
        hidden = torch.cat(parts if self.query is None else [*parts, self.query.expand(len(x), -1, -1)], 1)
        hidden = self.first_norm(hidden + self.positions)
        pad = (0, self.config.n_extra_tokens)
        visible = PaddingMask() if mask is None else CausalPaddingMask(F.pad(mask, pad, value=True))
        for block in self.blocks:
            hidden = block(hidden, mask=visible)
        return self.out(self.norm(hidden[:, -1])).to(dtype)

    def normalised(self, embedding: Embedding) -> Embedding:
        """Normalise CLIP's embeddings for diffusion."""
        return (embedding - self.mean) / self.std

    def restored(self, x: Embedding) -> Embedding:
        """Convert normalised embeddings back to CLIP's."""
        return x * self.std + self.mean


def _block(config: Config) -> PreNorm:
    dim = config.dim
    feedforward = FeedForward(dim, 4 * dim, F.gelu, dropout=config.dropout)
    norms = nn.LayerNorm(dim), nn.LayerNorm(dim)
    return PreNorm(Attention(dim, config.n_heads), feedforward, norms, config.dropout)


def build(config: Config) -> Prior:
    """Build a prior with GPT-2's initialisation."""
    model = Prior(config)
    normal_(model)
    scale_residual_(model.blocks)
    for parameter in (model.positions, *([] if model.query is None else [model.query])):
        nn.init.normal_(parameter, std=0.02)
    return model


WEIGHT_NAMES = {
    **TIME,
    "tokens": "encoder_hidden_states_proj",
    "noisy": "proj_in",
    "caption_norm": "embedding_proj_norm",
    "caption": "embedding_proj",
    "query": "prd_embedding",
    "positions": "positional_embedding",
    "first_norm": "norm_in",
    **nested("blocks.*", "transformer_blocks.*", BLOCK | {"feedforward.up": "ff.net.0.proj"}),
    "norm": "norm_out",
    "out": "proj_to_clip_embeddings",
    "mean": "clip_mean",
    "std": "clip_std",
}
MODEL_TYPES = {"PriorTransformer": "PriorTransformer"}
KEIFU_TYPE = "keifu_unclip_prior"
FILES = ("config.json", "diffusion_pytorch_model.safetensors")
WRITES_TEXT = False
UNSUPPORTED: dict[str, Any] = {"time_embed_act_fn": "silu"}
FIELDS: hf.Fields = {
    "context_length": hf.Field("num_embeddings", 77),
    "embedding_dim": hf.Field("embedding_dim", 768),
    "caption_dim": hf.Field("embedding_proj_dim", None),
    "predicted_dim": hf.Field("clip_embed_dim", None),
    "n_layers": hf.Field("num_layers", 20),
    "n_heads": hf.Field("num_attention_heads", 32),
    "head_dim": hf.Field("attention_head_dim", 64),
    "first_norm": hf.choice("norm_in_type", {None: False, "layer": True}),
    "caption_norm": hf.choice("embedding_proj_norm_type", {None: False, "layer": True}),
    "query": hf.choice("added_emb_type", {"prd": True, None: False}),
    "time_dim": hf.Field("time_embed_dim", None),
    "dropout": hf.Field("dropout", 0.0, float),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of diffusers' config.json of a PriorTransformer that reads a caption's tokens."""
    if json.get("encoder_hid_proj_type", "linear") != "linear":
        raise ValueError("its encoder_hid_proj_type is not 'linear', so it reads no caption.")
    config = Config(**hf.read_fields(json, FIELDS))
    if (count := json.get("additional_embeddings", 4)) != config.n_extra_tokens:
        raise ValueError(f"its additional_embeddings are {count}, and there are {config.n_extra_tokens} such tokens.")
    return config


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that diffusers reads."""
    fixed = {"additional_embeddings": config.n_extra_tokens, "encoder_hid_proj_type": "linear", **UNSUPPORTED}
    return hf.write(config, MODEL_TYPES, FIELDS) | fixed

"""Stable Diffusion 3's transformer (Esser et al., 2024, "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis"). New: picture and text are two streams of tokens with separate weights, which attend to each other.

The text is passed as tensors: the tokens of the text encoders, and one pooled embedding. Axes: batch, channels, height,
width of latents; length = patches, seen = tokens of the text, dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.activations import gelu_tanh
from keifu.layers.attention.attention import Attention, attend
from keifu.layers.feedforward import FeedForward
from keifu.layers.initialisation import xavier_, zero_
from keifu.layers.linear import Linear
from keifu.layers.normalisation import RMSNorm
from keifu.layers.transformer.blocks import modulate
from keifu.layers.unet.timestep_embedding import TimeEmbedding, TimestepSinusoids
from keifu.models.diffusion.dit import EPS, FREQUENCIES, PatchSizes, check_channels, from_patches, patch_positions
from keifu.models.hf import config as hf
from keifu.models.hf.unet import nested
from keifu.ranges import Count, Natural

Picture = Float[Tensor, "batch length dim"]
Text = Float[Tensor, "batch seen dim"]
Condition = Float[Tensor, "batch dim"]


@dataclass(frozen=True)
class Config(PatchSizes):
    """The defaults are those of diffusers.

    Attributes:
        size: the side of the latents that the positions are for.
        out_channels: None for as many as `channels`.
        text_dim, pooled_dim: numbers of a token of the text, and of its pooled embedding.
        positions: the most patches along a side; smaller pictures use the positions in the middle.
        dual_layers: blocks with an additional attention only within the picture (Stable Diffusion 3.5 medium).
        qk_norm: whether the queries and keys of each head are normalised (Stable Diffusion 3.5).
    """

    size: Count = 128
    channels: Count = 16
    out_channels: Count | None = 16
    n_heads: Count = 18
    head_dim: Count = 64
    n_layers: Count = 18
    text_dim: Count = 4096
    pooled_dim: Count = 2048
    positions: Count = 96
    dual_layers: tuple[Natural, ...] = ()
    qk_norm: bool = False


# The paper's numbers of parameters are those of depths 24 and 38.
SIZES = {
    "sd3-medium": Config(n_heads=24, n_layers=24, positions=192),
    "sd3.5-medium": Config(n_heads=24, n_layers=24, positions=384, dual_layers=(*range(13),), qk_norm=True),
    "sd3.5-large": Config(n_heads=38, n_layers=38, positions=192, qk_norm=True),
}


def _attention(config: Config) -> Attention:
    norms = (RMSNorm(config.head_dim, EPS), RMSNorm(config.head_dim, EPS)) if config.qk_norm else None
    return Attention(config.dim, config.n_heads, head_dim=config.head_dim, qk_norm=norms)


def attend_jointly(picture: Attention, text: Attention, x: Picture, context: Text) -> tuple[Picture, Text]:
    """Attend from both streams to both; each stream has its own matrices and norms (section 4)."""
    heads = []
    for attention, hidden in ((picture, x), (text, context)):
        q, k, v = attention.qkv(hidden).unflatten(-1, (-1, attention.head_dim)).chunk(3, 2)
        if attention.q_norm is not None and attention.k_norm is not None:
            q, k = attention.q_norm(q), attention.k_norm(k)
        heads.append((q, k, v))
    q, k, v = (torch.cat(both, 1).transpose(1, 2) for both in zip(*heads, strict=True))
    picture_output, text_output = attend(q, k, v).split([x.shape[1], context.shape[1]], 1)
    return picture.out(picture_output), text.out(text_output)


class JointBlock(nn.Module):
    """Block of both streams, modulated by time and text. The last block does not change the text."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        dim, last = config.dim, layer == config.n_layers - 1
        self.attention, self.text_attention = _attention(config), _attention(config)
        self.attention2 = _attention(config) if layer in config.dual_layers else None
        self.modulation = Linear(dim, (6 if self.attention2 is None else 9) * dim)
        self.text_modulation = Linear(dim, (2 if last else 6) * dim)
        self.norm = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.feedforward = FeedForward(dim, 4 * dim, gelu_tanh)
        self.text_feedforward = None if last else FeedForward(dim, 4 * dim, gelu_tanh)
        if last:
            self.text_attention.add_module("out", nn.Identity())

    def forward(self, x: Picture, context: Text, condition: Condition) -> tuple[Picture, Text]:
        condition, normed = F.silu(condition)[:, None], self.norm(x)
        shift, scale, gate, shift2, scale2, gate2, *second_modulation = self.modulation(condition).split(
            x.shape[-1], -1
        )
        text_numbers = self.text_modulation(condition).split(x.shape[-1], -1)
        text_scale, text_shift = text_numbers if self.text_feedforward is None else (text_numbers[1], text_numbers[0])
        picture_output, text_output = attend_jointly(
            self.attention, self.text_attention, modulate(normed, shift, scale),
            modulate(self.norm(context), text_shift, text_scale),
        )  # fmt: skip
        x = x + gate * picture_output
        if self.attention2 is not None:
            x = x + second_modulation[2] * self.attention2(modulate(normed, second_modulation[0], second_modulation[1]))
        x = x + gate2 * self.feedforward(modulate(self.norm(x), shift2, scale2))
        if self.text_feedforward is not None:
            context = context + text_numbers[2] * text_output
            context = context + text_numbers[5] * self.text_feedforward(
                modulate(self.norm(context), text_numbers[3], text_numbers[4])
            )
        return x, context


class JointTransformer(nn.Module):
    """Patches and text through the blocks, and a last layer that makes patches of the prediction."""

    positions: Tensor

    def __init__(self, config: Config):
        super().__init__()
        dim, patch = config.dim, config.patch_size
        self.config = config
        self.patches, self.context = nn.Conv2d(config.channels, dim, patch, patch), Linear(config.text_dim, dim)
        self.time = TimeEmbedding(TimestepSinusoids(FREQUENCIES, 0.0, True), FREQUENCIES, dim)
        self.pooled = TimeEmbedding(nn.Identity(), config.pooled_dim, dim)
        self.blocks = nn.ModuleList(JointBlock(config, layer) for layer in range(config.n_layers))
        self.norm = nn.LayerNorm(dim, EPS, elementwise_affine=False)
        self.modulation, self.last = Linear(dim, 2 * dim), Linear(dim, patch * patch * config.predicted_channels)
        table = patch_positions(config.positions, config.positions, config.size // patch, dim, torch.device("cpu"))
        self.register_buffer("positions", table[None].to(self.last.weight.device))

    def forward(
        self, x: Float[Tensor, "batch channels height width"], timestep: Num[Tensor, "*batch"],
        text: Float[Tensor, "batch seen text_dim"], pooled: Float[Tensor, "batch pooled_dim"],
    ) -> Float[Tensor, "batch out_channels new_height new_width"]:  # fmt: skip
        """Return the flow of noisy latents, in their dtype. timestep (1,000 · t): one for all, or one for each.

        text: the tokens of the text encoders. pooled: the embedding of the whole text. Numbers at the right and bottom
        that do not fill a patch are cut off. Raises UserError for too many patches, or another number of channels.
        """
        check_channels(self.config.channels, x.shape[1])
        dtype, side = self.last.weight.dtype, self.config.positions
        hidden = self.patches(x.to(dtype))
        rows, columns = hidden.shape[2:]
        if max(rows, columns) > side:
            raise UserError(f"{rows} x {columns} patches do not fit the {side} x {side} positions of this model.")
        top, left = (side - rows) // 2, (side - columns) // 2
        table = self.positions.unflatten(1, (side, side))[:, top : top + rows, left : left + columns]
        hidden = (hidden.flatten(2).mT + table.flatten(1, 2)).to(dtype)
        condition = self.time(timestep.reshape(-1).expand(len(x))) + self.pooled(pooled)
        context = self.context(text.to(dtype))
        for block in self.blocks:
            hidden, context = block(hidden, context, condition)
        scale, shift = self.modulation(F.silu(condition))[:, None].chunk(2, -1)
        output = self.last(modulate(self.norm(hidden), shift, scale))
        return from_patches(output, rows, columns, self.config.patch_size).to(x.dtype)


def build(config: Config) -> JointTransformer:
    """Build a model with DiT's initialisation: Glorot's matrices, and zero for every modulation and for the
    last layer."""
    model = JointTransformer(config)
    xavier_(model, embedding_std=0.02)
    zero_(model, "modulation", "last")
    return model


def _names(ours: str, theirs: str, qkv: str, out: str, added: str = "") -> dict[str, str]:
    return {
        f"{ours}.qkv": f"{theirs}.{qkv}", f"{ours}.out": f"{theirs}.{out}",
        **{f"{ours}.{part}_norm": f"{theirs}.norm_{added}{part}" for part in "qk"},
    }  # fmt: skip


_BLOCK = {
    "modulation": "norm1.linear",
    "text_modulation": "norm1_context.linear",
    **_names("attention", "attn", "to_[q,k,v]", "to_out.0"),
    **_names("attention2", "attn2", "to_[q,k,v]", "to_out.0"),
    **_names("text_attention", "attn", "add_[q,k,v]_proj", "to_add_out", "added_"),
    **nested("feedforward", "ff", {"up": "net.0.proj", "down": "net.2"}),
    **nested("text_feedforward", "ff_context", {"up": "net.0.proj", "down": "net.2"}),
}
WEIGHT_NAMES = {
    "patches": "pos_embed.proj",
    "positions": "pos_embed.pos_embed",
    "context": "context_embedder",
    **{f"time.linear{n}": f"time_text_embed.timestep_embedder.linear_{n}" for n in (1, 2)},
    **{f"pooled.linear{n}": f"time_text_embed.text_embedder.linear_{n}" for n in (1, 2)},
    **nested("blocks.*", "transformer_blocks.*", _BLOCK),
    "modulation": "norm_out.linear",
    "last": "proj_out",
}
MODEL_TYPES = {"SD3Transformer2DModel": "SD3Transformer2DModel"}
FILES = ("config.json", "diffusion_pytorch_model.safetensors")
WRITES_TEXT = False
_NAMED = {
    "size": "sample_size", "patch_size": "patch_size", "channels": "in_channels", "out_channels": "out_channels",
    "n_heads": "num_attention_heads", "head_dim": "attention_head_dim", "n_layers": "num_layers",
    "text_dim": "joint_attention_dim", "pooled_dim": "pooled_projection_dim", "positions": "pos_embed_max_size",
}  # fmt: skip
FIELDS: hf.Fields = {
    **{ours: hf.Field(theirs, vars(Config())[ours], if_none=hf.null) for ours, theirs in _NAMED.items()},
    "dual_layers": hf.Field("dual_attention_layers", (), tuple, list),
    "qk_norm": hf.choice("qk_norm", {None: False, "rms_norm": True}),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of diffusers' config.json of an SD3Transformer2DModel."""
    if not json.get("pos_embed_max_size", 96):
        raise UserError("its pos_embed_max_size is null, and positions without a table are not implemented.")
    config = Config(**hf.read_fields(json, FIELDS))
    if (width := json.get("caption_projection_dim", 1152)) != config.dim:
        raise UserError(f"its caption_projection_dim is {width}, and its patches have {config.dim} numbers.")
    return config


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that diffusers reads."""
    return hf.write(config, MODEL_TYPES, FIELDS) | {"caption_projection_dim": config.dim}

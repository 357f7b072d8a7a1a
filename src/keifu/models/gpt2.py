"""GPT-2 (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"). Compared with GPT-1: pre-norm
blocks with a final norm, an initialisation scaled for the number of residual layers, and prompts instead of
fine-tuning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from keifu.layers.activations import activation
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import LearnedPositions
from keifu.layers.feedforward import FeedForward
from keifu.layers.initialisation import normal_, scale_residual_
from keifu.layers.transformer.blocks import PreNorm
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import gpt1
from keifu.models.hf import config as hf
from keifu.models.registration import gguf
from keifu.ranges import Count


@dataclass(frozen=True)
class Config(gpt1.Config):
    """GPT-1's fields, and one more. The defaults are the smallest published size. `dropout` 0.1 is from the released
    configuration."""

    vocab_size: Count = 50_257  # tokens in the vocabulary
    context_length: Count = 1024  # longest sequence in tokens
    bias: bool = True  # whether layers have biases; False is nanoGPT's variant, which no published weights have


# The paper's table 2 gives 117, 345, 762 and 1542 million; the released weights have 124, 355, 774 and 1558.
SIZES = {
    "gpt2": Config(),
    "gpt2-medium": Config(dim=1024, hidden_dim=4096, n_layers=24, n_heads=16),
    "gpt2-large": Config(dim=1280, hidden_dim=5120, n_layers=36, n_heads=20),
    "gpt2-xl": Config(dim=1600, hidden_dim=6400, n_layers=48, n_heads=25),
}


def build(config: Config) -> DecoderLM:
    """Build a model with the paper's initialisation. Positions have half the deviation, as in the released code."""
    attention = partial(Attention, config.dim, config.n_heads, bias=config.bias, dropout=config.dropout)
    return assemble(config, lambda layer: attention(), config.bias)


def assemble(config: Any, attention: Callable[[int], Attention], bias: bool = True) -> DecoderLM:
    """Build GPT-2 with the given attention of each layer, counted from 0."""
    blocks = [block(config, attention(layer), bias, config.dropout) for layer in range(config.n_layers)]
    positions = LearnedPositions(config.context_length, config.dim)
    model = DecoderLM.of(config, blocks, nn.LayerNorm(config.dim, config.norm_eps, bias=bias), positions)
    normal_(model, std=0.02)
    nn.init.normal_(positions.weight, std=0.01)
    scale_residual_(blocks)
    return model


def block(config: Any, attention: Attention, bias: bool = True, dropout: float = 0.0) -> PreNorm:
    """Build a block around an attention. CLIP's encoders have the same ones."""
    norm = partial(nn.LayerNorm, config.dim, config.norm_eps, bias=bias)
    feedforward = FeedForward(config.dim, config.hidden_dim, activation(config.activation), bias=bias)
    return PreNorm(attention, feedforward, (norm(), norm()), dropout)


WEIGHT_NAMES = gpt1.WEIGHT_NAMES | {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
}
PREFIX = gpt1.PREFIX
NOT_WEIGHTS = ("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias")  # old files have the causal mask
MODEL_TYPES = {"gpt2": "GPT2LMHeadModel"}
UNSUPPORTED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}

FIELDS: hf.Fields = gpt1.FIELDS | {
    "context_length": hf.Field("n_positions", also=("n_ctx",)),
    "hidden_dim": hf.Field("n_inner", lambda json: 4 * json["n_embd"]),
    "activation": hf.activation_field("activation_function", "gelu_new"),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)

GGUF = {
    "gpt2": gguf.GgufArchitecture(
        names=gguf.BLOCKS | {
            "positions": "position_embd",
            "blocks.*.attention.qkv": "blk.*.attn_qkv",
            "blocks.*.feedforward.up": "blk.*.ffn_up",
        },
        fields={"attention.layer_norm_epsilon": "norm_eps"},
        fixed={"activation": "gelu_tanh", "bias": True, "dropout": 0.0},
    ),
}  # fmt: skip

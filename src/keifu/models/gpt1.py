"""GPT-1 (Radford et al., 2018, "Improving Language Understanding by Generative Pre-Training"): a decoder-only
Transformer, pretrained as a language model and then fine-tuned on a task. Compared with the Transformer of 2017: no
encoder and no cross-attention, learned positions, and GELU. The norms are still after each sublayer (post-norm).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from keifu.layers.activations import activation
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import LearnedPositions
from keifu.layers.feedforward import FeedForward
from keifu.layers.initialisation import normal_
from keifu.layers.transformer.blocks import PostNorm
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models.hf import config as hf
from keifu.ranges import BelowOne, Count, NotNegative


@dataclass(frozen=True)
class Config:
    """The defaults are the published model (section 4.1), with the vocabulary of the released files."""

    vocab_size: Count = 40_478  # tokens in the vocabulary
    context_length: Count = 512  # longest sequence in tokens
    dim: Count = 768  # width of the hidden states
    hidden_dim: Count = 3072  # width inside the feed-forward layers
    n_layers: Count = 12  # Transformer blocks
    n_heads: Count = 12  # attention heads
    norm_eps: NotNegative = 1e-5  # number ε in the normalisation
    activation: str = "gelu_tanh"  # activation of the released code; the paper says GELU
    dropout: BelowOne = 0.1  # share of dropped activations
    tied: bool = True  # whether the head is the token embedding


# Its paper gives no number of parameters; GPT-2's table 2 counts 117 million for "the original GPT".
SIZES = {"gpt1": Config()}


def build(config: Config) -> DecoderLM:
    """Build a model with all weights, including positions, initialised from N(0, 0.02²). There is no final norm: the
    last block ends in one."""
    blocks = [block(config) for _ in range(config.n_layers)]
    model = DecoderLM.of(config, blocks, nn.Identity(), LearnedPositions(config.context_length, config.dim))
    normal_(model, std=0.02)
    return model


def block(config: Any) -> PostNorm:
    """Build a block. BERT has the same ones, without the causal mask."""
    attention = Attention(config.dim, config.n_heads, dropout=config.dropout)
    feedforward = FeedForward(config.dim, config.hidden_dim, activation(config.activation))
    norm = partial(nn.LayerNorm, config.dim, config.norm_eps)
    return PostNorm(attention, feedforward, (norm(), norm()), config.dropout)


WEIGHT_NAMES = {
    "embedding": "transformer.tokens_embed",
    "positions": "transformer.positions_embed",
    "blocks.*.attention_norm": "transformer.h.*.ln_1",
    "blocks.*.attention.qkv": "transformer.h.*.attn.c_attn.T",
    "blocks.*.attention.out": "transformer.h.*.attn.c_proj.T",
    "blocks.*.feedforward_norm": "transformer.h.*.ln_2",
    "blocks.*.feedforward.up": "transformer.h.*.mlp.c_fc.T",
    "blocks.*.feedforward.down": "transformer.h.*.mlp.c_proj.T",
    "head": "lm_head",
}
PREFIX = "transformer."  # OpenAI's files have the same names without it
NOT_WEIGHTS = ("transformer.h.*.attn.bias", "transformer.position_ids")  # old files have the mask and the positions
MODEL_TYPES = {"openai-gpt": "OpenAIGPTLMHeadModel"}

FIELDS: hf.Fields = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "dim": "n_embd",
    "hidden_dim": hf.FieldGroup(lambda json: {"hidden_dim": 4 * json["n_embd"]}, lambda config: {}),  # it has no field
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "norm_eps": hf.Field("layer_norm_epsilon", 1e-5, float),
    "activation": hf.choice("afn", {"gelu": "gelu_tanh", "silu": "silu", "swish": "silu", "relu": "relu"}),
    "dropout": hf.Field("resid_pdrop", 0.1, float, also=("embd_pdrop", "attn_pdrop")),
    "tied": hf.Field("tie_word_embeddings", True),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)
REFUSED = {"gguf": "llama.cpp has no code for this model"}

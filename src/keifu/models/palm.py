"""PaLM (Chowdhery et al., 2022): parallel attention and feed-forward layers after one norm, so that their first
matrices can be multiplied at once; a single head of keys and values (multi-query attention), so that the key-value
cache is n_heads times smaller; SwiGLU, rotary positions, no biases, and a head tied to the embedding, with logits
divided by √dim.

No PaLM weights were published. Cohere's Command-R has the same layer, and its files are read and written here. Rotary
pairs are interleaved, as in Cohere's code; the paper does not mention this, nor the norms' ε.
"""

from dataclasses import dataclass

from torch import nn

from keifu.layers.activations import activation
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import RopeScaling, Rotary
from keifu.layers.feedforward import GatedFeedForward
from keifu.layers.initialisation import fan_in_
from keifu.layers.normalisation import ScaledLayerNorm
from keifu.layers.transformer.blocks import Parallel
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models.hf import config as hf
from keifu.ranges import BelowOne, Count, NotNegative, Positive


@dataclass(frozen=True)
class Config:
    """The defaults are PaLM 8B (table 1). The attention is n_heads · head_dim wide, which need not be `dim`."""

    vocab_size: Count = 256_000  # tokens in the vocabulary
    context_length: Count = 2048  # longest sequence in tokens
    dim: Count = 4096  # width of the hidden states
    hidden_dim: Count = 16_384  # width inside the feed-forward layers
    n_layers: Count = 32  # Transformer blocks
    n_heads: Count = 16  # attention heads
    n_kv_heads: Count = 1  # key and value heads
    head_dim: Count | None = 256  # width of a head; None: dim / n_heads
    norm_eps: NotNegative = 1e-5  # number ε in the normalisation
    rope_theta: Positive = 10_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None
    activation: str = "silu"  # activation of the feed-forward layers
    logit_scale: Positive | None = None  # factor of the logits; None: 1 / √dim
    dropout: BelowOne = 0.0  # share of dropped activations
    tied: bool = True  # whether the head is the token embedding


SIZES = {
    "palm-8b": Config(),
    "palm-62b": Config(dim=8192, hidden_dim=32_768, n_layers=64, n_heads=32),
    "palm-540b": Config(dim=18_432, hidden_dim=73_728, n_layers=118, n_heads=48),
    "command-r-v01": Config(
        context_length=8192, dim=8192, hidden_dim=22_528, n_layers=40, n_heads=64, n_kv_heads=64, head_dim=None,
        rope_theta=8e6, logit_scale=0.0625,
    ),
}  # fmt: skip
PAPER_PARAMETERS = {"palm-8b": 8.63e9, "palm-62b": 62.50e9, "palm-540b": 540.35e9, "command-r-v01": 35e9}


def build(config: Config) -> DecoderLM:
    """Build a model with the paper's initialisation (section 5): kernels N(0, 1 / inputs), embeddings N(0, 1)."""
    scale = config.dim**-0.5 if config.logit_scale is None else config.logit_scale
    blocks = [_block(config) for _ in range(config.n_layers)]
    model = DecoderLM.of(config, blocks, ScaledLayerNorm(config.dim, config.norm_eps, scale))
    fan_in_(model)
    return model


def _block(config: Config) -> Parallel:
    sizes = config.n_heads, config.n_kv_heads, config.head_dim
    head_dim = config.head_dim or config.dim // config.n_heads
    rotary = Rotary(head_dim, config.rope_theta, config.rope_scaling, interleaved=True)
    attention = Attention(config.dim, *sizes, bias=False, dropout=config.dropout, rotary=rotary)
    feedforward = GatedFeedForward(config.dim, config.hidden_dim, activation(config.activation))
    return Parallel(attention, feedforward, nn.LayerNorm(config.dim, config.norm_eps, bias=False), config.dropout)


WEIGHT_NAMES = {
    "embedding": "model.embed_tokens",
    "blocks.*.norm": "model.layers.*.input_layernorm",
    "blocks.*.attention.qkv": "model.layers.*.self_attn.[q,k,v]_proj",
    "blocks.*.attention.out": "model.layers.*.self_attn.o_proj",
    "blocks.*.feedforward.gate_up": "model.layers.*.mlp.[gate,up]_proj",
    "blocks.*.feedforward.down": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
NOT_WEIGHTS = ("model.layers.*.self_attn.rotary_emb.inv_freq",)  # old files have the rotary frequencies
MODEL_TYPES = {"cohere": "CohereForCausalLM"}
UNSUPPORTED = {"attention_bias": False, "use_qk_norm": False}

FIELDS: hf.Fields = hf.SIZE_FIELDS | {
    "n_kv_heads": hf.Field("num_key_value_heads", lambda json: json["num_attention_heads"]),
    "head_dim": hf.Field("head_dim", None),  # transformers reads it if heads are not dim / n_heads wide
    "norm_eps": hf.Field("layer_norm_eps", 1e-5, float),
    "activation": hf.activation_field("hidden_act", "silu"),
    "logit_scale": hf.Field("logit_scale", lambda json: 0.0625, float, if_none=lambda config: config.dim**-0.5),
    "dropout": hf.Field("attention_dropout", 0.0, hf.rate),
    "tied": hf.Field("tie_word_embeddings", True),
    "unsupported": hf.constants(**UNSUPPORTED),
    "rope": hf.rope(500_000.0),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)

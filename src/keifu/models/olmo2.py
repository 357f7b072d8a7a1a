"""OLMo 2 (Ai2, 2024): LLaMA's layers with changes for stable training.

Compared with LLaMA: the norms are after the sublayers instead of before them (reordered norm), and queries and keys are
normalised over all heads together (QK-norm). Both ideas are older: Liu et al. (2021) and Dehghani et al. (2023).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keifu.layers.attention.attention import Attention
from keifu.layers.normalisation import AllHeadsRMSNorm, FullPrecisionRMSNorm
from keifu.layers.transformer.blocks import ReorderedNorm
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama, qwen3
from keifu.models.hf import config as hf
from keifu.models.registration import gguf
from keifu.ranges import Count, Positive


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """Sizes and settings of a model. The defaults are OLMo 2 7B."""

    vocab_size: Count = 100_352  # tokens in the vocabulary
    context_length: Count = 4096  # longest sequence in tokens
    dim: Count = 4096  # width of the hidden states
    hidden_dim: Count = 11_008  # width inside the feed-forward layers
    n_layers: Count = 32  # Transformer blocks
    n_heads: Count = 32  # attention heads
    n_kv_heads: Count | None = None  # key and value heads; None: as many as n_heads
    rope_theta: Positive = field(default=500_000.0, kw_only=True)  # base of the rotary frequencies


SIZES = {
    "olmo2-1b": Config(dim=2048, hidden_dim=8192, n_layers=16, n_heads=16),
    "olmo2-7b": Config(),
    "olmo2-13b": Config(dim=5120, hidden_dim=13_824, n_layers=40, n_heads=40),
    "olmo2-32b": Config(dim=5120, hidden_dim=27_648, n_layers=64, n_heads=40, n_kv_heads=8),
}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA.

    The paper draws every weight from N(0, 0.02²) and does not scale the residual projections (section 3.3).
    """
    return llama.assemble(config, partial(attention, config), block=ReorderedNorm, norm=FullPrecisionRMSNorm)


def attention(config: Any, layer: int) -> Attention:
    """Build the attention of a layer, whose queries and keys are normalised over all heads together."""
    kv_dim = (config.n_kv_heads or config.n_heads) * (config.dim // config.n_heads)
    norms = AllHeadsRMSNorm(config.dim, config.norm_eps), AllHeadsRMSNorm(kv_dim, config.norm_eps)
    return llama.attention(config, config.attention_bias, qk_norm=norms)


WEIGHT_NAMES = qwen3.WEIGHT_NAMES | {
    "blocks.*.attention_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.feedforward_norm": "model.layers.*.post_feedforward_layernorm",
}
MODEL_TYPES = {"olmo2": "Olmo2ForCausalLM"}

FIELDS: hf.Fields = llama.BIAS_FIELDS | {
    "n_kv_heads": llama.ALL_HEADS,
    "norm_eps": hf.Field("rms_norm_eps", 1e-5, float),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)

GGUF = {
    "olmo2": gguf.GgufArchitecture(
        names=gguf.LLAMA | gguf.QK_NORM | gguf.REORDERED_NORMS, fields=gguf.ROTARY_FIELDS, fixed=gguf.SILU
    ),
}  # fmt: skip

"""Granite 3 (IBM, 2024): LLaMA's layers with four factors from maximal update parametrisation (Yang et al., 2022).

They scale the embeddings, the scores of attention, the output of each sublayer, and the logits.
"""

from dataclasses import dataclass, field
from functools import partial

from keifu.layers.normalisation import ScaledRMSNorm
from keifu.layers.transformer.blocks import ScaledPreNorm
from keifu.layers.transformer.decoder import DecoderLM, ScaledEmbedding
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """Sizes and settings of a model. The defaults are Granite 3.0 8B."""

    vocab_size: int = 49_155
    context_length: int = 4096
    dim: int = 4096
    hidden_dim: int = 12_800
    n_layers: int = 40
    n_heads: int = 32
    n_kv_heads: int = 8
    norm_eps: float = field(default=1e-5, kw_only=True)
    feedforward_bias: bool = False
    embedding_scale: float = 12.0
    attention_scale: float = 1 / 128
    residual_scale: float = 0.22
    logit_divisor: float = 16.0
    tied: bool = field(default=True, kw_only=True)


SIZES = {
    "granite3-2b": Config(dim=2048, hidden_dim=8192, attention_scale=1 / 64, logit_divisor=8.0),
    "granite3-8b": Config(),
}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    attention = partial(llama.attention, config, config.attention_bias, scale=config.attention_scale)
    return llama.assemble(
        config,
        lambda layer: attention(),
        partial(llama.gated, config, bias=config.feedforward_bias),
        block=partial(ScaledPreNorm, scale=config.residual_scale),
        last_norm=ScaledRMSNorm(config.dim, config.norm_eps, 1 / config.logit_divisor),
        embedding=ScaledEmbedding(config.vocab_size, config.dim, config.embedding_scale),
    )


WEIGHT_NAMES = llama.WEIGHT_NAMES
MODEL_TYPES = {"granite": "GraniteForCausalLM"}

FIELDS: hf.Fields = llama.BIAS_FIELDS | {
    "feedforward_bias": hf.Field("mlp_bias", False),
    "embedding_scale": hf.Field("embedding_multiplier", 1.0, float),
    "attention_scale": hf.Field("attention_multiplier", 1.0, float),
    "residual_scale": hf.Field("residual_multiplier", 1.0, float),
    "logit_divisor": hf.Field("logits_scaling", 1.0, float),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)

GGUF = {
    "granite": gguf.GgufArchitecture(
        names=gguf.LLAMA,
        fields=gguf.ROTARY_FIELDS | {
            "embedding_scale": "embedding_scale", "attention.scale": "attention_scale",
            "residual_scale": "residual_scale", "logit_scale": "logit_divisor",
        },
        fixed={"activation": "silu", "dropout": 0.0}, interleaved=True, divisors="llama3",
        optional={"attention_bias": "blk.0.attn_q.bias", "feedforward_bias": "blk.0.ffn_down.bias"},
        needed=("embedding_scale", "attention.scale", "residual_scale", "logit_scale"),
    ),
}  # fmt: skip
REFUSED = {"native": "ScaledRMSNorm", "tensor": "ScaledPreNorm"}

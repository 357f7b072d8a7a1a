"""Qwen3 (Yang et al., 2025): LLaMA's layers, with QK-norm (an RMSNorm of each head's queries and keys) instead of
Qwen2's biases.

QK-norm limits the growth of attention logits, so that training is stable (Dehghani et al., 2023).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keifu.layers.attention.attention import Attention
from keifu.layers.normalisation import RMSNorm
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """The defaults are Qwen3-8B. The attention is n_heads · head_dim wide, which need not be `dim`."""

    vocab_size: int = 151_936
    context_length: int = 40_960
    dim: int = 4096
    hidden_dim: int = 12_288
    n_layers: int = 36
    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 128
    rope_theta: float = field(default=1e6, kw_only=True)
    sliding_window: int | None = None  # tokens that a token attends to, including itself; None: all
    first_window_layer: int = 0  # earlier layers have full attention


SIZES = {
    "qwen3-0.6b": Config(dim=1024, hidden_dim=3072, n_layers=28, n_heads=16, tied=True),
    "qwen3-1.7b": Config(dim=2048, hidden_dim=6144, n_layers=28, n_heads=16, tied=True),
    "qwen3-4b": Config(dim=2560, hidden_dim=9728, tied=True),
    "qwen3-8b": Config(),
    "qwen3-14b": Config(dim=5120, hidden_dim=17_408, n_layers=40, n_heads=40),
    "qwen3-32b": Config(dim=5120, hidden_dim=25_600, n_layers=64, n_heads=64),
}


def build(config: Config) -> DecoderLM:
    """Build a model with GPT-2's initialisation, N(0, 0.02²) with scaled residual projections: the report does not give
    its own."""
    return llama.assemble(config, partial(_attention, config))


def attention(config: Any, window: int | None, layer: int) -> Attention:
    """Build the attention of a layer with this window, whose queries and keys are normalised in each head."""
    norm = partial(RMSNorm, config.head_dim, config.norm_eps)
    return llama.attention(config, config.attention_bias, window=window, qk_norm=(norm(), norm()))


def _attention(config: Config, layer: int) -> Attention:
    return attention(config, config.sliding_window if layer >= config.first_window_layer else None, layer)


WEIGHT_NAMES = llama.WEIGHT_NAMES | {
    "blocks.*.attention.q_norm": "model.layers.*.self_attn.q_norm",
    "blocks.*.attention.k_norm": "model.layers.*.self_attn.k_norm",
}
MODEL_TYPES = {"qwen3": "Qwen3ForCausalLM"}

ATTENTION_FIELDS: hf.Fields = llama.BIAS_FIELDS | {
    "head_dim": hf.Field("head_dim", lambda json: json["hidden_size"] // json["num_attention_heads"]),
}
FIELDS = ATTENTION_FIELDS | {"window": hf.WINDOW}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)

GGUF = {
    "qwen3": gguf.GgufArchitecture(
        names=gguf.LLAMA | gguf.QK_NORM, fields=gguf.WINDOW_FIELDS, fixed=gguf.PLAIN | {"attention_bias": False}
    ),
}  # fmt: skip

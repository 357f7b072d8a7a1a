"""Phi-3 and Phi-4 (Abdin et al., 2024): LLaMA's layers, trained on filtered and synthetic text.

Those with a long context scale the rotary positions by LongRoPE. Phi-4 mini rotates three quarters of each head. The
files have q, k and v in one matrix, and gate and up in one, as in keifu.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import Rotary
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """Sizes and settings of a model. The defaults are Phi-3 mini with 4,096 tokens."""

    vocab_size: int = 32_064
    context_length: int = 4096
    dim: int = 3072
    hidden_dim: int = 8192
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32
    norm_eps: float = field(default=1e-5, kw_only=True)
    sliding_window: int | None = 2047  # tokens that a token attends to, including itself; None: all
    rope_dim: int | None = None  # numbers of a head that are rotated by position; None: all


_medium = partial(Config, dim=5120, hidden_dim=17_920, n_layers=40, n_heads=40, n_kv_heads=10)

SIZES = {
    "phi3-mini": Config(),
    "phi3-medium": _medium(),
    "phi4": _medium(vocab_size=100_352, context_length=16_384, rope_theta=250_000.0, sliding_window=None),
}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    return llama.assemble(config, partial(_attention, config))


def _attention(config: Config, layer: int) -> Attention:
    rotary = Rotary(config.rope_dim or config.dim // config.n_heads, config.rope_theta, config.rope_scaling)
    return llama.attention(config, window=config.sliding_window, rotary=rotary)


WEIGHT_NAMES = llama.WEIGHT_NAMES | {
    "blocks.*.attention.qkv": "model.layers.*.self_attn.qkv_proj",
    "blocks.*.feedforward.gate_up": "model.layers.*.mlp.gate_up_proj",
}
MODEL_TYPES = {"phi3": "Phi3ForCausalLM"}
UNSUPPORTED = {"embd_pdrop": 0.0, "resid_pdrop": 0.0}


def _read_rope(json: Mapping[str, Any]) -> dict[str, Any]:
    part = hf.read_part(json)
    rope_dim = None if part == 1.0 else int(json["hidden_size"] // json["num_attention_heads"] * part)
    return {**hf.read_rope(json, partial=True), "rope_dim": rope_dim}


def _write_rope(config: Config) -> dict[str, Any]:
    rope, scaling = hf.write_rope(config.rope_theta, config.rope_scaling), config.rope_scaling
    if config.rope_dim:
        rope = hf.write_part(rope, config.rope_dim * config.n_heads / config.dim)
    trained = scaling.original_context_length if scaling else config.context_length
    return {**rope, "original_max_position_embeddings": trained}


FIELDS: hf.Fields = llama.DECODER_FIELDS | {
    "norm_eps": hf.Field("rms_norm_eps", 1e-5, float),
    "sliding_window": hf.Field("sliding_window", None, if_none=hf.null),
    "rope": hf.FieldGroup(_read_rope, _write_rope),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)

GGUF = {
    "phi3": gguf.GgufArchitecture(
        names=gguf.JOINED_GATE | {"blocks.*.attention.qkv": "blk.*.attn_qkv"}, fields=gguf.WINDOW_FIELDS,
        fixed={"activation": "silu", "dropout": 0.0}, divisors="longrope", derive=gguf.optional_window,
    ),
}  # fmt: skip

"""Gemma 2 (Gemma Team, 2024): soft caps on the scores of attention and on the logits, sliding-window attention in every
other layer, norms before and after each sublayer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keifu.layers.attention.attention import Attention, CappedAttention
from keifu.layers.normalisation import UnitOffsetRMSNorm
from keifu.layers.transformer.blocks import SandwichNorm
from keifu.layers.transformer.decoder import DecoderLM, ScaledEmbedding, SoftCappedLM
from keifu.models import gemma3, llama
from keifu.models.hf import config as hf
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """Sizes and settings of a model. The defaults are Gemma 2 2B."""

    vocab_size: int = 256_000
    context_length: int = 8192
    dim: int = 2304
    hidden_dim: int = 9216
    n_layers: int = 26
    n_heads: int = 8
    n_kv_heads: int = 4
    head_dim: int = 256
    activation: str = field(default="gelu_tanh", kw_only=True)
    sliding_window: int = 4096  # tokens that a local layer attends to, including the token itself
    global_layers: tuple[int, ...] | None = None  # None: every second, from layer 1 on
    attention_scale: float | None = None  # None: 1 / √head_dim
    attention_cap: float | None = 50.0  # soft cap of the attention scores
    logit_cap: float | None = 30.0
    tied: bool = field(default=True, kw_only=True)


# Table 2 gives the numbers of parameters, with the embedding.
SIZES = {
    "gemma2-2b": Config(),
    "gemma2-9b": Config(dim=3584, hidden_dim=14_336, n_layers=42, n_heads=16, n_kv_heads=8),
    "gemma2-27b": Config(
        dim=4608, hidden_dim=36_864, n_layers=46, n_heads=32, n_kv_heads=16, head_dim=128, attention_scale=144**-0.5
    ),
}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    embedding = ScaledEmbedding(config.vocab_size, config.dim, config.dim**0.5)
    return llama.assemble(
        config, partial(_attention, config), block=SandwichNorm, norm=UnitOffsetRMSNorm, n_norms=4, embedding=embedding,
        model=SoftCappedLM if config.logit_cap else DecoderLM,
    )  # fmt: skip


def _attention(config: Config, layer: int) -> Attention:
    window = None if layer in llama.global_layers(config, 2) else config.sliding_window
    cap = config.attention_cap
    attention = partial(CappedAttention, soft_cap=cap) if cap else Attention
    return llama.attention(config, config.attention_bias, attention, window=window, scale=config.attention_scale)


WEIGHT_NAMES = {name: theirs for name, theirs in gemma3.WEIGHT_NAMES.items() if not name.endswith(("q_norm", "k_norm"))}
MODEL_TYPES = {"gemma2": "Gemma2ForCausalLM"}
UNSUPPORTED: dict[str, Any] = {"use_bidirectional_attention": None}

FIELDS: hf.Fields = gemma3.GEMMA_FIELDS | {
    "vocab_size": hf.Field("vocab_size", 256_000),
    "context_length": hf.Field("max_position_embeddings", 8192),
    "attention_cap": hf.Field("attn_logit_softcapping", 50.0, if_none=hf.null),
    "logit_cap": hf.Field("final_logit_softcapping", 30.0, if_none=hf.null),
    "global_layers": llama.published_layers(2),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)


def _required(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scale of attention, which differs in the 27B model alone: llama.cpp recognises it by its 46 layers.
    llama.cpp always applies both caps, by default these."""
    caps = {"attention_cap": 50.0, "logit_cap": 30.0}
    return {"attention_scale": (values["dim"] // values["n_heads"]) ** -0.5 if values["n_layers"] == 46 else None} | {
        name: cap for name, cap in caps.items() if not values.get(name)
    }


GGUF = {
    "gemma2": gguf.GgufArchitecture(
        names=gguf.unit_offset(gguf.LLAMA | gguf.POST_NORMS),
        fields=gguf.WINDOW_FIELDS | {
            "attn_logit_softcapping": "attention_cap", "final_logit_softcapping": "logit_cap",
        },
        fixed={
            "activation": "gelu_tanh", "global_layers": None, "attention_bias": False, "tied": True, "dropout": 0.0
        },
        windows=True, derive=_required,
    ),
}  # fmt: skip
REFUSED = {"native": "SoftCappedLM", "tensor": "CappedAttention"}

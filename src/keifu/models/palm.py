"""PaLM (Chowdhery et al., 2022): parallel attention and feed-forward layers after one norm, so that their first
matrices can be multiplied at once; a single head of keys and values (multi-query attention), so that the key-value
cache is n_heads times smaller; SwiGLU, rotary positions, no biases, and a head tied to the embedding, with logits
divided by √dim.

No PaLM weights were published. Cohere's Command-R has the same layer, and its files are read and written here. Rotary
pairs are interleaved, as in Cohere's code; the paper does not mention this, nor the norms' ε.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from keifu.layers.attention.positions import Rotary
from keifu.layers.initialisation import fan_in_
from keifu.layers.normalisation import ScaledLayerNorm
from keifu.layers.transformer.blocks import Parallel
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.models.registration import gguf
from keifu.ranges import Count, NotNegative, Positive


@dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """The defaults are PaLM 8B (table 1). The attention is n_heads · head_dim wide, which need not be `dim`."""

    vocab_size: Count = 256_000  # tokens in the vocabulary
    context_length: Count = 2048  # longest sequence in tokens
    dim: Count = 4096  # width of the hidden states
    hidden_dim: Count = 16_384  # width inside the feed-forward layers
    n_layers: Count = 32  # Transformer blocks
    n_heads: Count = 16  # attention heads
    n_kv_heads: Count = 1  # key and value heads
    head_dim: Count | None = 256  # width of a head; None: dim / n_heads
    norm_eps: NotNegative = field(default=1e-5, kw_only=True)  # number ε in the normalisation
    logit_scale: Positive | None = None  # factor of the logits; None: 1 / √dim
    tied: bool = field(default=True, kw_only=True)  # whether the head is the token embedding


SIZES = {
    "palm-8b": Config(),
    "palm-62b": Config(dim=8192, hidden_dim=32_768, n_layers=64, n_heads=32),
    "palm-540b": Config(dim=18_432, hidden_dim=73_728, n_layers=118, n_heads=48),
    "command-r-v01": Config(
        context_length=8192, dim=8192, hidden_dim=22_528, n_layers=40, n_heads=64, n_kv_heads=64, head_dim=None,
        rope_theta=8e6, logit_scale=0.0625,
    ),
}  # fmt: skip


def build(config: Config) -> DecoderLM:
    """Build a model with the paper's initialisation (section 5): kernels N(0, 1 / inputs), embeddings N(0, 1)."""
    scale = config.dim**-0.5 if config.logit_scale is None else config.logit_scale
    blocks = [_block(config) for _ in range(config.n_layers)]
    model = DecoderLM.of(config, blocks, ScaledLayerNorm(config.dim, config.norm_eps, scale))
    fan_in_(model)
    return model


def _block(config: Config) -> Parallel:
    head_dim = config.head_dim or config.dim // config.n_heads
    rotary = Rotary(head_dim, config.rope_theta, config.rope_scaling, interleaved=True)
    norm = nn.LayerNorm(config.dim, config.norm_eps, bias=False)
    return Parallel(llama.attention(config, rotary=rotary), llama.gated(config, 0), norm, config.dropout)


WEIGHT_NAMES = {ours: theirs for ours, theirs in llama.WEIGHT_NAMES.items() if not ours.endswith("_norm")} | {
    "blocks.*.norm": "model.layers.*.input_layernorm"
}
NOT_WEIGHTS = llama.NOT_WEIGHTS
MODEL_TYPES = {"cohere": "CohereForCausalLM"}
UNSUPPORTED = {"attention_bias": False, "use_qk_norm": False}

FIELDS: hf.Fields = llama.DECODER_FIELDS | {
    "head_dim": hf.Field("head_dim", None),  # transformers reads it if heads are not dim / n_heads wide
    "norm_eps": hf.Field("layer_norm_eps", 1e-5, float),
    "logit_scale": hf.Field("logit_scale", lambda json: 0.0625, float, if_none=lambda config: config.dim**-0.5),
    "tied": hf.Field("tie_word_embeddings", True),
    "unsupported": hf.constants(**UNSUPPORTED),
    "rope": hf.rope(500_000.0),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)


def _read_scale(metadata: Mapping[str, Any]) -> dict[str, Any]:
    scale, usual = metadata["logit_scale"], metadata["embedding_length"] ** -0.5
    return {"logit_scale": None if math.isclose(scale, usual, rel_tol=1e-6) else scale}


def _write_scale(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"logit_scale": values["dim"] ** -0.5 if values["logit_scale"] is None else values["logit_scale"]}


def _required_heads(values: Mapping[str, Any]) -> dict[str, Any]:
    usual = values["dim"] // values["n_heads"]
    return {"head_dim": usual if values.get("head_dim") == usual else None}


def _limit(values: Mapping[str, Any]) -> str:
    return "fewer than 64 layers (with more it expects norms of queries and keys)" if values["n_layers"] >= 64 else ""


GGUF = {
    "command-r": gguf.GgufArchitecture(
        names={ours: theirs for ours, theirs in gguf.LLAMA.items() if not ours.endswith("_norm")} | {
            "blocks.*.norm": "blk.*.attn_norm"
        },
        fields={
            "attention.head_count_kv": "n_kv_heads", "attention.layer_norm_epsilon": "norm_eps",
            "rope.freq_base": "rope_theta",
        },
        fixed={"activation": "silu", "tied": True, "dropout": 0.0},
        derive=_required_heads, limit=_limit, read=_read_scale, write=_write_scale, needed=("logit_scale",),
    ),
}  # fmt: skip

"""LFM2 (Liquid AI, 2025): ten gated short convolutions and six layers of attention, found by a search for fast
decoding on a CPU.

A convolution remembers two tokens, so its state and its cost do not depend on the number of tokens. The attention is
Qwen3's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from keifu.layers.normalisation import RMSNorm
from keifu.layers.recurrent.gated_convolution import GatedConvolution
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """Sizes and settings of a model. The defaults are LFM2 1.2B."""

    vocab_size: int = 65_536
    context_length: int = 128_000
    dim: int = 2048
    hidden_dim: int = 8192
    n_layers: int = 16
    n_heads: int = 32
    n_kv_heads: int = 8
    global_layers: tuple[int, ...] = (2, 5, 8, 10, 12, 14)  # layers with attention; the others are convolutions
    convolution: int = 3  # tokens of the short convolutions
    convolution_bias: bool = False  # whether the convolutions and their projections have one
    norm_eps: float = field(default=1e-5, kw_only=True)
    rope_theta: float = field(default=1e6, kw_only=True)
    tied: bool = field(default=True, kw_only=True)


SIZES = {
    "lfm2-350m": Config(dim=1024, hidden_dim=4608, n_heads=16),
    "lfm2-700m": Config(dim=1536, hidden_dim=6912, n_heads=24),
    "lfm2-1.2b": Config(),
}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    return llama.assemble(config, partial(_mixer, config))


def _mixer(config: Config, layer: int) -> nn.Module:
    if layer not in config.global_layers:
        return GatedConvolution(config.dim, config.convolution, config.convolution_bias)
    norm = partial(RMSNorm, config.dim // config.n_heads, config.norm_eps)
    return llama.attention(config, qk_norm=(norm(), norm()))


WEIGHT_NAMES = {
    "embedding": "model.embed_tokens",
    "blocks.*.attention_norm": "model.layers.*.operator_norm",
    "blocks.*.attention.qkv": "model.layers.*.self_attn.[q,k,v]_proj",
    "blocks.*.attention.q_norm": "model.layers.*.self_attn.q_layernorm",
    "blocks.*.attention.k_norm": "model.layers.*.self_attn.k_layernorm",
    "blocks.*.attention.out": "model.layers.*.self_attn.out_proj",
    "blocks.*.attention.inputs": "model.layers.*.conv.in_proj",
    "blocks.*.attention.convolution": "model.layers.*.conv.conv",
    "blocks.*.attention.output": "model.layers.*.conv.out_proj",
    "blocks.*.feedforward_norm": "model.layers.*.ffn_norm",
    "blocks.*.feedforward.gate_up": "model.layers.*.feed_forward.w[1,3]",
    "blocks.*.feedforward.down": "model.layers.*.feed_forward.w2",
    "norm": "model.embedding_norm",
    "head": "lm_head",
}
MODEL_TYPES = {"lfm2": "Lfm2ForCausalLM"}


def _read_hidden_dim(json: Mapping[str, Any]) -> dict[str, Any]:
    """Read the width of the feed-forward layers: of the published number two thirds, rounded up to a multiple."""
    width = json.get("block_ff_dim", json.get("intermediate_size", 12_288))
    if json.get("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        if (factor := json.get("block_ffn_dim_multiplier", 1.0)) is not None:
            multiple = json.get("block_multiple_of", 256)
            width = -(-int(factor * width) // multiple) * multiple
    return {"hidden_dim": width}


def _write_hidden_dim(config: Config) -> dict[str, Any]:
    return {"intermediate_size": config.hidden_dim, "block_auto_adjust_ff_dim": False}


def _read_layers(json: Mapping[str, Any]) -> dict[str, Any]:
    n_layers = hf.check_layers(json, "num_hidden_layers")
    listed = json.get("full_attn_idxs")
    full = range(n_layers) if listed is None else listed
    types = hf.read_layer_types(json, "conv") or hf.layer_types(n_layers, full, "conv")
    return {"global_layers": tuple(layer for layer, name in enumerate(types) if name == "full_attention")}


def _write_layers(config: Config) -> dict[str, Any]:
    return {"layer_types": hf.layer_types(config.n_layers, config.global_layers, "conv")}


def _read_tied(json: Mapping[str, Any]) -> dict[str, Any]:
    return {"tied": json.get("tie_embedding", json.get("tie_word_embeddings", True))}


def _write_tied(config: Config) -> dict[str, Any]:
    return {"tie_word_embeddings": config.tied}


_SHARED = {name: entry for name, entry in llama.DECODER_FIELDS.items() if name != "dropout"}
FIELDS: hf.Fields = _SHARED | {
    "hidden_dim": hf.FieldGroup(_read_hidden_dim, _write_hidden_dim),
    "activation": hf.choice("hidden_act", {"silu": "silu"}),
    "n_kv_heads": hf.Field("num_key_value_heads", 8),
    "context_length": hf.Field("max_position_embeddings", 128_000),
    "norm_eps": hf.Field("norm_eps", 1e-5, float),
    "rope": hf.rope(1e6),
    "tied": hf.FieldGroup(_read_tied, _write_tied),
    "convolution": hf.Field("conv_L_cache", 3),
    "convolution_bias": hf.Field("conv_bias", False),
    "layers": hf.FieldGroup(_read_layers, _write_layers),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)

GGUF = {
    "lfm2": gguf.GgufArchitecture(
        names=gguf.LLAMA | gguf.QK_NORM | {
            "blocks.*.attention.inputs": "blk.*.shortconv.in_proj",
            "blocks.*.attention.convolution": "blk.*.shortconv.conv.flat",
            "blocks.*.attention.output": "blk.*.shortconv.out_proj",
            "norm": "token_embd_norm",
        },
        fields=gguf.ROTARY_FIELDS | {"shortconv.l_cache": "convolution"},
        fixed={"activation": "silu", "dropout": 0.0, "convolution_bias": False}, attention_layers="global_layers",
        needed=("shortconv.l_cache",),
    ),
}  # fmt: skip
REFUSED = {"native": "GatedConvolution", "tensor": "GatedConvolution"}

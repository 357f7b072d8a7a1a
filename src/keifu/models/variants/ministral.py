"""Ministral (Mistral AI, 2024): Mistral's layers, of which some have a sliding window and the others see everything."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from keifu.layers.attention.attention import Attention
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf


@dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """Sizes and settings of a model; the defaults are Ministral 8B."""

    vocab_size: int = 131_072
    context_length: int = 32_768
    dim: int = 4096
    hidden_dim: int = 12_288
    n_layers: int = 36
    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 128
    norm_eps: float = 1e-5
    rope_theta: float = 1e8
    sliding_window: int | None = 32_768  # tokens that a local layer attends to, the token itself included
    global_layers: tuple[int, ...] = ()


SIZES = {"ministral-8b": Config()}
PAPER_PARAMETERS = {"ministral-8b": 8.02e9}


def build(config: Config) -> DecoderLM:
    """Build a model; it is initialised as LLaMA is here."""
    return llama.assemble(config, partial(_attention, config))


def _attention(config: Config, layer: int) -> Attention:
    return llama.attention(config, window=None if layer in config.global_layers else config.sliding_window)


WEIGHT_NAMES = llama.WEIGHT_NAMES
PREFIX = "model."
MODEL_TYPES = {"ministral": "MinistralForCausalLM"}

FIELDS: hf.Fields = llama.FIELDS | {
    "n_kv_heads": hf.Field("num_key_value_heads", 8),
    "head_dim": hf.Field("head_dim", lambda json: json["hidden_size"] // json["num_attention_heads"]),
    "sliding_window": hf.Field("sliding_window", 4096),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a Hugging Face config.json of model_type ministral."""
    fields = hf.read_fields(json, FIELDS)
    types = json.get("layer_types") or ()
    full = tuple(layer for layer, name in enumerate(types) if name == "full_attention")
    return Config(**fields, **hf.read_rope(json), global_layers=full)


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers, vLLM and llama.cpp's converter read."""
    everything = config.global_layers if config.sliding_window else range(config.n_layers)
    return {
        "sliding_window": None,
        **hf.write(config, MODEL_TYPES, FIELDS),
        **hf.write_rope(config.rope_theta, config.rope_scaling),
        "layer_types": hf.layer_types(config.n_layers, everything),
    }

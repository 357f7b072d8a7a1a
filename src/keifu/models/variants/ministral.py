"""Ministral (Mistral AI, 2024): Mistral's layers, of which some have a sliding window and the others full attention.

In Ministral 3 (2025) all layers have full attention, and queries grow at positions beyond the trained length.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keifu.errors import UserError
from keifu.layers.attention.attention import Attention, TemperedAttention
from keifu.layers.attention.positions import RopeScaling
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """Sizes and settings of a model. The defaults are Ministral 8B."""

    vocab_size: int = 131_072
    context_length: int = 32_768
    dim: int = 4096
    hidden_dim: int = 12_288
    n_layers: int = 36
    n_heads: int = 32
    n_kv_heads: int = 8
    head_dim: int = 128
    norm_eps: float = field(default=1e-5, kw_only=True)
    rope_theta: float = field(default=1e8, kw_only=True)
    sliding_window: int | None = 32_768  # tokens that a local layer attends to, including the token itself
    global_layers: tuple[int, ...] = ()
    query_growth: float | None = None  # growth of queries with the logarithm of their position (Ministral 3)


_ROPE = {  # for a published config of Ministral 3 without these fields
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_ministral3 = partial(
    Config, context_length=262_144, rope_theta=1e6, sliding_window=None, query_growth=0.1,
    rope_scaling=RopeScaling("yarn", 16.0, 16_384, mscale=1.0, mscale_all_dim=1.0),
)  # fmt: skip

SIZES = {"ministral-8b": Config(), "ministral3-8b": _ministral3(hidden_dim=14_336, n_layers=34)}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    return llama.assemble(config, partial(_attention, config))


def _attention(config: Config, layer: int) -> Attention:
    window = None if layer in config.global_layers else config.sliding_window
    if config.query_growth is None:
        return llama.attention(config, window=window)
    assert config.rope_scaling is not None, "it says the trained length"
    trained = config.rope_scaling.original_context_length
    tempered = partial(TemperedAttention, growth=config.query_growth, trained=trained)
    return llama.attention(config, layer=tempered, window=window)


WEIGHT_NAMES = llama.WEIGHT_NAMES
MODEL_TYPES = {"ministral": "MinistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}


def _read_layers(json: Mapping[str, Any]) -> dict[str, Any]:
    types = hf.read_layer_types(json) or ()
    return {"global_layers": tuple(layer for layer, name in enumerate(types) if name == "full_attention")}


def _write_layers(config: Config) -> dict[str, Any]:
    full = config.global_layers if config.sliding_window else range(config.n_layers)
    return {"layer_types": hf.layer_types(config.n_layers, full)}


def _read_growth(json: Mapping[str, Any]) -> dict[str, Any]:
    rope = json.get("rope_parameters") or json.get("rope_scaling") or _ROPE
    fields = hf.read_rope({**json, "rope_parameters": rope})
    if (growth := rope.get("llama_4_scaling_beta")) is None or fields["rope_scaling"] is None:
        raise UserError("its rope_parameters need llama_4_scaling_beta and a rope_type such as yarn.")
    return {**fields, "query_growth": float(growth)}


def _write_growth(config: Config) -> dict[str, Any]:
    rope = hf.write_rope(config.rope_theta, config.rope_scaling)
    for fields in (rope["rope_scaling"], rope["rope_parameters"]):
        fields["llama_4_scaling_beta"] = config.query_growth
    return rope


FIELDS3: hf.Fields = llama.DECODER_FIELDS | {
    "n_kv_heads": hf.Field("num_key_value_heads", 8),
    "head_dim": hf.Field("head_dim", 128),
    "norm_eps": hf.Field("rms_norm_eps", 1e-5, float),
    "sliding_window": hf.Field("sliding_window", None, if_none=hf.null),
    "rope": hf.FieldGroup(_read_growth, _write_growth),
}
FIELDS: hf.Fields = llama.DECODER_FIELDS | {
    "n_kv_heads": hf.Field("num_key_value_heads", 8),
    "head_dim": hf.Field("head_dim", lambda json: json["hidden_size"] // json["num_attention_heads"]),
    "sliding_window": hf.Field("sliding_window", 4096, if_none=hf.null),
    "global_layers": hf.FieldGroup(_read_layers, _write_layers),
}
_TABLES = {"ministral": FIELDS, "ministral3": FIELDS3}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a Hugging Face config.json of model_type ministral or ministral3."""
    return Config(**hf.read_fields(json, _TABLES[json["model_type"]]))


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers, vLLM and llama.cpp's converter read."""
    model_type = "ministral" if config.query_growth is None else "ministral3"
    return hf.write(config, {model_type: MODEL_TYPES[model_type]}, _TABLES[model_type])


def _required(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the window, and that queries do not grow if the scaling is another than yarn, of which llama.cpp takes the
    trained length."""
    scaling = values.get("rope_scaling")
    growth = {} if scaling is None or scaling.kind == "yarn" else {"query_growth": None}
    return gguf.optional_window(values) | growth


GGUF = {
    "mistral3": gguf.GgufArchitecture(
        names=gguf.LLAMA, fields=gguf.WINDOW_FIELDS | {"attention.temperature_scale": "query_growth"},
        fixed={"activation": "silu", "dropout": 0.0}, interleaved=True, divisors="llama3", log_multiplier=1.0,
        derive=_required,
    ),
}  # fmt: skip

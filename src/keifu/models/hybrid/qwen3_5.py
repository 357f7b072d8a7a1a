"""The text model of Qwen3.5 (Qwen Team, 2026): Qwen3-Next's layers, dense or with experts.

A Gated DeltaNet has separate matrices for queries, keys and values; gates; strengths; and decays.
"""

from dataclasses import dataclass
from typing import Any

from keifu.layers.recurrent.gated_delta import SeparateInputs
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models.hf import config as hf
from keifu.models.hybrid import qwen3_next


@dataclass(frozen=True)
class Config(qwen3_next.Config):
    """Sizes and settings of a model, as in Qwen3-Next. The defaults are Qwen3.5-9B."""

    vocab_size: int = 248_320
    dim: int = 4096
    hidden_dim: int = 12_288
    n_layers: int = 32
    n_kv_heads: int = 4
    n_experts: int | None = None
    n_experts_per_token: int = 8


SIZES = {"qwen3.5-9b": Config(), "qwen3.5-35b-a3b": Config(dim=2048, n_layers=40, n_kv_heads=2, n_experts=256)}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's Qwen3."""
    return qwen3_next.assemble(config, SeparateInputs)


_INPUTS = {"qkv": "qkv", "gate": "z", "strength": "b", "decay": "a"}
WEIGHT_NAMES = qwen3_next.SHARED_NAMES | {
    f"blocks.*.attention.inputs.{ours}": f"model.layers.*.linear_attn.in_proj_{theirs}"
    for ours, theirs in _INPUTS.items()
}
NOT_WEIGHTS = qwen3_next.NOT_WEIGHTS
MODEL_TYPES = {"qwen3_5_text": "Qwen3_5ForCausalLM", "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"}
UNSUPPORTED: dict[str, Any] = {"attn_output_gate": True, "mlp_only_layers": []}

DENSE_FIELDS: hf.Fields = qwen3_next.SHARED_FIELDS | {
    "hidden_dim": hf.Field("intermediate_size", 12_288),
    "n_kv_heads": hf.Field("num_key_value_heads", 4),
}
EXPERT_FIELDS: hf.Fields = qwen3_next.SHARED_FIELDS | qwen3_next.EXPERT_FIELDS | {
    "hidden_dim": hf.Field("intermediate_size", 12_288),  # no layer uses it
    "n_kv_heads": hf.Field("num_key_value_heads", 2),
    "n_experts": hf.Field("num_experts", 256),
    "n_experts_per_token": hf.Field("num_experts_per_tok", 8),
}  # fmt: skip
FIELDS = {"qwen3_5_text": DENSE_FIELDS, "qwen3_5_moe_text": EXPERT_FIELDS}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a Hugging Face config.json of model_type qwen3_5_text or qwen3_5_moe_text."""
    return Config(**hf.read_fields(json, FIELDS[json["model_type"]]))


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers and vLLM read."""
    model_type = "qwen3_5_moe_text" if config.n_experts else "qwen3_5_text"
    return hf.write(config, {model_type: MODEL_TYPES[model_type]}, FIELDS[model_type])


REFUSED = {
    "gguf": "keifu lacks llama.cpp's names of its tensors",
    "native": "GatedDeltaNet",
    "tensor": "GatedDeltaNet",
}

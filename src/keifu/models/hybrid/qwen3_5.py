"""The text model of Qwen3.5 (Qwen Team, 2026): Qwen3-Next's layers, dense or with experts.

A Gated DeltaNet has separate matrices for queries, keys and values; gates; strengths; and decays.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keifu.layers.recurrent.gated_delta import SeparateInputs
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models.hf import config as hf
from keifu.models.hybrid import qwen3_next
from keifu.models.registration import gguf
from keifu.models.registration.arrangement import Arrangement


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
PREDICTIONS = qwen3_next.PREDICTIONS
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


def _order(values: Mapping[str, Any], size: int, axis: int = 0, start: int = 0) -> Arrangement:
    """Return the arrangement of heads of values for llama.cpp: the first of each head of keys, then the second, ...

    Ours are grouped by heads of keys. size: numbers of a head on `axis`; those before `start` stay in their order.
    """
    n_keys, group = values["n_linear_key_heads"], values["n_linear_value_heads"] // values["n_linear_key_heads"]

    def reorder(tensor: Tensor, first: int, second: int) -> Tensor:
        before, heads = tensor.tensor_split([start], axis)
        heads = heads.unflatten(axis, (first, second, size)).transpose(axis, axis + 1).flatten(axis, axis + 2)
        return torch.cat([before, heads], axis)

    return Arrangement(lambda ours: [reorder(ours, n_keys, group)], lambda tensors: reorder(tensors[0], group, n_keys))


def _arrangements(values: Mapping[str, Any]) -> dict[str, Arrangement]:
    """Return the arrangements of a GGUF file: Qwen3-Next's, and the order of the heads of values."""
    heads = qwen3_next.heads_of(values)
    shared, size = qwen3_next.shared_arrangements(), heads.value_dim
    order, keys = _order(values, 1), heads.channels - heads.value_width
    rates, channels = shared["blocks.*.attention.log_rate"], _order(values, size, start=keys)
    ordered = {
        "inputs.qkv.weight": channels,
        "inputs.gate.weight": _order(values, size),
        "inputs.strength.weight": order,
        "inputs.decay.weight": order,
        "convolution.weight": Arrangement(
            lambda ours: channels.split(ours.squeeze(1)), lambda tensors: channels.join([tensors[0].unsqueeze(1)])
        ),
        "log_rate": Arrangement(
            lambda ours: order.split(rates.split(ours)[0]), lambda tensors: rates.join([order.join(tensors)])
        ),
        "decay_bias": order,
        "output.weight": _order(values, size, axis=1),
    }
    return shared | {f"blocks.*.attention.{name}": arrangement for name, arrangement in ordered.items()}


def _write_rotary(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the layers, and how many pairs take the position of a text's or picture's axis: every third
    each."""
    pairs = values["rope_dim"] // 2
    sections = [-(-(pairs - axis) // 3) for axis in range(3)]
    return qwen3_next.write_linear(values) | {"rope.dimension_sections": [*sections, 0]}


def _limit(values: Mapping[str, Any]) -> str:
    return qwen3_next.limit(values) or ("" if values["n_experts"] else "n_experts, or no n_experts in qwen35")


_GGUF_INPUTS = {"qkv": "attn_qkv", "gate": "attn_gate", "strength": "ssm_beta", "decay": "ssm_alpha"}
_GGUF_NAMES = qwen3_next.GGUF_NAMES | {
    f"blocks.*.attention.inputs.{ours}": f"blk.*.{theirs}" for ours, theirs in _GGUF_INPUTS.items()
}
_SHARED = {"read": qwen3_next.read_linear, "write": _write_rotary, "arrangements": _arrangements}
GGUF = {
    "qwen35": gguf.GgufArchitecture(
        names=_GGUF_NAMES, fields=qwen3_next.GGUF_FIELDS,
        fixed=gguf.SILU | {"n_experts": None, "dense_layers": (), "n_predictions": 0},
        limit=qwen3_next.limit, needed=qwen3_next.LINEAR, **_SHARED,
    ),
    "qwen35moe": gguf.GgufArchitecture(
        names=_GGUF_NAMES | qwen3_next.GGUF_EXPERTS, fields=qwen3_next.GGUF_FIELDS | qwen3_next.GGUF_EXPERT_FIELDS,
        fixed=gguf.SILU | {"normalised": True, "dense_layers": (), "n_predictions": 0}, limit=_limit,
        needed=(*qwen3_next.LINEAR, *qwen3_next.GGUF_EXPERT_FIELDS), **_SHARED,
    ),
}  # fmt: skip
REFUSED = {"native": "GatedDeltaNet", "tensor": "GatedDeltaNet"}

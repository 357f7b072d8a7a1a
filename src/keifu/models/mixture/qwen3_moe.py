"""Qwen3-MoE (Yang et al., 2025): Qwen3's layers with 128 small feed-forward networks; each token uses eight of them.

Many small experts instead of a few large ones are DeepSeekMoE's idea (Dai et al., 2024). There is no shared expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama, qwen3
from keifu.models.hf import config as hf
from keifu.models.mixture import mixtral
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """Sizes and settings of a model. The defaults are Qwen3-30B-A3B.

    expert_dim: inner dimension of one expert. hidden_dim: inner dimension of the layers in `dense_layers`, which have
    no experts.
    """

    vocab_size: int = 151_936
    context_length: int = 40_960
    dim: int = 2048
    hidden_dim: int = 6144
    expert_dim: int = 768
    n_layers: int = 48
    n_heads: int = 32
    n_kv_heads: int = 4
    head_dim: int = 128
    n_experts: int = 128
    n_experts_per_token: int = 8
    normalised: bool = True  # whether the weights of a token's experts sum to 1
    dense_layers: tuple[int, ...] = ()
    balancing: float = 0.001  # coefficient of the balancing loss
    rope_theta: float = field(default=1e6, kw_only=True)
    sliding_window: int | None = None  # tokens that a token attends to, including itself; None: all


SIZES = {
    "qwen3-30b-a3b": Config(),
    "qwen3-235b-a22b": Config(dim=4096, hidden_dim=12_288, expert_dim=1536, n_layers=94, n_heads=64),
}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's Qwen3."""
    return llama.assemble(config, partial(qwen3.attention, config, config.sliding_window), partial(feedforward, config))


def feedforward(config: Any, layer: int) -> nn.Module:
    """Build the mixture of a layer, or the gated network of a dense one."""
    if layer in config.dense_layers:
        return llama.gated(config, layer)
    return mixtral.mixture(config, config.expert_dim, config.normalised)


EXPERT_NAMES = {
    "blocks.*.feedforward.router.gate": "model.layers.*.mlp.gate",
    "blocks.*.feedforward.experts.*.gate_up": "model.layers.*.mlp.experts.*.[gate,up]_proj",
    "blocks.*.feedforward.experts.*.down": "model.layers.*.mlp.experts.*.down_proj",
}
WEIGHT_NAMES = qwen3.WEIGHT_NAMES | EXPERT_NAMES
MODEL_TYPES = {"qwen3_moe": "Qwen3MoeForCausalLM"}


def _read_window(json: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": json.get("sliding_window") if json.get("use_sliding_window", False) else None}


def _write_window(config: Config) -> dict[str, Any]:
    window = config.sliding_window
    return {"use_sliding_window": False} if window is None else {"sliding_window": window, "use_sliding_window": True}


def _read_dense_layers(json: Mapping[str, Any]) -> dict[str, Any]:
    step, n_layers = json.get("decoder_sparse_step", 1), hf.check_layers(json, "num_hidden_layers")
    dense = {*(json.get("mlp_only_layers") or ()), *(layer for layer in range(n_layers) if (layer + 1) % step)}
    return {"dense_layers": tuple(sorted(dense))}


DENSE_LAYERS = hf.FieldGroup(
    _read_dense_layers, lambda config: {"mlp_only_layers": [*config.dense_layers], "decoder_sparse_step": 1}
)
FIELDS: hf.Fields = qwen3.ATTENTION_FIELDS | {
    "n_kv_heads": hf.Field("num_key_value_heads", 4),
    "expert_dim": hf.Field("moe_intermediate_size", 768),
    "n_experts": hf.Field("num_experts", lambda json: json.get("num_local_experts", 128), also=("num_local_experts",)),
    "n_experts_per_token": hf.Field("num_experts_per_tok", 8),
    "normalised": hf.Field("norm_topk_prob", False),
    "balancing": hf.Field("router_aux_loss_coef", 0.001, float),
    "sliding_window": hf.FieldGroup(_read_window, _write_window),
    "dense_layers": DENSE_LAYERS,
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)

GGUF = {
    "qwen3moe": gguf.GgufArchitecture(
        names=gguf.LLAMA | gguf.QK_NORM | gguf.EXPERTS,
        fields=gguf.WINDOW_FIELDS | gguf.EXPERT_COUNTS | gguf.EXPERT_DIM,
        fixed=gguf.SILU | {"normalised": True, "dense_layers": ()},
        needed=(*gguf.EXPERT_COUNTS, *gguf.EXPERT_DIM),
    ),
}  # fmt: skip
REFUSED = {"tensor": "MixtureOfExperts"}

"""Qwen3-MoE (Yang et al., 2025): Qwen3's layers with 128 small feed-forward networks; each token uses eight of them.

Many small experts instead of a few large ones are DeepSeekMoE's idea (Dai et al., 2024). There is no shared expert.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama, qwen3
from keifu.models.hf import config as hf
from keifu.models.mixture import mixtral


@dataclass(frozen=True)
class Config(llama.DecoderConfig):
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
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    sliding_window: int | None = None  # tokens that a token attends to, including itself; None: all
    attention_bias: bool = False


SIZES = {
    "qwen3-30b-a3b": Config(),
    "qwen3-235b-a22b": Config(dim=4096, hidden_dim=12_288, expert_dim=1536, n_layers=94, n_heads=64),
}
PAPER_PARAMETERS = {"qwen3-30b-a3b": 30.5e9, "qwen3-235b-a22b": 235e9}


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
PREFIX = "model."
MODEL_TYPES = {"qwen3_moe": "Qwen3MoeForCausalLM"}

FIELDS: hf.Fields = qwen3.FIELDS | {
    "n_kv_heads": hf.Field("num_key_value_heads", 4),
    "head_dim": hf.Field("head_dim", lambda json: json["hidden_size"] // json["num_attention_heads"]),
    "expert_dim": hf.Field("moe_intermediate_size", 768),
    "n_experts": hf.Field("num_experts", lambda json: json.get("num_local_experts", 128)),
    "n_experts_per_token": hf.Field("num_experts_per_tok", 8),
    "normalised": hf.Field("norm_topk_prob", False),
    "balancing": hf.Field("router_aux_loss_coef", 0.001, float),
    "sliding_window": hf.Field("sliding_window", None),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a Hugging Face config.json of model_type qwen3_moe."""
    fields = hf.read_fields(json, FIELDS)
    if not json.get("use_sliding_window", False):
        fields["sliding_window"] = None
    return Config(**fields, **hf.read_rope(json), dense_layers=read_dense_layers(json))


def read_dense_layers(json: dict[str, Any]) -> tuple[int, ...]:
    """Return the layers without experts."""
    step, n_layers = json.get("decoder_sparse_step", 1), hf.check_layers(json, "num_hidden_layers")
    dense = {*(json.get("mlp_only_layers") or ()), *(layer for layer in range(n_layers) if (layer + 1) % step)}
    return tuple(sorted(dense))


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers, vLLM and llama.cpp's converter read."""
    return {
        **hf.write(config, MODEL_TYPES, FIELDS),
        **hf.write_rope(config.rope_theta, config.rope_scaling),
        "num_local_experts": config.n_experts,
        "mlp_only_layers": [*config.dense_layers],
        "decoder_sparse_step": 1,
        "use_sliding_window": config.sliding_window is not None,
    }

"""DeepSeek-V3 (DeepSeek-AI, 2024): 256 small experts and a shared one, and attention through a latent of 512 numbers.

The router is balanced without a loss: the correction of an expert's score rises while the expert has too few tokens.
The cache has 576 numbers per token and layer; keys and values of 128 heads would have 32,768 (DeepSeek-V2, 2024).
Multi-token prediction, a further layer of the published training, is not implemented.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from keifu.layers.attention.latent import LatentAttention, LowRankLinear
from keifu.layers.attention.positions import RopeScaling, Rotary
from keifu.layers.linear import Linear
from keifu.layers.mixture import GroupedSigmoidRouter, MixtureOfExperts
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.models.mixture import qwen3_moe
from keifu.models.registration import gguf
from keifu.models.registration.arrangement import Arrangement


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """Sizes and settings of a model. The defaults are DeepSeek-V3.

    expert_dim: inner dimension of one expert. hidden_dim: inner dimension of the first `n_dense_layers` layers. A head
    has `head_dim` numbers without positions and `rope_dim` with positions.
    """

    vocab_size: int = 129_280
    context_length: int = 163_840
    dim: int = 7168
    hidden_dim: int = 18_432
    expert_dim: int = 2048
    n_layers: int = 61
    n_dense_layers: int = 3
    n_heads: int = 128
    head_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    q_rank: int | None = 1536  # None: one matrix computes queries
    kv_rank: int = 512
    n_experts: int = 256
    n_experts_per_token: int = 8
    n_shared_experts: int = 1
    n_groups: int = 8
    n_groups_per_token: int = 4
    normalised: bool = True  # whether the weights of a token's experts sum to expert_scale
    expert_scale: float = 2.5
    rope_scaling: RopeScaling | None = field(
        default=RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0), kw_only=True
    )
    rope_interleaved: bool = True


SIZES = {
    "deepseek-v3": Config(),
    "moonlight-16b-a3b": Config(
        vocab_size=163_840, context_length=8192, dim=2048, hidden_dim=11_264, expert_dim=1408, n_layers=27,
        n_dense_layers=1, n_heads=16, q_rank=None, n_experts=64, n_experts_per_token=6, n_shared_experts=2, n_groups=1,
        n_groups_per_token=1, expert_scale=2.446, norm_eps=1e-5, rope_theta=50_000.0, rope_scaling=None,
    ),
}  # fmt: skip


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    return llama.assemble(config, partial(_attention, config), partial(_feedforward, config))


def _attention(config: Config, layer: int) -> LatentAttention:
    queries = config.n_heads * (config.head_dim + config.rope_dim)
    if config.q_rank is None:
        q = Linear(config.dim, queries, bias=False)
    else:
        q = LowRankLinear(config.dim, config.q_rank, queries, config.attention_bias)
    scale = (config.head_dim + config.rope_dim) ** -0.5
    if config.rope_scaling:
        scale *= config.rope_scaling.all_dim_magnitude() ** 2
    return LatentAttention(
        config.dim, config.n_heads, q, config.kv_rank, config.head_dim, config.value_dim,
        Rotary(config.rope_dim, config.rope_theta, config.rope_scaling, config.rope_interleaved),
        config.attention_bias, config.dropout, scale,
    )  # fmt: skip


def _feedforward(config: Config, layer: int) -> nn.Module:
    if layer < config.n_dense_layers:
        return llama.gated(config, layer)
    router = GroupedSigmoidRouter(
        config.dim, config.n_experts, config.n_experts_per_token, config.n_groups, config.n_groups_per_token,
        config.normalised, config.expert_scale,
    )  # fmt: skip
    experts = [llama.gated_network(config, config.expert_dim) for _ in range(config.n_experts)]
    return MixtureOfExperts(router, experts, llama.gated_network(config, config.expert_dim * config.n_shared_experts))


_ATTENTION = {
    "q": "q_proj", "q.down": "q_a_proj", "q.norm": "q_a_layernorm", "q.up": "q_b_proj", "latent": "kv_a_proj_with_mqa",
    "latent_norm": "kv_a_layernorm", "kv": "kv_b_proj",
}  # fmt: skip
WEIGHT_NAMES = llama.WEIGHT_NAMES | qwen3_moe.EXPERT_NAMES | {
    **{f"blocks.*.attention.{ours}": f"model.layers.*.self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    "blocks.*.feedforward.router.correction": "model.layers.*.mlp.gate.e_score_correction_bias",
    "blocks.*.feedforward.shared.gate_up": "model.layers.*.mlp.shared_experts.[gate,up]_proj",
    "blocks.*.feedforward.shared.down": "model.layers.*.mlp.shared_experts.down_proj",
}  # fmt: skip
FULL_PRECISION = ("blocks.*.feedforward.router.**",)
NOT_WEIGHTS = ("model.layers.{n_layers}.**",)  # layers of multi-token prediction
MODEL_TYPES = {"deepseek_v3": "DeepseekV3ForCausalLM"}
# vLLM requires these fields; other values are not implemented
_ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
UNSUPPORTED: dict[str, Any] = {**_ROUTING, "moe_layer_freq": 1}

FIELDS: hf.Fields = {name: field for name, field in llama.BIAS_FIELDS.items() if name != "n_kv_heads"} | {
    "expert_dim": hf.Field("moe_intermediate_size", 2048),
    "n_heads": hf.Field("num_attention_heads", also=("num_key_value_heads",)),
    "n_dense_layers": hf.Field("first_k_dense_replace", 3),
    "head_dim": hf.Field("qk_nope_head_dim", 128),
    "rope_dim": hf.Field("qk_rope_head_dim", 64),
    "value_dim": hf.Field("v_head_dim", 128),
    "q_rank": hf.Field("q_lora_rank", 1536, if_none=hf.null),
    "kv_rank": hf.Field("kv_lora_rank", 512),
    "n_experts": hf.Field("n_routed_experts", 256),
    "n_experts_per_token": hf.Field("num_experts_per_tok", 8),
    "n_shared_experts": hf.Field("n_shared_experts", 1),
    "n_groups": hf.Field("n_group", 8),
    "n_groups_per_token": hf.Field("topk_group", 4),
    "normalised": hf.Field("norm_topk_prob", True),
    "expert_scale": hf.Field("routed_scaling_factor", 2.5, float),
    "rope_interleaved": hf.Field("rope_interleave", True),
    "routing": hf.constants(**_ROUTING, num_nextn_predict_layers=0),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)


def _read_heads(metadata: Mapping[str, Any]) -> dict[str, Any]:
    size = metadata["attention.key_length_mla"] - metadata["rope.dimension_count"]
    return {"head_dim": size, "value_dim": metadata["attention.value_length_mla"]}


def _write_heads(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of heads. llama.cpp caches latents: they are the keys and values of one head."""
    rank, rotated = values["kv_rank"], values["rope_dim"]
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": rank + rotated,
        "attention.value_length": rank,
        "attention.key_length_mla": values["head_dim"] + rotated,
        "attention.value_length_mla": values["value_dim"],
        "expert_gating_func": SIGMOID,
    }


def _absent(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of fields that a file may lack."""
    usual = {"n_groups": 1, "n_groups_per_token": 1, "normalised": False, "expert_scale": 1.0, "q_rank": None}
    return {name: values.get(name) or value for name, value in usual.items()}


def _limit(values: Mapping[str, Any]) -> str:
    """Return that llama.cpp recognises a model with one matrix of queries by its number of layers."""
    lite = values["n_layers"] in (26, 27)
    return "" if lite == (values["q_rank"] is None) else "q_rank=None with 26 or 27 layers, and with no other number"


def _arrangements(values: Mapping[str, Any]) -> dict[str, Arrangement]:
    """Return the matrices from latents to keys, transposed in each head, and to values as two tensors."""
    sizes = [values["head_dim"], values["value_dim"]]

    def split(kv: Tensor) -> list[Tensor]:
        to_keys, to_values = kv.unflatten(0, (-1, sum(sizes))).split(sizes, 1)
        return [to_keys.mT, to_values]

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensors[0].mT, tensors[1]], 1).flatten(0, 1)

    return {"blocks.*.attention.kv.weight": Arrangement(split, join)}


SIGMOID = 2  # llama.cpp's number for a router with sigmoid scores
_GGUF = {
    "q": "attn_q", "q.down": "attn_q_a", "q.norm": "attn_q_a_norm", "q.up": "attn_q_b", "latent": "attn_kv_a_mqa",
    "latent_norm": "attn_kv_a_norm", "kv": "attn_[k,v]_b",
}  # fmt: skip
GGUF = {
    "deepseek2": gguf.GgufArchitecture(  # llama.cpp takes norm_eps for the norms of latents too, instead of 1e-6
        names=gguf.LLAMA | gguf.EXPERTS | {
            **{f"blocks.*.attention.{ours}": f"blk.*.{theirs}" for ours, theirs in _GGUF.items()},
            "blocks.*.feedforward.router.correction": "blk.*.exp_probs_b.bias",
            "blocks.*.feedforward.shared.gate_up": "blk.*.ffn_[gate,up]_shexp",
            "blocks.*.feedforward.shared.down": "blk.*.ffn_down_shexp",
        },
        fields=gguf.EXPERT_COUNTS | gguf.EXPERT_DIM | {
            "attention.layer_norm_rms_epsilon": "norm_eps", "rope.freq_base": "rope_theta",
            "leading_dense_block_count": "n_dense_layers", "attention.kv_lora_rank": "kv_rank",
            "attention.q_lora_rank": "q_rank", "expert_shared_count": "n_shared_experts",
            "expert_group_count": "n_groups", "expert_group_used_count": "n_groups_per_token",
            "expert_weights_norm": "normalised", "expert_weights_scale": "expert_scale",
        },
        fixed=gguf.SILU | {"rope_interleaved": True},
        log_multiplier=0.1, mscale=None, derive=_absent, limit=_limit, read=_read_heads, write=_write_heads,
        arrangements=_arrangements,
        needed=(
            *gguf.EXPERT_COUNTS, *gguf.EXPERT_DIM, "expert_shared_count", "attention.kv_lora_rank",
            "rope.dimension_count", "attention.key_length_mla", "attention.value_length_mla",
        ),
    ),
}  # fmt: skip
REFUSED = {
    "native": "LatentAttention",
    "tensor": "LatentAttention",
}

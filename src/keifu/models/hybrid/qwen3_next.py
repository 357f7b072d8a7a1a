"""Qwen3-Next (Qwen Team, 2025): three layers of Gated DeltaNet (Yang et al., 2024) for each layer of attention.

A Gated DeltaNet stores one matrix for each head instead of keys and values of each token, so that the cost of decoding
does not depend on the number of tokens. Attention recalls exactly: it is gated, and rotates a quarter of each head by
position. The feed-forward networks are Qwen3-MoE's, smaller and more, with a shared expert. A further block with
attention may predict the token after the next one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from keifu.layers.attention.attention import GatedAttention
from keifu.layers.attention.positions import Rotary
from keifu.layers.mixture import GatedNetwork
from keifu.layers.normalisation import UnitOffsetRMSNorm
from keifu.layers.recurrent.gated_delta import GatedDeltaNet, GroupedInputs, Heads
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama, qwen3
from keifu.models.hf import config as hf
from keifu.models.mixture import mixtral, qwen3_moe
from keifu.models.registration import gguf
from keifu.models.registration.arrangement import Arrangement


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """Sizes and settings of a model. The defaults are Qwen3-Next-80B-A3B.

    expert_dim: inner dimension of one expert. shared_dim: inner dimension of the expert that all tokens use.
    hidden_dim: inner dimension of the layers in `dense_layers`, which have no experts. rope_dim: numbers of a head that
    are rotated by position.
    """

    vocab_size: int = 151_936
    context_length: int = 262_144
    dim: int = 2048
    hidden_dim: int = 5120
    expert_dim: int = 512
    shared_dim: int = 512
    n_layers: int = 48
    n_heads: int = 16
    n_kv_heads: int = 2
    head_dim: int = 256
    rope_dim: int = 64
    n_linear_key_heads: int = 16
    n_linear_value_heads: int = 32
    linear_key_dim: int = 128
    linear_value_dim: int = 128
    convolution: int = 4  # tokens of the short convolution
    global_layers: tuple[int, ...] | None = None  # layers with attention; None: every fourth, from layer 3 on
    n_experts: int | None = 512  # None: all layers are dense
    n_experts_per_token: int = 10
    normalised: bool = True  # whether the weights of a token's experts sum to 1
    dense_layers: tuple[int, ...] = ()
    balancing: float = 0.001  # coefficient of the balancing loss
    n_predictions: int = 0  # blocks that predict further tokens: 0 or 1
    rope_theta: float = field(default=1e7, kw_only=True)


SIZES = {"qwen3-next-80b-a3b": Config()}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's Qwen3."""
    return assemble(config, GroupedInputs)


def assemble(config: Any, inputs: Callable[..., Any]) -> DecoderLM:
    """Build a hybrid. inputs: builds the input projections of its Gated DeltaNets."""
    if config.n_predictions not in (0, 1):
        raise ValueError(f"n_predictions is {config.n_predictions}, and published files have at most one block.")
    full = *llama.global_layers(config, 4), config.n_layers  # the block of predictions has attention
    mixer, feedforward = partial(_mixer, config, inputs, full), partial(_feedforward, config)
    decoder = llama.assemble(config, mixer, feedforward, norm=UnitOffsetRMSNorm)
    return llama.with_predictions(decoder, mixer, feedforward, UnitOffsetRMSNorm)


def _mixer(config: Any, inputs: Callable[..., Any], full: tuple[int, ...], layer: int) -> nn.Module:
    if layer in full:
        norm = partial(UnitOffsetRMSNorm, config.head_dim, config.norm_eps)
        rotary = Rotary(config.rope_dim, config.rope_theta, config.rope_scaling)
        return llama.attention(config, config.attention_bias, GatedAttention, rotary=rotary, qk_norm=(norm(), norm()))
    return GatedDeltaNet(config.dim, heads_of(vars(config)), inputs, config.convolution, config.norm_eps)


def heads_of(values: Mapping[str, Any]) -> Heads:
    """Return the heads of the Gated DeltaNets of a Config with these values."""
    numbers = values["n_linear_key_heads"], values["n_linear_value_heads"]
    return Heads(*numbers, values["linear_key_dim"], values["linear_value_dim"])


def _feedforward(config: Any, layer: int) -> nn.Module:
    if layer in config.dense_layers or not config.n_experts:
        return llama.gated(config, layer)
    mixture = mixtral.mixture(config, config.expert_dim, config.normalised)
    mixture.shared = GatedNetwork(config.dim, llama.gated_network(config, config.shared_dim))
    return mixture


_MIXER = {"convolution": "conv1d", "log_rate": "A_log", "decay_bias": "dt_bias", "norm": "norm", "output": "out_proj"}
SHARED_NAMES = qwen3.WEIGHT_NAMES | qwen3_moe.EXPERT_NAMES | {
    **{f"blocks.*.attention.{ours}": f"model.layers.*.linear_attn.{theirs}" for ours, theirs in _MIXER.items()},
    "blocks.*.feedforward.shared.gate": "model.layers.*.mlp.shared_expert_gate",
    "blocks.*.feedforward.shared.network.gate_up": "model.layers.*.mlp.shared_expert.[gate,up]_proj",
    "blocks.*.feedforward.shared.network.down": "model.layers.*.mlp.shared_expert.down_proj",
}  # fmt: skip
_PREDICTION = {
    "embedding_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden", "projection": "fc", "norm": "norm"
}  # fmt: skip
SHARED_NAMES |= {f"predictions.*.{ours}": f"mtp.{theirs}" for ours, theirs in _PREDICTION.items()} | {
    f"predictions.*.{ours.replace('blocks.*', 'block')}": theirs.replace("model.layers", "mtp.layers")
    for ours, theirs in SHARED_NAMES.items()
    if ours.startswith("blocks.") and "linear_attn" not in theirs
}
WEIGHT_NAMES = SHARED_NAMES | {
    "blocks.*.attention.inputs.main": "model.layers.*.linear_attn.in_proj_qkvz",
    "blocks.*.attention.inputs.numbers": "model.layers.*.linear_attn.in_proj_ba",
}
PREDICTIONS = ("mtp.**",)
MODEL_TYPES = {"qwen3_next": "Qwen3NextForCausalLM"}


def _read_layers(json: Mapping[str, Any]) -> dict[str, Any]:
    every = json.get("full_attention_interval", 4)
    return {"global_layers": hf.read_global_layers({**json, "sliding_window_pattern": every}, 4, "linear_attention")}


SHARED_FIELDS: hf.Fields = qwen3.ATTENTION_FIELDS | {
    "head_dim": hf.Field("head_dim", 256),
    "rope": hf.partial_rope(256, 0.25),
    "global_layers": llama.published_layers(4, "linear_attention")._replace(read=_read_layers),
    "n_linear_key_heads": hf.Field("linear_num_key_heads", 16),
    "n_linear_value_heads": hf.Field("linear_num_value_heads", 32),
    "linear_key_dim": hf.Field("linear_key_head_dim", 128),
    "linear_value_dim": hf.Field("linear_value_head_dim", 128),
    "convolution": hf.Field("linear_conv_kernel_dim", 4),
    "n_predictions": hf.FieldGroup(
        lambda json: {"n_predictions": json.get("num_nextn_predict_layers") or 0},
        lambda config: {"num_nextn_predict_layers": config.n_predictions} if config.n_predictions else {},
    ),
}
EXPERT_FIELDS: hf.Fields = {
    "expert_dim": hf.Field("moe_intermediate_size", 512),
    "shared_dim": hf.Field("shared_expert_intermediate_size", 512),
    "n_experts": hf.Field("num_experts", 512),
    "n_experts_per_token": hf.Field("num_experts_per_tok", 10),
    "balancing": hf.Field("router_aux_loss_coef", 0.001, float),
}
FIELDS: hf.Fields = SHARED_FIELDS | EXPERT_FIELDS | {
    "hidden_dim": hf.Field("intermediate_size", 5632),
    "n_kv_heads": hf.Field("num_key_value_heads", 2),
    "normalised": hf.Field("norm_topk_prob", True),
    "dense_layers": qwen3_moe.DENSE_LAYERS,
}  # fmt: skip
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)


def read_linear(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size of a head of values, and the layers with attention, which are regular in a GGUF file."""
    every, n_layers = metadata.get("full_attention_interval", 4), metadata["block_count"]
    return {
        "linear_value_dim": metadata["ssm.inner_size"] // metadata["ssm.time_step_rank"],
        "global_layers": None if every == 4 else tuple(range(every - 1, n_layers, every)),
    }


def write_linear(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a GGUF file that `read_linear` reads."""
    layers, size = values["global_layers"], values["n_linear_value_heads"] * values["linear_value_dim"]
    return {"ssm.inner_size": size, "full_attention_interval": layers[0] + 1 if layers else 4}


def limit(values: Mapping[str, Any]) -> str:
    """Return what llama.cpp requires of the layers, if the model lacks it."""
    layers = values["global_layers"]
    regular = () if not layers else tuple(range(layers[0], values["n_layers"], layers[0] + 1))
    if layers is not None and (not layers or layers != regular):
        return "full attention in every n-th layer, from layer n - 1 on"
    return "" if values["linear_key_dim"] == values["linear_value_dim"] else "equal linear_key_dim and linear_value_dim"


def _joined(heads: Heads) -> Arrangement:
    """Return the arrangement of the main matrix: queries, keys and values of all heads, then gates, as two tensors."""
    group = heads.values // heads.keys
    sizes = [heads.key_dim, heads.key_dim, group * heads.value_dim, group * heads.value_dim]

    def split(main: Tensor) -> list[Tensor]:
        *qkv, gate = (part.flatten(0, 1) for part in main.unflatten(0, (heads.keys, -1)).split(sizes, 1))
        return [torch.cat(qkv), gate]

    def join(tensors: Sequence[Tensor]) -> Tensor:
        parts = [*tensors[0].split([heads.keys * size for size in sizes[:3]]), tensors[1]]
        return torch.cat([part.unflatten(0, (heads.keys, -1)) for part in parts], 1).flatten(0, 1)

    return Arrangement(split, join)


def _arrangements(values: Mapping[str, Any]) -> dict[str, Arrangement]:
    return shared_arrangements() | {"blocks.*.attention.inputs.main.weight": _joined(heads_of(values))}


def shared_arrangements() -> dict[str, Arrangement]:
    """Return the arrangements of a GGUF file: rates are stored as -exp(log_rate), and a gate of one number is a
    vector."""
    rates = Arrangement(lambda rates: [-rates.float().exp()], lambda tensors: (-tensors[0]).log())
    gate = Arrangement(lambda gate: [gate.flatten()], lambda tensors: tensors[0][None])
    return {"blocks.*.attention.log_rate": rates, "blocks.*.feedforward.shared.gate.weight": gate}


GGUF_NAMES = gguf.unit_offset(
    gguf.LLAMA | gguf.QK_NORM | {"blocks.*.feedforward_norm": "blk.*.post_attention_norm"}
) | {
    "blocks.*.attention.convolution": "blk.*.ssm_conv1d.flat",
    "blocks.*.attention.log_rate": "blk.*.ssm_a",
    "blocks.*.attention.decay_bias": "blk.*.ssm_dt.bias",
    "blocks.*.attention.norm": "blk.*.ssm_norm",
    "blocks.*.attention.output": "blk.*.ssm_out",
}
GGUF_EXPERTS = gguf.EXPERTS | {
    "blocks.*.feedforward.shared.gate": "blk.*.ffn_gate_inp_shexp",
    "blocks.*.feedforward.shared.network.gate_up": "blk.*.ffn_[gate,up]_shexp",
    "blocks.*.feedforward.shared.network.down": "blk.*.ffn_down_shexp",
}
GGUF_FIELDS = gguf.ROTARY_FIELDS | {
    "ssm.conv_kernel": "convolution", "ssm.state_size": "linear_key_dim", "ssm.group_count": "n_linear_key_heads",
    "ssm.time_step_rank": "n_linear_value_heads",
}  # fmt: skip
LINEAR = ("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank", "ssm.inner_size")
GGUF_EXPERT_FIELDS = gguf.EXPERT_COUNTS | gguf.EXPERT_DIM | {"expert_shared_feed_forward_length": "shared_dim"}
GGUF = {
    "qwen3next": gguf.GgufArchitecture(
        names=GGUF_NAMES | GGUF_EXPERTS | {
            "blocks.*.attention.inputs.main": "blk.*.attn_[qkv,gate]",
            "blocks.*.attention.inputs.numbers": "blk.*.ssm_ba",
        },
        fields=GGUF_FIELDS | GGUF_EXPERT_FIELDS,
        fixed=gguf.SILU | {"normalised": True, "dense_layers": (), "n_predictions": 0},
        limit=limit, read=read_linear, write=write_linear, arrangements=_arrangements,
        needed=(*GGUF_EXPERT_FIELDS, *LINEAR),
    ),
}  # fmt: skip
REFUSED = {"native": "GatedDeltaNet", "tensor": "GatedDeltaNet"}

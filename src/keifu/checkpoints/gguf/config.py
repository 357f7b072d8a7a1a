"""Conversion between GGUF metadata and model Configs, rotary scaling included.

An architecture is GGUF's name for the code that runs the model in llama.cpp. What that code fixes (an activation, for
example) is no field of the file: it is listed here, and a Config that differs cannot be written.

Of the rotary scalings, linear and yarn are metadata. llama3 is a tensor of divisors, one for each pair, whose formula
must be inferred: only a formula that gives the same divisors is accepted. dynamic has no form in GGUF.

Axes: pairs = half of a rotary head.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from keifu.checkpoints.registry import FAMILIES
from keifu.errors import UserError
from keifu.layers.attention.positions import RopeScaling

FREQS = "rope_freqs.weight"
Divisors = Float[Tensor, " pairs"]


def read_scaling(
    own: Mapping[str, Any], theta: float, context: int, freqs: Divisors | None, where: str
) -> RopeScaling | None:
    """Return the scaling that these metadata (without the architecture's name) and divisors mean."""
    factor = float(own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0)) or 1.0)
    scaling = own.get("rope.scaling.type", "linear")  # llama.cpp's own default, which a factor of 1 makes nothing of
    if scaling not in ("none", "linear", "yarn"):
        raise UserError(f"{where} has rope.scaling.type {scaling!r}, not linear or yarn, which keifu implements.")
    if freqs is not None:
        if scaling != "none" and factor != 1.0:
            raise UserError(f"{where} has both {FREQS} and a {scaling} scaling, which keifu does not implement.")
        return _llama3(freqs, theta, context, where)
    if scaling == "none" or factor == 1.0:
        return None
    original = int(own.get("rope.scaling.original_context_length", context))
    if scaling == "linear":
        return RopeScaling("linear", factor, context)
    size = float(own.get("rope.scaling.attn_factor", 1.0))
    attention_factor = None if size == 1.0 else size * (1 + 0.1 * math.log(factor))
    fast, slow = (float(own.get(f"rope.scaling.yarn_{key}", usual)) for key, usual in YARN.items())
    return RopeScaling("yarn", factor, original, beta_fast=fast, beta_slow=slow, attention_factor=attention_factor)


YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp has these built in for LLaMA and Qwen2


def write_scaling(scaling: RopeScaling | None, theta: float, head_dim: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata (without the architecture's name) and the tensors; what GGUF cannot say is a `UserError`."""
    if scaling is None:
        return {}, {}
    if scaling.kind == "llama3":
        return {}, {FREQS: divisors(scaling, theta, head_dim)}
    if scaling.kind not in ("linear", "yarn"):
        raise UserError(f"GGUF has no form for the rotary scaling {scaling.kind!r}; write a directory (hf) instead.")
    found: dict[str, Any] = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "linear":
        return found, {}
    if not scaling.truncate or {key: vars(scaling)[key] for key in YARN} != YARN:
        raise UserError(f"llama.cpp has yarn with {YARN} and truncate=True alone; write a directory (hf) instead.")
    size = scaling.magnitude() / (1 + 0.1 * math.log(scaling.factor))
    found |= {"rope.scaling.original_context_length": scaling.original_context_length}
    return found | ({} if math.isclose(size, 1.0) else {"rope.scaling.attn_factor": size}), {}


def divisors(scaling: RopeScaling, theta: float, head_dim: int) -> Divisors:
    """Return the divisor of each pair's frequency."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (frequencies / scaling.apply(frequencies, theta)).float()


def _llama3(freqs: Divisors, theta: float, context: int, where: str) -> RopeScaling | None:
    if bool((freqs == 1).all()):
        return None
    for scaling in _candidates(freqs, theta, context):
        if torch.allclose(divisors(scaling, theta, 2 * len(freqs)), freqs, rtol=1e-5, atol=0):
            return scaling
    raise UserError(f"{where} has divisors in {FREQS} that fit no formula which keifu knows.")


def _candidates(freqs: Divisors, theta: float, context: int) -> Iterator[RopeScaling]:
    """Yield the published settings first, then those that the divisors themselves determine.

    The share of a frequency f that is kept is a line, (length · f / 2π - low) / (high - low), cut at 0 and 1. A line
    fixes the three settings but for a common factor: low is taken as 1, as published, if that makes the others round.
    """
    factor = float(freqs.max())
    make = partial(RopeScaling, "llama3", factor)
    for length in (8192, context):
        yield make(length, low_freq_factor=1.0, high_freq_factor=4.0)
    frequencies = theta ** -(torch.arange(len(freqs), dtype=torch.float64) / len(freqs))
    kept = ((1 / freqs.double() - 1 / factor) / (1 - 1 / factor)).clamp(0, 1)
    if not 0 < int((kept > 0).sum()) < len(kept):
        return
    slope, offset = _line(frequencies.tolist(), [round(value, 7) for value in kept.tolist()])
    length = max(1, round(2 * math.pi * slope / -offset))
    yield make(length, low_freq_factor=1.0, high_freq_factor=round(1 - 1 / offset, 3))
    span = length / (2 * math.pi * slope)
    yield make(length, low_freq_factor=-offset * span, high_freq_factor=(1 - offset) * span)


def _line(frequencies: list[float], kept: list[float]) -> tuple[float, float]:
    """Return slope and offset of a line through all shares between 0 and 1 that is beyond 0 and 1 at the others."""
    between = [n for n, share in enumerate(kept) if 0 < share < 1]
    last = max(n for n, share in enumerate(kept) if share > 0)
    if len(between) > 1:
        slope = (kept[between[0]] - kept[last]) / (frequencies[between[0]] - frequencies[last])
    else:
        slope = kept[last] / (frequencies[last] - frequencies[last + 1])
        if between and last:
            slope = max(slope, (1 - kept[last]) / (frequencies[last - 1] - frequencies[last]))
    return slope, kept[last] - slope * frequencies[last]


SIZES = {  # GGUF's words, after the architecture's name, and ours
    "context_length": "context_length",
    "embedding_length": "dim",
    "feed_forward_length": "hidden_dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
}
REFUSED = (
    "expert_count", "expert_shared_count", "expert_group_count", "expert_weights_scale", "attention.clamp_kqv",
    "attention.scale", "logit_scale", "residual_scale", "embedding_scale",
)  # fmt: skip


@dataclass(frozen=True)
class GgufArchitecture:
    """`fields` are GGUF's words and ours beyond `SIZES`; `fixed` is what llama.cpp takes for granted.

    `optional` are switches of the Config, each with a tensor that is there exactly when it is on. `interleaved`: q and
    k are stored with neighbouring rotary pairs. `windows`: it has sliding windows,
    which llama.cpp's other programs ignore. `derive`: what it takes for granted that depends on the sizes. `needed`:
    those of the `fields` that a file must have.
    """

    model_type: str
    names: Mapping[str, str]
    fields: dict[str, str]
    fixed: Mapping[str, Any]
    optional: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    windows: bool = False
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda sizes: {}
    needed: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        """The Config of the models that it runs."""
        return FAMILIES[self.model_type].module.Config

    @property
    def rotary(self) -> bool:
        """Whether it has rotary positions."""
        return "rope.freq_base" in self.fields


_BLOCKS = {
    "embedding": "token_embd",
    "blocks.*.attention_norm": "blk.*.attn_norm",
    "blocks.*.attention.out": "blk.*.attn_output",
    "blocks.*.feedforward_norm": "blk.*.ffn_norm",
    "blocks.*.feedforward.down": "blk.*.ffn_down",
    "norm": "output_norm",
    "head": "output",
}
_GPT2 = {
    "positions": "position_embd",
    "blocks.*.attention.qkv": "blk.*.attn_qkv",
    "blocks.*.feedforward.up": "blk.*.ffn_up",
}
_LLAMA = {"blocks.*.attention.qkv": "blk.*.attn_[q,k,v]", "blocks.*.feedforward.gate_up": "blk.*.ffn_[gate,up]"}
_ROTARY = {
    "attention.head_count_kv": "n_kv_heads",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
_NO_WINDOW = {key: ours for key, ours in _ROTARY.items() if ours != "sliding_window"}
_BIASES = {
    "qkv_bias": "blk.0.attn_q.bias",
    "out_bias": "blk.0.attn_output.bias",
    "feedforward_bias": "blk.0.ffn_down.bias",
}
_QK_NORM = {f"blocks.*.attention.{part}_norm": f"blk.*.attn_{part}_norm" for part in "qk"}
_OLMO2 = _QK_NORM | {
    "blocks.*.attention_norm": "blk.*.post_attention_norm",
    "blocks.*.feedforward_norm": "blk.*.post_ffw_norm",
}
_EXPERTS = {
    "blocks.*.feedforward.router.gate": "blk.*.ffn_gate_inp",
    "blocks.*.feedforward.experts.*.gate_up": "blk.*.ffn_[gate,up]_exps.*",
    "blocks.*.feedforward.experts.*.down": "blk.*.ffn_down_exps.*",
}
_COUNTS = {"expert_count": "n_experts", "expert_used_count": "n_experts_per_token"}
_EXPERT_DIM = {"expert_feed_forward_length": "expert_dim"}
_GEMMA3 = {ours: f"{theirs}+1" for ours, theirs in (_BLOCKS | _QK_NORM).items() if ours.endswith("norm")} | {
    "blocks.*.post_attention_norm": "blk.*.post_attention_norm+1",
    "blocks.*.post_feedforward_norm": "blk.*.post_ffw_norm+1",
}


def _gemma3_scale(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scale of attention: llama.cpp knows the 27B model by its 62 layers; in it alone the scale is not that
    of the heads."""
    return {"attention_scale": (sizes["dim"] / sizes["n_heads"]) ** -0.5 if sizes["n_layers"] == 62 else None}


def _all_keys(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Count the heads of keys: llama.cpp normalises the keys of an OLMoE as it does the queries: there are as many
    heads of both."""
    return {} if sizes.get("n_kv_heads") is None else {"n_kv_heads": sizes["n_heads"]}


_PLAIN = {"activation": "silu", "first_window_layer": 0, "dropout": 0.0}
ARCHITECTURES = {  # in the order in which one is sought for a Config
    "gpt2": GgufArchitecture(
        "gpt2", _BLOCKS | _GPT2, {"attention.layer_norm_epsilon": "norm_eps"},
        {"activation": "gelu_tanh", "bias": True, "dropout": 0.0},
    ),
    "qwen2": GgufArchitecture(
        "qwen2", _BLOCKS | _LLAMA, _ROTARY, _PLAIN | {"qkv_bias": True, "out_bias": False, "feedforward_bias": False}
    ),
    "qwen3": GgufArchitecture("qwen3", _BLOCKS | _LLAMA | _QK_NORM, _ROTARY, _PLAIN | {"attention_bias": False}),
    "olmo2": GgufArchitecture(
        "olmo2", _BLOCKS | _LLAMA | _OLMO2, _NO_WINDOW,
        {"activation": "silu", "attention_bias": False, "dropout": 0.0},
    ),
    "gemma3": GgufArchitecture(
        "gemma3_text", _BLOCKS | _LLAMA | _GEMMA3, _ROTARY,
        {
            "activation": "gelu_tanh", "local_rope_theta": 10_000.0, "local_rope_scaling": None, "global_layers": None,
            "attention_bias": False, "dropout": 0.0,
        },
        windows=True, derive=_gemma3_scale,
    ),
    "llama": GgufArchitecture("llama", _BLOCKS | _LLAMA, _ROTARY, _PLAIN, _BIASES, interleaved=True),
    "qwen3moe": GgufArchitecture(
        "qwen3_moe", _BLOCKS | _LLAMA | _QK_NORM | _EXPERTS, _ROTARY | _COUNTS | _EXPERT_DIM,
        {"activation": "silu", "attention_bias": False, "normalised": True, "dense_layers": (), "dropout": 0.0},
        needed=(*_COUNTS, *_EXPERT_DIM),
    ),
    "olmoe": GgufArchitecture(
        "olmoe", _BLOCKS | _LLAMA | _QK_NORM | _EXPERTS, _NO_WINDOW | _COUNTS,
        {"activation": "silu", "attention_bias": False, "normalised": False, "tied": False, "dropout": 0.0},
        derive=_all_keys, needed=(*_COUNTS,),
    ),
}  # fmt: skip
WITH_EXPERTS = {  # what a name in the files means where there are experts
    "llama": GgufArchitecture(
        "mixtral", _BLOCKS | _LLAMA | _EXPERTS, _ROTARY | _COUNTS, {"activation": "silu", "dropout": 0.0},
        interleaved=True, needed=(*_COUNTS,),
    ),
}  # fmt: skip


def read_config(
    fields: Mapping[str, Any], tensors: Mapping[str, Any], freqs: Tensor | None, where: str
) -> tuple[GgufArchitecture, Any]:
    """Return the architecture and the Config of a file's metadata.

    tensors: names of all tensors, and the shape of each. freqs: the tensor rope_freqs.weight, where there is one.
    """
    name = fields.get("general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{where} has the architecture {name!r}, which keifu does not read. It reads: {known}.")
    own = {key.removeprefix(f"{name}."): _same_everywhere(key, value, where) for key, value in fields.items()}
    architecture = (WITH_EXPERTS if own.get("expert_count") and name in WITH_EXPERTS else ARCHITECTURES)[name]
    refused = [f"{name}.{key}" for key in REFUSED if own.get(key) and key not in architecture.fields]
    if refused:
        raise UserError(f"{where} sets {', '.join(refused)}, which keifu does not implement.")
    missing = [f"{name}.{key}" for key in (*SIZES, *architecture.needed) if key not in own]
    if missing or "token_embd.weight" not in tensors:
        lacking = missing or ["the tensor token_embd.weight"]
        raise UserError(f"{where} lacks {', '.join(lacking)}, so the model's size is not known.")
    values = {ours: own[key] for key, ours in (SIZES | architecture.fields).items() if key in own}
    values |= dict(architecture.fixed) | {switch: tensor in tensors for switch, tensor in architecture.optional.items()}
    values |= {"vocab_size": tensors["token_embd.weight"][0], "tied": "output.weight" not in tensors}
    values |= architecture.derive(values)
    if architecture.rotary:
        values |= _read_rotary(own, values, freqs, where)
        values |= _head_size(values, vars(architecture.config), where)
    known = architecture.config.__dataclass_fields__
    return architecture, architecture.config(**{key: value for key, value in values.items() if key in known})


def _head_size(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the `head_dim` of a Config, of which some always name it and some have none: theirs is dim / n_heads."""
    usual = values["dim"] // values["n_heads"]
    if "head_dim" not in defaults and values["head_dim"] is not None:
        raise UserError(f"{where} has heads of {values['head_dim']}; keifu implements {usual} (dim / n_heads).")
    if values["head_dim"] is None and defaults.get("head_dim") is not None:
        return {"head_dim": usual}
    return {}


def _same_everywhere(key: str, value: Any, where: str) -> Any:
    """Return the one value of a setting, which may be given layer by layer, without the noise of float32."""
    if isinstance(value, list) and value and key.partition(".")[0] in ARCHITECTURES:
        if len(set(value)) > 1:
            raise UserError(f"{where} has another {key} in each layer ({value[:4]}), which keifu does not implement.")
        value = value[0]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_rotary(own: Mapping[str, Any], values: Mapping[str, Any], freqs: Tensor | None, where: str) -> dict[str, Any]:
    usual = values["dim"] // values["n_heads"]
    size = own.get("attention.key_length", usual)
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, size) != size:
            raise UserError(f"{where} has {key} {own[key]} with heads of {size}; keifu turns whole heads.")
    theta = float(values.get("rope_theta", 10_000.0))
    scaling = read_scaling(own, theta, values["context_length"], freqs, where)
    return {"head_dim": None if size == usual else size, "rope_theta": theta, "rope_scaling": scaling}


def architecture_for(config: Any) -> tuple[str, GgufArchitecture]:
    """Return the architecture of llama.cpp that runs a model of this Config; none is a `UserError` that names the
    settings."""
    values, reasons = vars(config), []
    for name, architecture in (*ARCHITECTURES.items(), *WITH_EXPERTS.items()):
        if not isinstance(config, architecture.config):
            continue
        needed = {**architecture.fixed, **architecture.derive(values)}
        wrong = [key for key, fine in needed.items() if key != "dropout" and values[key] != fine]
        if not wrong:
            return name, architecture
        reasons.append(f"{name} needs " + ", ".join(f"{key}={needed[key]!r}" for key in wrong))
    if not reasons:
        raise UserError(f"keifu writes no GGUF of {type(config).__module__}; it can be written as a directory (hf).")
    raise UserError(f"llama.cpp runs no such model: {'; '.join(reasons)}. Write it as a directory (hf) instead.")


def write_config(name: str, architecture: GgufArchitecture, config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata without the tokenizer, and the tensors that are settings.

    A model with a sliding window that llama.cpp's program ignores is given the window as its context: within it the two
    agree.
    """
    values, tensors = vars(config), {}
    found = {key: values[ours] for key, ours in (SIZES | architecture.fields).items() if values[ours] is not None}
    found |= {"vocab_size": config.vocab_size}
    if architecture.rotary:
        size = head_dim(config)
        found |= {"attention.head_count_kv": config.n_kv_heads or config.n_heads, "rope.dimension_count": size}
        found |= {"attention.key_length": size, "attention.value_length": size}
        if not architecture.windows:
            found["context_length"] = min(config.context_length, values.get("sliding_window") or config.context_length)
        more, tensors = write_scaling(config.rope_scaling, config.rope_theta, size)
        found |= more
    return {f"{name}.{key}": value for key, value in found.items()}, tensors


def head_dim(config: Any) -> int:
    """Return the size of a rotary head."""
    return vars(config).get("head_dim") or config.dim // config.n_heads


def rotary_head_dim(architecture: GgufArchitecture, config: Any) -> int | None:
    """Return the size of the heads whose rows GGUF stores in another order than we; None if it does not."""
    return head_dim(config) if architecture.interleaved else None

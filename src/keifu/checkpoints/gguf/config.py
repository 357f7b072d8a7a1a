"""Conversion between GGUF metadata and model Configs, including rotary scaling.

The row of each model says which architectures of llama.cpp run it, and how their fields and tensors correspond to its
Config (`keifu/models/registration/gguf.py`).

Rotary scaling: linear and yarn are metadata. llama3 is a tensor of divisors, one for each pair, and its formula has to
be inferred: a formula is accepted only if it gives the same divisors. longrope is two such tensors: llama.cpp takes the
long one if the context that it runs with is longer than the trained one, keifu if the sequence is. GGUF cannot
represent dynamic scaling.

Axes: pairs = half of a rotary head.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from keifu.checkpoints.registry import INDEX, model_name
from keifu.errors import UserError
from keifu.layers.attention.positions import RopeScaling
from keifu.models.registration import row
from keifu.models.registration.gguf import GgufArchitecture

FREQS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
DIVISORS = (FREQS, SHORT, LONG)  # tensors that are settings
Divisors = Float[Tensor, " pairs"]


def read_scaling(
    metadata: Mapping[str, Any], theta: float, context: int, tensors: Mapping[str, Divisors], where: str,
    architecture: GgufArchitecture,
) -> RopeScaling | None:  # fmt: skip
    """Return the rotary scaling of a file.

    metadata: its fields without the architecture's prefix. tensors: those of `DIVISORS` that the file has. where: the
    file, for errors.
    """
    if SHORT in tensors or LONG in tensors:
        return _longrope(metadata, context, tensors, where)
    factor = float(metadata.get("rope.scaling.factor", metadata.get("rope.scale_linear", 1.0)) or 1.0)
    scaling = metadata.get("rope.scaling.type", "linear")  # llama.cpp's default; a factor of 1 has no effect
    if scaling not in ("none", "linear", "yarn"):
        raise UserError(f"{where} has rope.scaling.type {scaling!r}, not linear or yarn, which keifu implements.")
    if FREQS in tensors:
        if scaling != "none" and factor != 1.0:
            raise UserError(f"{where} has both {FREQS} and a {scaling} scaling, which keifu does not implement.")
        return _llama3(tensors[FREQS], theta, context, where)
    if scaling == "none" or factor == 1.0:
        return None
    original = int(metadata.get("rope.scaling.original_context_length", context))
    if scaling == "linear":
        return RopeScaling("linear", factor, context)
    size = float(metadata.get("rope.scaling.attn_factor", 1.0))
    attention_factor = None if size == 1.0 else size * (1 + 0.1 * math.log(factor))
    fast, slow = (float(metadata.get(f"rope.scaling.yarn_{key}", default)) for key, default in YARN.items())
    growth = metadata.get(LOG_MULTIPLIER)
    if growth and attention_factor is not None:
        raise UserError(f"{where} has both {LOG_MULTIPLIER} and rope.scaling.attn_factor; keifu implements one.")
    scaling = RopeScaling("yarn", factor, original, beta_fast=fast, beta_slow=slow, attention_factor=attention_factor)
    scaling = replace(scaling, truncate=architecture.truncate)
    if not growth:
        if architecture.mscale is None:
            raise UserError(f"{where} lacks {LOG_MULTIPLIER}, which this model's yarn needs.")
        return scaling
    growth = _rounded(growth / (architecture.log_multiplier or 1.0))
    return replace(scaling, mscale=architecture.mscale or growth, mscale_all_dim=growth)


LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"  # growth of the magnitude that yarn divides by
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp's constants for LLaMA and Qwen2


def write_scaling(
    scaling: RopeScaling | None, theta: float, head_dim: int, architecture: GgufArchitecture
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata, without the architecture's prefix, and the tensors of a scaling. Raises UserError if GGUF
    cannot represent it."""
    fields: dict[str, Any]
    if scaling is None:
        return {}, {}
    if scaling.kind == "llama3":
        return {}, {FREQS: divisors(scaling, theta, head_dim)}
    if scaling.kind == "longrope":
        trained, size = scaling.original_context_length, scaling.magnitude()
        pairs = {SHORT: scaling.short_divisors, LONG: scaling.long_divisors}
        fields = {"rope.scaling.original_context_length": trained, "rope.scaling.attn_factor": size}
        return fields, {name: torch.tensor(divisors) for name, divisors in pairs.items()}
    if scaling.kind not in ("linear", "yarn"):
        raise UserError(f"GGUF has no form for the rotary scaling {scaling.kind!r}; write a directory (hf) instead.")
    fields = {"rope.scaling.type": scaling.kind, "rope.scaling.factor": scaling.factor}
    if scaling.kind == "linear":
        return fields, {}
    truncate, growth = architecture.truncate, scaling.mscale_all_dim
    if scaling.truncate != truncate or {key: vars(scaling)[key] for key in YARN} != YARN:
        only = f"{YARN} and truncate={truncate}"
        raise UserError(f"llama.cpp has yarn with {only} alone for this model; write a directory (hf) instead.")
    fields |= {"rope.scaling.original_context_length": scaling.original_context_length}
    expected = architecture.mscale or growth
    if architecture.log_multiplier and growth and scaling.mscale == expected and scaling.attention_factor is None:
        return fields | {LOG_MULTIPLIER: architecture.log_multiplier * growth}, {}
    if architecture.mscale is None:
        settings = f"mscale={scaling.mscale}, mscale_all_dim={growth} and attention_factor={scaling.attention_factor}"
        raise UserError(
            f"llama.cpp runs this model with equal mscale and mscale_all_dim in yarn, and it has {settings}; write a "
            "directory (hf) instead."
        )
    size = scaling.magnitude() / (1 + 0.1 * math.log(scaling.factor))
    return fields | ({} if math.isclose(size, 1.0) else {"rope.scaling.attn_factor": size}), {}


def divisors(scaling: RopeScaling, theta: float, head_dim: int) -> Divisors:
    """Return the divisor of each pair's frequency."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (frequencies / scaling.apply(frequencies, theta)).float()


def _longrope(metadata: Mapping[str, Any], context: int, tensors: Mapping[str, Divisors], where: str) -> RopeScaling:
    if SHORT not in tensors or LONG not in tensors:
        raise UserError(f"{where} has only one of {SHORT} and {LONG}, which belong together.")
    trained = int(metadata.get("rope.scaling.original_context_length", context))
    short, long = (tuple(_rounded(value) for value in tensors[name].tolist()) for name in (SHORT, LONG))
    scaling = RopeScaling("longrope", context / trained, trained, short_divisors=short, long_divisors=long)
    size = float(metadata.get("rope.scaling.attn_factor", 1.0))
    return scaling if math.isclose(scaling.magnitude(), size, rel_tol=1e-6) else replace(scaling, attention_factor=size)


def _llama3(freqs: Divisors, theta: float, context: int, where: str) -> RopeScaling | None:
    if bool((freqs == 1).all()):
        return None
    for scaling in _candidates(freqs, theta, context):
        if torch.allclose(divisors(scaling, theta, 2 * len(freqs)), freqs, rtol=1e-5, atol=0):
            return scaling
    raise UserError(f"{where} has divisors in {FREQS} that fit no formula which keifu knows.")


def _candidates(freqs: Divisors, theta: float, context: int) -> Iterator[RopeScaling]:
    """Yield possible llama3 settings: the published ones first, then those computed from the divisors.

    The kept share of a frequency f is a line, (length · f / 2π - low) / (high - low), limited to 0 and 1. A line
    determines length, low and high up to a common factor. The first candidate has low = 1, as in published models.
    """
    factor = float(freqs.max())
    make = partial(RopeScaling, "llama3", factor)
    for length in (8192, context):
        yield make(length, low_freq_factor=1.0, high_freq_factor=4.0)
    frequencies = theta ** -(torch.arange(len(freqs), dtype=torch.float64) / len(freqs))
    kept_shares = ((1 / freqs.double() - 1 / factor) / (1 - 1 / factor)).clamp(0, 1)
    if not 0 < int((kept_shares > 0).sum()) < len(kept_shares):
        return
    slope, offset = _line(frequencies.tolist(), [round(value, 7) for value in kept_shares.tolist()])
    length = max(1, round(2 * math.pi * slope / -offset))
    yield make(length, low_freq_factor=1.0, high_freq_factor=round(1 - 1 / offset, 3))
    span = length / (2 * math.pi * slope)
    yield make(length, low_freq_factor=-offset * span, high_freq_factor=(1 - offset) * span)


def _line(frequencies: list[float], kept_shares: list[float]) -> tuple[float, float]:
    """Return slope and offset of a line that passes through all shares between 0 and 1 and is beyond 0 and 1 at the
    others."""
    between = [n for n, share in enumerate(kept_shares) if 0 < share < 1]
    last = max(n for n, share in enumerate(kept_shares) if share > 0)
    if len(between) > 1:
        slope = (kept_shares[between[0]] - kept_shares[last]) / (frequencies[between[0]] - frequencies[last])
    else:
        slope = kept_shares[last] / (frequencies[last] - frequencies[last + 1])
        if between and last:
            slope = max(slope, (1 - kept_shares[last]) / (frequencies[last - 1] - frequencies[last]))
    return slope, kept_shares[last] - slope * frequencies[last]


SIZES = {  # GGUF's field, without the architecture's prefix → the Config's field
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


def _architectures() -> dict[str, tuple[str, ...]]:
    """Return the models of each architecture of llama.cpp, without importing their files."""
    by_name: dict[str, tuple[str, ...]] = {}
    for model, names in INDEX.items():
        for name in names.gguf:
            by_name[name] = (*by_name.get(name, ()), model)
    return by_name


ARCHITECTURES: Mapping[str, tuple[str, ...]] = _architectures()


def _architecture(name: str, fields: Mapping[str, Any]) -> tuple[GgufArchitecture, Any]:
    """Return the architecture of a file, and the class of its Config. Files of one architecture may be of two models,
    of which one has experts."""
    rows = [row(model) for model in ARCHITECTURES[name]]
    with_experts = bool(fields.get(f"{name}.expert_count"))
    rows = [one for one in rows if ("expert_count" in one.gguf[name].fields) == with_experts] or rows
    return rows[0].gguf[name], rows[0].config


def read_config(
    fields: Mapping[str, Any], tensors: Mapping[str, Any], divisors: Mapping[str, Tensor], where: str
) -> tuple[GgufArchitecture, Any]:
    """Return the architecture and the Config of a file's metadata.

    tensors: the shape of each tensor by name. divisors: the tensors of `DIVISORS` in the file. where: the file, for
    errors.
    """
    name = fields.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known_names = ", ".join(sorted(ARCHITECTURES))
        raise UserError(f"{where} has the architecture {name!r}, which keifu does not read. It reads: {known_names}.")
    architecture, config_class = _architecture(name, fields)
    layers: dict[str, Any] = {}
    if architecture.attention_layers:
        heads = _layer_heads(name, fields, where)
        layers = {architecture.attention_layers: tuple(layer for layer, count in enumerate(heads) if count)}
        fields = {**fields, f"{name}.attention.head_count_kv": [count for count in heads if count]}
    metadata = {key.removeprefix(f"{name}."): _same_everywhere(key, value, where) for key, value in fields.items()}
    refused = [
        f"{name}.{key}"
        for key in REFUSED
        if metadata.get(key) and key not in (*architecture.fields, *architecture.needed)
    ]
    if refused:
        raise UserError(f"{where} sets {', '.join(refused)}, which keifu does not implement.")
    unused = ("feed_forward_length",) if architecture.only_experts else ()
    needed_keys = [key for key in (*SIZES, *architecture.needed) if key not in unused]
    missing_keys = [f"{name}.{key}" for key in needed_keys if key not in metadata]
    if missing_keys or "token_embd.weight" not in tensors:
        lacking = missing_keys or ["the tensor token_embd.weight"]
        raise UserError(f"{where} lacks {', '.join(lacking)}, so the model's size is not known.")
    values = {ours: metadata[key] for key, ours in {**SIZES, **architecture.fields}.items() if key in metadata}
    values |= dict(architecture.fixed) | {switch: tensor in tensors for switch, tensor in architecture.optional.items()}
    values |= {"vocab_size": tensors["token_embd.weight"][0], "tied": "output.weight" not in tensors}
    values |= architecture.derive(values) | layers
    if architecture.rotary:
        defaults = {name: field.default for name, field in config_class.__dataclass_fields__.items()}
        values |= _rotary(metadata, values, divisors, defaults, where, architecture)
        values |= _head_size(values, defaults, where)
    values |= architecture.read(metadata)
    known_names = config_class.__dataclass_fields__
    return architecture, config_class(**{key: value for key, value in values.items() if key in known_names})


def _layer_heads(name: str, fields: Mapping[str, Any], where: str) -> list[int]:
    """Return the number of key and value heads of each layer: 0 in layers without attention."""
    key = f"{name}.attention.head_count_kv"
    heads = fields.get(key)
    if not isinstance(heads, list) or not any(heads) or len(heads) != fields.get(f"{name}.block_count"):
        raise UserError(f"{where} has {heads!r} for {key}; a {name} model needs a number for each layer.")
    return heads


def _head_size(values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the `head_dim` of a Config, or nothing for a Config without this field, whose heads have dim / n_heads
    numbers."""
    common_size = values["dim"] // values["n_heads"]
    if "head_dim" not in defaults and values["head_dim"] is not None:
        raise UserError(f"{where} has heads of {values['head_dim']}; keifu implements {common_size} (dim / n_heads).")
    if values["head_dim"] is None and defaults.get("head_dim") is not None:
        return {"head_dim": common_size}
    return {}


def _same_everywhere(key: str, value: Any, where: str) -> Any:
    """Return the value of a setting, rounded to float32's digits. A list with a value for each layer must have equal
    values."""
    axes = key.endswith("rope.dimension_sections")  # of pictures: texts have the same position on each
    if isinstance(value, list) and value and not axes and key.partition(".")[0] in ARCHITECTURES:
        if len(set(value)) > 1:
            raise UserError(f"{where} has another {key} in each layer ({value[:4]}), which keifu does not implement.")
        value = value[0]
    return _rounded(value) if isinstance(value, float) else value


def _rounded(value: float) -> float:
    """Return a number with float32's digits."""
    return float(str(np.float32(value)))


def _rotary(
    metadata: Mapping[str, Any], values: Mapping[str, Any], divisors: Mapping[str, Tensor], defaults: Mapping[str, Any],
    where: str, architecture: GgufArchitecture,
) -> dict[str, Any]:  # fmt: skip
    """Return the rotary fields of a Config.

    defaults: those of the Config; one with `rope_dim` may rotate a part of a head, and the heads of values may have
    another size in one with `value_dim`.
    """
    partial = "rope_dim" in defaults
    common_size = values["dim"] // values["n_heads"]
    size = metadata.get("attention.key_length", common_size)
    rotated = metadata.get("rope.dimension_count", size)
    if metadata.get("attention.value_length", size) != size and "value_dim" not in defaults:
        length = metadata["attention.value_length"]
        raise UserError(f"{where} has attention.value_length {length} with heads of {size}; keifu has equal lengths.")
    if not (0 < rotated <= size if partial else rotated == size):
        raise UserError(f"{where} has rope.dimension_count {rotated} with heads of {size}; keifu turns whole heads.")
    theta = float(values.get("rope_theta", 10_000.0))
    scaling = read_scaling(metadata, theta, values["context_length"], divisors, where, architecture)
    fields = {"head_dim": None if size == common_size else size, "rope_theta": theta, "rope_scaling": scaling}
    turns_whole_heads = rotated == size and defaults.get("rope_dim") is None
    return fields | ({"rope_dim": None if turns_whole_heads else rotated} if partial else {})


def architecture_for(config: Any) -> tuple[str, GgufArchitecture]:
    """Return the llama.cpp architecture that runs a model of this Config, and its name. Raises UserError that names the
    unsupported settings."""
    values, reasons, name = vars(config), [], model_name(config)
    model = row(name) if name in INDEX else None
    for name, architecture in model.gguf.items() if model else ():
        required = {**architecture.fixed, **architecture.derive(values)}
        wrong = [key for key, value in required.items() if key != "dropout" and values[key] != value]
        needs = [f"{key}={required[key]!r}" for key in wrong] + [
            limit for limit in [architecture.limit(values)] if limit
        ]
        if not needs:
            return name, architecture
        reasons.append(f"{name} needs {', '.join(needs)}")
    if not reasons:
        reason = f", because {model.refused['gguf']}" if model and "gguf" in model.refused else ""
        raise UserError(
            f"keifu writes no GGUF of {type(config).__module__}{reason}; it can be written as a directory (hf)."
        )
    raise UserError(f"llama.cpp runs no such model: {'; '.join(reasons)}. Write it as a directory (hf) instead.")


def write_config(name: str, architecture: GgufArchitecture, config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata without the tokenizer, and the tensors that are settings.

    If llama.cpp ignores the model's sliding window, the context length is reduced to the window: within it the results
    agree.
    """
    values, tensors = vars(config), {}
    fields = {key: values[ours] for key, ours in {**SIZES, **architecture.fields}.items() if values[ours] is not None}
    fields |= {"vocab_size": config.vocab_size}
    if architecture.rotary:
        size = head_dim(config)
        rotated = values.get("rope_dim") or size
        kv_heads = values.get("n_kv_heads") or config.n_heads
        fields |= {"attention.head_count_kv": kv_heads, "rope.dimension_count": rotated}
        fields |= {"attention.key_length": size, "attention.value_length": size}
        if not architecture.windows:
            fields["context_length"] = min(config.context_length, values.get("sliding_window") or config.context_length)
        if architecture.attention_layers:
            heads, layers = fields["attention.head_count_kv"], values[architecture.attention_layers]
            fields["attention.head_count_kv"] = [heads * (layer in layers) for layer in range(config.n_layers)]
        scaling_fields, tensors = write_scaling(config.rope_scaling, config.rope_theta, rotated, architecture)
        if tensors and config.rope_scaling.kind != architecture.divisors:
            scaling = f"the rotary scaling {config.rope_scaling.kind!r}"
            raise UserError(f"llama.cpp runs no {name} model with {scaling}; write a directory (hf) instead.")
        fields |= scaling_fields
    fields |= architecture.write(values)
    return {f"{name}.{key}": value for key, value in fields.items()}, tensors


def head_dim(config: Any) -> int:
    """Return the size of a rotary head."""
    return vars(config).get("head_dim") or config.dim // config.n_heads


def rotary_head_dim(architecture: GgufArchitecture, config: Any) -> int | None:
    """Return the size of a head if GGUF stores rotary rows in another order than keifu; otherwise None."""
    return head_dim(config) if architecture.interleaved else None

"""Rotary scalings as GGUF files write them, both ways; knows no model.

linear and yarn are metadata. llama3 is a tensor of divisors, one a pair, whose formula must be found again: only a
formula that gives the same divisors is taken. dynamic has no form in GGUF.

Axes: pairs = half of a rotary head.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.errors import UserError
from keifu.layers.positions import RopeScaling

FREQS = "rope_freqs.weight"
Divisors = Float[Tensor, " pairs"]


def read_scaling(
    own: Mapping[str, Any], theta: float, context: int, freqs: Divisors | None, where: str
) -> RopeScaling | None:
    """The scaling that these metadata (without the architecture's name) and divisors mean."""
    factor = float(own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0)) or 1.0)
    kind = own.get("rope.scaling.type", "linear")  # llama.cpp's own default, which a factor of 1 makes nothing of
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{where} has rope.scaling.type {kind!r}, not linear or yarn, which keifu implements.")
    if freqs is not None:
        if kind != "none" and factor != 1.0:
            raise UserError(f"{where} has both {FREQS} and a {kind} scaling, which keifu does not implement.")
        return _llama3(freqs, theta, context, where)
    if kind == "none" or factor == 1.0:
        return None
    original = int(own.get("rope.scaling.original_context_length", context))
    if kind == "linear":
        return RopeScaling("linear", factor, context)
    size = float(own.get("rope.scaling.attn_factor", 1.0))
    attention_factor = None if size == 1.0 else size * (1 + 0.1 * math.log(factor))
    betas = {key: float(own.get(f"rope.scaling.yarn_{key}", usual)) for key, usual in YARN.items()}
    return RopeScaling("yarn", factor, original, attention_factor=attention_factor, **betas)


YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp has these built in for LLaMA and Qwen2


def write_scaling(
    scaling: RopeScaling | None, theta: float, head_dim: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata (without the architecture's name) and the tensors; what GGUF cannot say is a `UserError`."""
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
    """What each pair's frequency is divided by."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return (frequencies / scaling.apply(frequencies, theta)).float()


def _llama3(freqs: Divisors, theta: float, context: int, where: str) -> RopeScaling | None:
    if bool((freqs == 1).all()):
        return None
    for scaling in _candidates(freqs, theta, context):
        if torch.allclose(divisors(scaling, theta, 2 * len(freqs)), freqs, rtol=1e-5, atol=0):
            return scaling
    raise UserError(f"{where} has divisors in {FREQS} that no formula known to keifu gives, so it cannot use them.")


def _candidates(freqs: Divisors, theta: float, context: int) -> Iterator[RopeScaling]:
    """The published settings first, then those that two divisors between 1 and the largest determine.

    Between them the kept share of a frequency f is (length · f / 2π - low) / (high - low). That leaves one number
    free: low is 1, as published.
    """
    factor = float(freqs.max())
    yield RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    yield RopeScaling("llama3", factor, context, low_freq_factor=1.0, high_freq_factor=4.0)
    frequencies = theta ** -(torch.arange(len(freqs), dtype=torch.float64) / len(freqs))
    between = ((freqs > 1.0001) & (freqs < factor * 0.9999)).nonzero().flatten()
    if len(between) < 2:
        return
    kept = (1 / freqs.double() - 1 / factor) / (1 - 1 / factor)
    first, last = int(between[0]), int(between[-1])
    slope = float((kept[first] - kept[last]) / (frequencies[first] - frequencies[last]))
    offset = float(kept[first]) - slope * float(frequencies[first])
    high = 1 - 1 / offset
    length = round(2 * math.pi * slope * (high - 1))
    yield RopeScaling("llama3", factor, length, low_freq_factor=1.0, high_freq_factor=round(high, 4))

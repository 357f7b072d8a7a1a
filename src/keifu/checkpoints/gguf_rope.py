"""Rotary scalings as GGUF files write them, both ways; knows no model.

linear and yarn are metadata. llama3 is a tensor of divisors, one a pair, whose formula must be found again: only a
formula that gives the same divisors is taken. dynamic has no form in GGUF.

Axes: pairs = half of a rotary head.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
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
    fast, slow = (float(own.get(f"rope.scaling.yarn_{key}", usual)) for key, usual in YARN.items())
    return RopeScaling("yarn", factor, original, beta_fast=fast, beta_slow=slow, attention_factor=attention_factor)


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
    """The published settings first, then those that the divisors themselves determine.

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
    """Slope and offset of a line through all shares between 0 and 1 that is beyond 0 and 1 at the others."""
    between = [n for n, share in enumerate(kept) if 0 < share < 1]
    last = max(n for n, share in enumerate(kept) if share > 0)
    if len(between) > 1:
        slope = (kept[between[0]] - kept[last]) / (frequencies[between[0]] - frequencies[last])
    else:
        slope = kept[last] / (frequencies[last] - frequencies[last + 1])
        if between and last:
            slope = max(slope, (1 - kept[last]) / (frequencies[last - 1] - frequencies[last]))
    return slope, kept[last] - slope * frequencies[last]

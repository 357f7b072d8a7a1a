"""Attention of sequences of different lengths, concatenated without padding, in one kernel of an NVIDIA GPU.

Axes: queries = new tokens of all sequences, seen = tokens that they attend to, heads, head_dim.
"""

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.layers.attention.attention import Scoring


@cache
def kernel() -> Any:
    """Return PyTorch's kernel, or None if it is missing (PyTorch 2.9) or takes too few options.

    Only GPUs need it, and its module imports the compiler, which takes longer than the rest of this package.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"enable_gqa", "num_splits"} <= {*inspect.signature(varlen_attn).parameters} else None


class Bounds(NamedTuple):
    """Boundaries of sequences: cumulative token counts from 0, and the largest count of a sequence."""

    queries: Int[Tensor, " sequences+1"]
    seen: Int[Tensor, " sequences+1"]
    most_queries: int
    most_seen: int


def has_kernel(device: torch.device) -> bool:
    """Return whether PyTorch has such a kernel for this device: flash attention needs an NVIDIA Ampere or newer."""
    if device.type != "cuda" or torch.version.hip or not kernel():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fits(keys: Tensor, values: Tensor, scoring: Scoring) -> bool:
    """Return whether the kernel supports keys and values (..., head_dim): 16 bits, and a plain softmax."""
    width, half = keys.shape[-1], keys.dtype in (torch.float16, torch.bfloat16)
    plain = not scoring.soft_cap and scoring.sinks is None
    return half and plain and width == values.shape[-1] <= 256 and width % 8 == 0


def attend_packed(
    q: Float[Tensor, "queries heads head_dim"], k: Float[Tensor, "seen kv_heads head_dim"],
    v: Float[Tensor, "seen kv_heads head_dim"], bounds: Bounds, window: int | None, scoring: Scoring,
) -> Float[Tensor, "queries heads head_dim"]:  # fmt: skip
    """Attend from each query to the tokens of its sequence up to itself, or to the last `window` of these.

    The last query of a sequence is its last token. In deterministic mode the result of a sequence does not depend on
    the others: its keys are then not split between thread blocks.
    """
    options = {"window_size": (-1 if window is None else window - 1, 0), "enable_gqa": q.shape[1] != k.shape[1]}
    splits = 1 if torch.are_deterministic_algorithms_enabled() else None
    return kernel()(q, k, v, *bounds, scale=scoring.scale, num_splits=splits, **options)

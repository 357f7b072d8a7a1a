"""Kernels of decoding in Triton, which comes with PyTorch's packages for NVIDIA GPUs; nothing else imports this file.

They compute in float32 and round once. Axes: tokens, all_heads = those of queries, keys and values, head_dim, pairs =
head_dim / 2 or fewer, hidden.
"""

from typing import Any, cast

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Float
from torch import Tensor

WIDTH = 1024  # numbers of one program of `gate`


@triton.jit
def _turn(heads, cos, sin, row, pairs, step, apart, head_dim: tl.constexpr, width: tl.constexpr):  # noqa: ANN001
    """Turn the pairs of one head of one token; row: numbers of a token."""
    token, pair = tl.program_id(0), tl.arange(0, width)
    inside = pair < pairs
    first = heads + token * row + tl.program_id(1) * head_dim + pair * step
    c = tl.load(cos + token * pairs + pair, mask=inside)
    s = tl.load(sin + token * pairs + pair, mask=inside)
    a = tl.load(first, mask=inside).to(tl.float32)
    b = tl.load(first + apart, mask=inside).to(tl.float32)
    tl.store(first, (a * c - b * s).to(heads.dtype.element_ty), mask=inside)
    tl.store(first + apart, (b * c + a * s).to(heads.dtype.element_ty), mask=inside)


@triton.jit
def _gate(gate_up, result, hidden, width: tl.constexpr):  # noqa: ANN001
    """Multiply a part of one token's gate, after SiLU, with what is next to it."""
    token, column = tl.program_id(0), tl.program_id(1) * width + tl.arange(0, width)
    inside = column < hidden
    gate = tl.load(gate_up + token * 2 * hidden + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + token * 2 * hidden + hidden + column, mask=inside).to(tl.float32)
    tl.store(result + token * hidden + column, (gate * tl.sigmoid(gate) * up).to(result.dtype.element_ty), mask=inside)


def turn(
    heads: Float[Tensor, "tokens all_heads head_dim"], count: int, cos: Float[Tensor, "tokens pairs"],
    sin: Float[Tensor, "tokens pairs"], interleaved: bool,
) -> None:  # fmt: skip
    """Turn the first `count` heads by their positions, in column; see `Rotation`."""
    (tokens, all_heads, head_dim), pairs = heads.shape, cos.shape[1]
    step, apart = (2, 1) if interleaved else (1, pairs)
    width = triton.next_power_of_2(pairs)
    launch: Any = cast(Any, _turn)[(tokens, count)]
    launch(heads, cos, sin, all_heads * head_dim, pairs, step, apart, head_dim=head_dim, width=width)


def gate(gate_up: Float[Tensor, "tokens both"]) -> Float[Tensor, "tokens hidden"]:
    """Return SiLU of the first half of each token, times the second half: SwiGLU."""
    tokens, hidden = len(gate_up), gate_up.shape[1] // 2
    result = torch.empty(tokens, hidden, dtype=gate_up.dtype, device=gate_up.device)
    launch: Any = cast(Any, _gate)[(tokens, triton.cdiv(hidden, WIDTH))]
    launch(gate_up, result, hidden, width=WIDTH)
    return result

"""Kernels of decoding and of the loss in Triton, which comes with PyTorch's packages for NVIDIA GPUs; nothing else
imports this file.

They compute in float32 and round once. A block of Q4_0 or Q8_0 is a scale in float16, then 32 numbers of 4 or 8 bits
(`quantized.py`). Axes: tokens, all_heads = those of queries, keys and values, head_dim, pairs = head_dim / 2 or fewer,
hidden; blocks, bytes = of a block; rows, vocab.
"""

from typing import Any, cast

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

WIDTH = 1024  # numbers of one program of `gate`
BITS = {"Q4_0": 4, "Q8_0": 8}  # of the numbers of a block
FEW = 8  # tokens whose products with blocks need no unpacked matrix
CLASSES = 4096  # logits that a program of `cross_entropy_` reads at a time
COUNT, ROWS, COLUMNS = 64, 4, 16  # blocks of one program of `unpack`; rows and their blocks of a program of `product`


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


@triton.jit
def _numbers(blocks, block, inside, bits: tl.constexpr):  # noqa: ANN001
    """Return the scales of blocks, and the first and the last 16 numbers of each."""
    first = blocks + block.to(tl.int64) * (2 + 4 * bits)
    scale = tl.load(first.to(tl.pointer_type(tl.float16)), mask=inside, other=0.0).to(tl.float32)
    at, mask = tl.expand_dims(first, -1) + 2 + tl.arange(0, 16), tl.expand_dims(inside, -1)
    if bits == 4:
        both = tl.load(at, mask=mask, other=0).to(tl.int32)
        return scale, ((both & 15) - 8).to(tl.float32), ((both >> 4) - 8).to(tl.float32)
    signed = at.to(tl.pointer_type(tl.int8))
    low = tl.load(signed, mask=mask, other=0).to(tl.float32)
    return scale, low, tl.load(signed + 16, mask=mask, other=0).to(tl.float32)


@triton.jit
def _unpack(blocks, result, count, bits: tl.constexpr, width: tl.constexpr):  # noqa: ANN001
    """Write the numbers of some blocks."""
    block = tl.program_id(0) * width + tl.arange(0, width)
    inside = block < count
    scale, low, high = _numbers(blocks, block, inside, bits)
    at, mask = result + tl.expand_dims(block.to(tl.int64) * 32, -1) + tl.arange(0, 16), tl.expand_dims(inside, -1)
    scales = tl.expand_dims(scale, -1)
    tl.store(at, (low * scales).to(result.dtype.element_ty), mask=mask)
    tl.store(at + 16, (high * scales).to(result.dtype.element_ty), mask=mask)


@triton.jit
def _product(x, blocks, result, rows, length, bits: tl.constexpr, height: tl.constexpr, width: tl.constexpr):  # noqa: ANN001
    """Multiply some rows of a matrix, of `length` blocks each, with one token."""
    token, row = tl.program_id(1), tl.program_id(0) * height + tl.arange(0, height)
    total = tl.zeros((height,), tl.float32)
    for start in range(0, length, width):
        column = start + tl.arange(0, width)
        inside = tl.expand_dims(row < rows, -1) & tl.expand_dims(column < length, 0)
        block = tl.expand_dims(row.to(tl.int64) * length, -1) + tl.expand_dims(column, 0)
        scale, low, high = _numbers(blocks, block, inside, bits)
        at = x + token * length * 32 + tl.expand_dims(column * 32, -1) + tl.arange(0, 16)
        mask = tl.expand_dims(column < length, -1)
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at + 16, mask=mask, other=0.0).to(tl.float32)
        sums = tl.sum(low * tl.expand_dims(a, 0) + high * tl.expand_dims(b, 0), 2)
        total += tl.sum(sums * scale, 1)
    tl.store(result + token * rows + row, total.to(result.dtype.element_ty), mask=row < rows)


@triton.jit
def _cross_entropy(logits, targets, counts, loss, nats, vocab, smoothing, z_loss, width: tl.constexpr):  # noqa: ANN001
    """Write the loss of a row, and its gradient over the logits."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, width)
    right, count = tl.maximum(tl.load(targets + row), 0), tl.load(counts + row).to(tl.float32)
    first, lowest = logits + row * vocab + column, float("-inf")
    peaks = tl.full((width,), lowest, tl.float32)
    for start in range(0, vocab, width):
        x = tl.load(first + start, mask=start + column < vocab, other=lowest).to(tl.float32)
        peaks = tl.maximum(peaks, x)
    peak = tl.max(peaks, 0)
    masses, totals = tl.zeros((width,), tl.float32), tl.zeros((width,), tl.float32)
    picked = tl.zeros((width,), tl.float32)
    for start in range(0, vocab, width):
        inside = start + column < vocab
        x = tl.load(first + start, mask=inside, other=lowest).to(tl.float32)
        masses += tl.exp(x - peak)
        totals += tl.where(inside, x, 0.0)
        picked += tl.where(start + column == right, x, 0.0)
    log_z, chosen = peak + tl.log(tl.sum(masses, 0)), tl.sum(picked, 0)
    own = log_z - chosen
    whole = own + z_loss * log_z * log_z
    if smoothing > 0.0:
        whole += smoothing * (chosen - tl.sum(totals, 0) / vocab)
    tl.store(nats + row, own * count)
    tl.store(loss + row, whole * count)
    for start in range(0, vocab, width):
        inside = start + column < vocab
        x = tl.load(first + start, mask=inside, other=lowest).to(tl.float32)
        slope = tl.exp(x - log_z) * (1.0 + 2.0 * z_loss * log_z) - smoothing / vocab
        slope = (slope + tl.where(start + column == right, smoothing - 1.0, 0.0)) * count
        tl.store(first + start, slope.to(logits.dtype.element_ty), mask=inside)


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


def unpack(blocks: UInt8[Tensor, "blocks bytes"], bits: int, dtype: torch.dtype) -> Float[Tensor, "blocks 32"]:
    """Return the numbers of blocks."""
    result = torch.empty(len(blocks), 32, dtype=dtype, device=blocks.device)
    launch: Any = cast(Any, _unpack)[(triton.cdiv(len(blocks), COUNT),)]
    launch(blocks, result, len(blocks), bits=bits, width=COUNT)
    return result


def product(
    x: Float[Tensor, "tokens in"], blocks: UInt8[Tensor, "blocks bytes"], bits: int
) -> Float[Tensor, "tokens out"]:
    """Multiply tokens with a matrix of blocks, row after row, which is read once for each token."""
    tokens, length = len(x), x.shape[1] // 32
    rows = len(blocks) // length
    result = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    launch: Any = cast(Any, _product)[(triton.cdiv(rows, ROWS), tokens)]
    launch(x.contiguous(), blocks, result, rows, length, bits=bits, height=ROWS, width=COLUMNS)
    return result


def cross_entropy_(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"],
    counts: Float[Tensor, " rows"] | Bool[Tensor, " rows"], label_smoothing: float, z_loss: float,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:  # fmt: skip
    """Return the loss of each row and -log p of its target, times its count; each logit becomes the gradient by it."""
    loss, nats = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
    launch: Any = cast(Any, _cross_entropy)[(len(logits),)]
    width = min(CLASSES, triton.next_power_of_2(logits.shape[1]))
    launch(logits, targets, counts, loss, nats, logits.shape[1], label_smoothing, z_loss, width=width)
    return loss, nats

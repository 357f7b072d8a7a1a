"""Triton kernels for decoding and for the loss. Triton comes with PyTorch's packages for NVIDIA GPUs; only
`linear.triton_kernels` imports this file.

The kernels compute in float32 and round once. The blocks are GGUF's (`quantized.py`). Axes: tokens, all_heads = those
of queries, keys and values, head_dim, pairs = head_dim / 2 or fewer, hidden; blocks, bytes = of a block, numbers; rows,
vocab.
"""

from typing import Any, cast

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

WIDTH = 1024  # numbers of one program of `gate`
KINDS = {"Q4_0": 2, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14}  # GGML's numbers of the block types
GROUPS = {2: 1, 8: 1, 12: 8, 14: 8}  # groups of 32 numbers in a block
FEW = 8  # the most tokens for which `product` multiplies with the blocks directly
CLASSES = 4096  # logits that a program of `cross_entropy_` reads at a time
# groups of one program of `unpack`; rows, and groups of a row, of one program of `product`
COUNT, ROWS, COLUMNS = 64, 4, 16


@triton.jit
def _turn(heads, cos, sin, row, pairs, step, distance, head_dim: tl.constexpr, width: tl.constexpr):  # noqa: ANN001
    """Rotate the pairs of one head of one token. row: numbers of a token."""
    token, pair = tl.program_id(0), tl.arange(0, width)
    inside = pair < pairs
    first = heads + token * row + tl.program_id(1) * head_dim + pair * step
    c = tl.load(cos + token * pairs + pair, mask=inside)
    s = tl.load(sin + token * pairs + pair, mask=inside)
    a = tl.load(first, mask=inside).to(tl.float32)
    b = tl.load(first + distance, mask=inside).to(tl.float32)
    tl.store(first, (a * c - b * s).to(heads.dtype.element_ty), mask=inside)
    tl.store(first + distance, (b * c + a * s).to(heads.dtype.element_ty), mask=inside)


@triton.jit
def _gate(gate_up, result, hidden, width: tl.constexpr):  # noqa: ANN001
    """Multiply SiLU of a part of one token's gate with the same part of up."""
    token, column = tl.program_id(0), tl.program_id(1) * width + tl.arange(0, width)
    inside = column < hidden
    gate = tl.load(gate_up + token * 2 * hidden + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + token * 2 * hidden + hidden + column, mask=inside).to(tl.float32)
    tl.store(result + token * hidden + column, (gate * tl.sigmoid(gate) * up).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _half(at, inside):  # noqa: ANN001
    """Load numbers in float16."""
    return tl.load(at.to(tl.pointer_type(tl.float16)), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_bytes(at, inside):  # noqa: ANN001
    """Load bytes as integers."""
    return tl.load(at, mask=inside, other=0).to(tl.int32)


@triton.jit
def _numbers(blocks, block, inside, code: tl.constexpr):  # noqa: ANN001
    """Return the first and the last 16 numbers of each group of 32. block: number of the group. code: the type's number
    in GGML."""
    column, mask = tl.arange(0, 16), tl.expand_dims(inside, -1)
    if code == 8:
        first = blocks + block.to(tl.int64) * 34
        at = (tl.expand_dims(first, -1) + 2 + column).to(tl.pointer_type(tl.int8))
        low, high = _load_bytes(at, mask).to(tl.float32), _load_bytes(at + 16, mask).to(tl.float32)
        scale = tl.expand_dims(_half(first, inside), -1)
        return low * scale, high * scale
    if code == 2:
        first = blocks + block.to(tl.int64) * 18
        both, scale = (
            _load_bytes(tl.expand_dims(first, -1) + 2 + column, mask),
            tl.expand_dims(_half(first, inside), -1),
        )
        return ((both & 15) - 8).to(tl.float32) * scale, ((both >> 4) - 8).to(tl.float32) * scale
    group = block % 8
    if code == 12:
        first = blocks + (block // 8).to(tl.int64) * 144
        scales = first + 4 + group % 4
        a, b, c = _load_bytes(scales, inside), _load_bytes(scales + 4, inside), _load_bytes(scales + 8, inside)
        scale = tl.where(group < 4, a & 63, (c & 15) | (a >> 6 << 4)).to(tl.float32) * _half(first, inside)
        least = tl.where(group < 4, b & 63, (c >> 4) | (b >> 6 << 4)).to(tl.float32) * _half(first + 2, inside)
        at, shift = tl.expand_dims(first + 16 + group // 2 * 32, -1) + column, tl.expand_dims(group % 2 * 4, -1)
        low, high = _load_bytes(at, mask) >> shift & 15, _load_bytes(at + 16, mask) >> shift & 15
        scale, least = tl.expand_dims(scale, -1), tl.expand_dims(least, -1)
        return low.to(tl.float32) * scale - least, high.to(tl.float32) * scale - least
    first = blocks + (block // 8).to(tl.int64) * 210
    at, scales = first + group // 4 * 64 + group % 2 * 32, (first + 192 + 2 * group).to(tl.pointer_type(tl.int8))
    at, next_at = tl.expand_dims(at, -1) + column, tl.expand_dims(first + 128 + group // 4 * 32, -1) + column
    shift, above = tl.expand_dims(group % 4 // 2 * 4, -1), tl.expand_dims(group % 4 * 2, -1)
    scale = _half(first + 208, inside)
    low = (_load_bytes(at, mask) >> shift & 15 | (_load_bytes(next_at, mask) >> above & 3) << 4) - 32
    high = (_load_bytes(at + 16, mask) >> shift & 15 | (_load_bytes(next_at + 16, mask) >> above & 3) << 4) - 32
    one, other = (
        _load_bytes(scales, inside).to(tl.float32) * scale,
        _load_bytes(scales + 1, inside).to(tl.float32) * scale,
    )
    return low.to(tl.float32) * tl.expand_dims(one, -1), high.to(tl.float32) * tl.expand_dims(other, -1)


@triton.jit
def _unpack(blocks, result, count, code: tl.constexpr, width: tl.constexpr):  # noqa: ANN001
    """Write the numbers of some groups of 32."""
    block = tl.program_id(0) * width + tl.arange(0, width)
    inside = block < count
    low, high = _numbers(blocks, block, inside, code)
    at, mask = result + tl.expand_dims(block.to(tl.int64) * 32, -1) + tl.arange(0, 16), tl.expand_dims(inside, -1)
    tl.store(at, low.to(result.dtype.element_ty), mask=mask)
    tl.store(at + 16, high.to(result.dtype.element_ty), mask=mask)


@triton.jit
def _product(x, blocks, result, rows, length, code: tl.constexpr, height: tl.constexpr, width: tl.constexpr):  # noqa: ANN001
    """Multiply some rows of a matrix, of `length` groups of 32 each, with one token."""
    token, row = tl.program_id(1), tl.program_id(0) * height + tl.arange(0, height)
    total = tl.zeros((height,), tl.float32)
    for start in range(0, length, width):
        column = start + tl.arange(0, width)
        inside = tl.expand_dims(row < rows, -1) & tl.expand_dims(column < length, 0)
        block = tl.expand_dims(row * length, -1) + tl.expand_dims(column, 0)
        low, high = _numbers(blocks, block, inside, code)
        at = x + token * length * 32 + tl.expand_dims(column * 32, -1) + tl.arange(0, 16)
        mask = tl.expand_dims(column < length, -1)
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(at + 16, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tl.sum(low * tl.expand_dims(a, 0) + high * tl.expand_dims(b, 0), 2), 1)
    tl.store(result + token * rows + row, total.to(result.dtype.element_ty), mask=row < rows)


@triton.jit
def _cross_entropy(logits, targets, counts, loss, nats, vocab, smoothing, z_loss, width: tl.constexpr):  # noqa: ANN001
    """Write the loss of a row, and overwrite the logits with their gradient."""
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
    log_z, target_logit = peak + tl.log(tl.sum(masses, 0)), tl.where(right < vocab, tl.sum(picked, 0), float("nan"))
    nll = log_z - target_logit
    total = nll + z_loss * log_z * log_z
    if smoothing > 0.0:
        total += smoothing * (target_logit - tl.sum(totals, 0) / vocab)
    tl.store(nats + row, nll * count)
    tl.store(loss + row, total * count)
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
    """Rotate the first `count` heads by their positions, in place; see `Rotation`."""
    (tokens, all_heads, head_dim), pairs = heads.shape, cos.shape[1]
    step, distance = (2, 1) if interleaved else (1, pairs)
    width = triton.next_power_of_2(pairs)
    launch: Any = cast(Any, _turn)[(tokens, count)]
    launch(heads, cos, sin, all_heads * head_dim, pairs, step, distance, head_dim=head_dim, width=width)


def gate(gate_up: Float[Tensor, "tokens both"]) -> Float[Tensor, "tokens hidden"]:
    """Return SiLU of the first half of each token, times the second half: SwiGLU."""
    tokens, hidden = len(gate_up), gate_up.shape[1] // 2
    result = torch.empty(tokens, hidden, dtype=gate_up.dtype, device=gate_up.device)
    launch: Any = cast(Any, _gate)[(tokens, triton.cdiv(hidden, WIDTH))]
    launch(gate_up, result, hidden, width=WIDTH)
    return result


def unpack(blocks: UInt8[Tensor, "blocks bytes"], code: int, dtype: torch.dtype) -> Float[Tensor, "blocks numbers"]:
    """Return the numbers of blocks."""
    result = torch.empty(len(blocks), GROUPS[code] * 32, dtype=dtype, device=blocks.device)
    count = len(blocks) * GROUPS[code]
    launch: Any = cast(Any, _unpack)[(triton.cdiv(count, COUNT),)]
    launch(blocks, result, count, code=code, width=COUNT, enable_fp_fusion=False)  # fusion would round once, not twice
    return result


def product(
    x: Float[Tensor, "tokens in"], blocks: UInt8[Tensor, "blocks bytes"], code: int
) -> Float[Tensor, "tokens out"]:
    """Multiply tokens with a matrix of blocks, whose rows are read once for each token."""
    tokens, length = len(x), x.shape[1] // 32
    rows = len(blocks) * GROUPS[code] // length
    result = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    launch: Any = cast(Any, _product)[(triton.cdiv(rows, ROWS), tokens)]
    launch(x.contiguous(), blocks, result, rows, length, code=code, height=ROWS, width=COLUMNS)
    return result


def cross_entropy_(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"],
    counts: Float[Tensor, " rows"] | Bool[Tensor, " rows"], label_smoothing: float, z_loss: float,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:  # fmt: skip
    """Return the loss of each row and -log p of its target, both times its count. Overwrite each logit with its
    gradient."""
    loss, nats = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
    launch: Any = cast(Any, _cross_entropy)[(len(logits),)]
    arguments = logits, targets.contiguous(), counts.contiguous(), loss, nats, logits.shape[1], label_smoothing, z_loss
    launch(*arguments, width=min(CLASSES, triton.next_power_of_2(logits.shape[1])))
    return loss, nats

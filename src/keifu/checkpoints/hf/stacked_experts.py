"""Experts that a file stacks in one tensor, as in gpt-oss and Qwen3.5, and their unpacking from MXFP4.

The table of names refers to an expert's matrices as slices: `experts.3.gate_slice.weight` is every second column of
`experts.gate_up_proj[3]` (gpt-oss); `experts.3.gate_proj.weight` is the first half of its rows (Qwen3.5), and is
written as a tensor of its own; `experts.3.gate_rows.weight` is the same (Gemma 4), and is written in the stack. Axes:
experts, in, out; blocks of 32 numbers of four bits in 16 bytes.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from keifu.checkpoints.plan import StoredTensor, is_stack
from keifu.errors import UserError
from keifu.layers.lazy import Index

SLICE = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_(?:slice|rows)\.(weight|bias)")
STACK = re.compile(r"(.*\.experts)\.(gate_up|down)_proj(_bias|_blocks|)")
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
ROWS = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}  # rows of an expert's matrix

Read = Callable[..., Tensor]


def stack_of(name: str) -> str:
    """Return the name of the tensor that contains a slice; return other names unchanged."""
    if not (match := SLICE.fullmatch(name)):
        return name
    return f"{match[1]}.{'down' if match[3] == 'down' else 'gate_up'}_proj{'_bias' if match[4] == 'bias' else ''}"


def unstack_rows(
    stored: Mapping[str, StoredTensor], read: Read, leaf: str = "proj"
) -> tuple[dict[str, StoredTensor], Read]:
    """Split stacked experts into matrices: return the tensors, and a function that reads them. Gate and up are the
    halves of a matrix (out, in). leaf: "rows" if the table refers to them so."""
    slices: dict[str, StoredTensor] = {}
    slice_of: dict[str, tuple[str, int, slice]] = {}
    for name, tensor in stored.items():
        match = STACK.fullmatch(name)
        if not match or match[3] or len(tensor.shape) != 3 or not is_stack(tensor.shape):
            slices[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        parts = ("down",) if match[2] == "down" else ("gate", "up")
        if rows % len(parts):
            raise UserError(f"{name} has {rows} rows, which are not the two halves of a gate and an up projection.")
        rows //= len(parts)
        for number in range(experts):
            for index, part in enumerate(parts):
                target = f"{match[1]}.{number}.{part}_{leaf}.weight"
                slices[target] = tensor._replace(shape=(rows, columns))
                slice_of[target] = name, number, slice(index * rows, (index + 1) * rows)

    def read_slice(name: str, index: Index = ()) -> Tensor:
        if name not in slice_of:
            return read(name, index)
        stack_name, number, rows = slice_of[name]
        matrix = read(stack_name, (slice(number, number + 1), rows))[0]
        return (matrix[index] if index else matrix).contiguous()

    return slices, read_slice


def unstack(stored: Mapping[str, StoredTensor], read: Read) -> tuple[dict[str, StoredTensor], Read]:
    """Split stacked experts into slices: return the tensors, and a function that reads them."""
    slices: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        if not (match := STACK.fullmatch(name)) or not tensor.shape or not is_stack(tensor.shape):
            packed = name.endswith("_proj_scales") and f"{name.removesuffix('scales')}blocks" in stored
            slices |= {} if packed else {name: tensor}
            continue
        experts, *sizes = tensor.shape
        format, dtype, leaf = tensor.format, tensor.dtype, "bias" if match[3] == "_bias" else "weight"
        if match[3] == "_blocks":
            format, dtype, sizes = "MXFP4", torch.bfloat16, [2 * sizes[1] * sizes[2], sizes[0]]
        *inputs, outputs = sizes
        parts = ("down",) if match[2] == "down" else ("gate", "up")
        shape = (outputs // len(parts), *inputs)
        for number in range(experts):
            for part in parts:
                slices[f"{match[1]}.{number}.{part}_slice.{leaf}"] = StoredTensor(shape, format, dtype)

    def read_slice(name: str, index: Index = ()) -> Tensor:
        if not (match := SLICE.fullmatch(name)):
            return read(name, index)
        stack_name, number = stack_of(name), slice(int(match[2]), int(match[2]) + 1)
        if f"{stack_name}_blocks" in stored:
            matrix = unpack_mxfp4(
                read(f"{stack_name}_blocks", (number,))[0], read(f"{stack_name}_scales", (number,))[0]
            )
        else:
            matrix = read(stack_name, (number,))[0]
            matrix = matrix.mT if match[4] == "weight" else matrix
        rows = matrix[ROWS[match[3]]]
        return (rows[index] if index else rows).contiguous()

    return slices, read_slice


def unpack_mxfp4(
    blocks: UInt8[Tensor, "out blocks bytes"], scales: UInt8[Tensor, "out blocks"]
) -> Float[Tensor, "out in"]:
    """Return the numbers in bfloat16, which is exact: a number of four bits times 2^(scale - 127)."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).int()
    return torch.ldexp(torch.tensor(FP4)[codes], scales[..., None].int() - 127).bfloat16().flatten(-2)


def stack(
    tensors: Iterable[tuple[str, Tensor]], stack_of: Callable[[str], str], join: Callable[[str, Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file, with the parts of a layer's experts stacked.

    stack_of: returns the name of a part's stack, and other names unchanged. join: converts a stack to its stored form.
    """
    waiting: dict[str, list[Tensor]] = {}
    for name, tensor in chain(tensors, [("", torch.empty(0))]):
        if (stack_name := stack_of(name)) != name:
            waiting.setdefault(stack_name, []).append(tensor)
            continue
        yield from ((stack_name, join(stack_name, torch.stack(parts))) for stack_name, parts in waiting.items())
        waiting.clear()
        if name:
            yield name, tensor


def join_slices(name: str, tensor: Tensor) -> Tensor:
    """Return the stack of an expert's slices in the file's form: the columns of gate and up alternate."""
    if ".gate_up_proj" in name:
        tensor = tensor.unflatten(0, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return (tensor if name.endswith("_bias") else tensor.mT).contiguous()


def join_rows(name: str, tensor: Tensor) -> Tensor:
    """Return the stack of an expert's matrices in the file's form: the rows of up follow those of gate."""
    return tensor.unflatten(0, (-1, 2)).flatten(1, 2) if ".gate_up_proj" in name else tensor

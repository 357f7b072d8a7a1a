"""Weights packed for the native step: formats, the memory they lie in, and where they come from.

Axes: rows, columns = of a matrix; bytes = of a row of GGUF's blocks.
"""

import ctypes
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from keifu.errors import UserError, unknown
from keifu.native import library as native
from keifu.native.describe import MatrixPart, ModelPart, NormPart
from keifu.native.library import Library

CHUNK = 64 << 20  # bytes of memory that are asked for at a time
SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TILE = 16  # rows that are packed together
PIECE = 8 << 20  # bytes, as float32, that are read and packed at a time
HUGE_PAGES = 14  # Linux's MADV_HUGEPAGE


@dataclass(frozen=True)
class Formats:
    """The formats of a model's matrices, and of its embedding and head, whose errors reach every logit directly.

    exact: whether blocks of a GGUF file stay what they are, where the native step has their numbers.
    """

    layers: int
    embedding: int
    exact: bool = True


FORMATS = {
    "f32": Formats(native.F32, native.F32, exact=False),
    "bf16": Formats(native.BF16, native.BF16, exact=False),
    "int8": Formats(native.INT8_64, native.INT8_64),
    "int4": Formats(native.INT4_64, native.INT8_64),
    "int4_pure": Formats(native.INT4_64, native.INT4_64),
}
OWN = "own"  # what keeps a file's numbers: a GGUF file's blocks, if native code has all of them, or float32


def formats(weights: str) -> Formats:
    """The formats by their name: f32, bf16, int8, int4 or int4_pure; another one is a `UserError` with the nearest."""
    if weights not in (*FORMATS, OWN):
        raise unknown("format of weights", weights, [*FORMATS, OWN])
    return FORMATS["int8" if weights == OWN else weights]


@dataclass(frozen=True)
class Blocks:
    """Rows of a matrix as blocks of a GGUF file: GGML's number of their type, and their bytes."""

    kind: int
    data: UInt8[Tensor, "rows bytes"]


@runtime_checkable
class Weights(Protocol):
    """Interface of where a model's parameters come from: a built model, or a file that is read piece by piece."""

    def rows(self, name: str, first: int, rows: int) -> Float[Tensor, "rows columns"]:
        """Some rows of a matrix, by the name of the parameter."""
        ...

    def blocks(self, name: str, first: int, rows: int) -> Blocks | None:
        """The same rows as a file's blocks, where it has them so."""
        ...

    def numbers(self, name: str) -> Tensor:
        """A whole parameter."""
        ...

    def release(self) -> None:
        """What was read of matrices is no longer needed."""
        ...


class ModuleWeights:
    """The parameters and buffers of a built model."""

    def __init__(self, model: nn.Module):
        own = (*model.named_parameters(), *model.named_buffers())
        self._parameters: Mapping[str, Tensor] = {name: each.detach() for name, each in own}

    def rows(self, name: str, first: int, rows: int) -> Float[Tensor, "rows columns"]:
        """Some rows of a matrix."""
        return self._parameters[name][first : first + rows]

    def blocks(self, name: str, first: int, rows: int) -> Blocks | None:
        """None: a built model has plain numbers."""

    def numbers(self, name: str) -> Tensor:
        """A whole parameter."""
        return self._parameters[name]

    def release(self) -> None:
        """The model keeps its parameters."""


class Arena:
    """Memory for packed weights, in huge pages where the system has them; it is given back with the arena."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []
        self._next = self._end = 0
        self.size = 0  # bytes that are used

    def take(self, size: int) -> int:
        """The address of so many bytes, 64-byte aligned."""
        size = (size + 63) // 64 * 64
        if self._next + size > self._end:
            mapped = mmap.mmap(-1, max(size, CHUNK), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if sys.platform == "linux":
                mapped.madvise(HUGE_PAGES)
            self._maps.append(mapped)
            self._next = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            self._end = self._next + len(mapped)
        self._next += size
        self.size += size
        return self._next - size


class Packer:
    """Packs the parts of one model, and keeps all that native code points at."""

    def __init__(self, library: Library, weights: Weights, chosen: Formats):
        self.library, self.weights, self.chosen = library, weights, chosen
        self.arena = Arena()
        self._floats: dict[tuple[str, float], Tensor] = {}
        self._kept: dict[bytes, Tensor] = {}
        self.matrices: dict[tuple[str, int], native.Matrix] = {}

    def floats(self, name: str | None, offset: float = 0.0) -> Tensor | None:
        """A parameter in float32 plus the offset, which stays where it is; None without a name."""
        if name is None:
            return None
        if (name, offset) not in self._floats:
            found = self.weights.numbers(name).to("cpu", torch.float32) + offset  # a copy, whatever it was
            if not bool(found.isfinite().all()):
                raise UserError(f"{name} holds a number that is not finite: such weights cannot be used.")
            self._floats[name, offset] = found.contiguous()
        return self._floats[name, offset]

    def keep(self, numbers: Tensor) -> int:
        """The address of these float32 numbers, which are kept; the same numbers have the same address."""
        return self._kept.setdefault(numbers.numpy().tobytes(), numbers.contiguous()).data_ptr()

    def address(self, numbers: str | Tensor | None) -> int | None:
        """Where a parameter, or given numbers, stay in float32."""
        return self.keep(numbers) if isinstance(numbers, Tensor) else _address(self.floats(numbers))

    def norm(self, part: NormPart | None) -> native.Norm:
        """A norm, or none."""
        if part is None:
            return native.Norm()
        weight, bias = self.floats(part.weight, part.offset), self.floats(part.bias)
        return native.Norm(part.kind, part.eps, _address(weight), _address(bias))

    def matrix(self, part: MatrixPart | None, whole: ModelPart) -> native.Matrix:
        """A matrix, packed; one that serves twice is packed once."""
        if part is None:
            return native.Matrix()
        key = part.weight, part.first
        if key not in self.matrices:
            at_ends = part.weight in (whole.embedding.weight, whole.head.weight)
            self.matrices[key] = self._pack(part, self.chosen.embedding if at_ends else self.chosen.layers)
        found, bias = self.matrices[key], self.floats(part.bias)
        address = None if bias is None else bias.data_ptr() + 4 * part.first
        return native.Matrix(found.format, found.rows, found.columns, found.data, address)

    def _pack(self, part: MatrixPart, wanted: int) -> native.Matrix:
        blocks = self.weights.blocks(part.weight, part.first, 1) if self.chosen.exact else None
        exact = None if blocks is None else self.library.gguf_format(blocks.kind)
        format_ = wanted if exact is None else exact
        tile = self.library.call("packed_size", format_, TILE, part.columns)
        address = self.arena.take(-(-part.rows // TILE) * tile)
        step = max(1, PIECE // (4 * TILE * part.columns)) * TILE
        for first in range(0, part.rows, step):
            rows = part.weight, part.first + first, min(step, part.rows - first)
            to = address + first // TILE * tile
            try:
                if exact is None:
                    self._pack_numbers(format_, self.weights.rows(*rows), to)
                else:
                    self._pack_blocks(self.weights.blocks(*rows), part.columns, to)
            except UserError as error:
                raise UserError(f"{part.weight} cannot be packed, of the rows from {rows[1]} on: {error}") from error
            self.weights.release()
        return native.Matrix(format_, part.rows, part.columns, address)

    def _pack_numbers(self, format_: int, found: Float[Tensor, "rows columns"], to: int) -> None:
        numbers = found.cpu() if found.dtype in SOURCES else found.cpu().float()
        numbers = numbers if numbers.stride(1) == 1 else numbers.contiguous()
        source = SOURCES[numbers.dtype], numbers.data_ptr()
        self.library.call("pack", format_, *source, *numbers.shape, numbers.stride(0), to)

    def _pack_blocks(self, found: Blocks | None, columns: int, to: int) -> None:
        assert found is not None
        data = found.data.contiguous()
        self.library.call("repack_gguf", found.kind, data.data_ptr(), len(data), columns, to)


def _address(numbers: Tensor | None) -> int | None:
    return None if numbers is None else numbers.data_ptr()

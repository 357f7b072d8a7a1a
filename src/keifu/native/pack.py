"""Weights packed for the native code: their formats, their memory, and their source.

Axes: rows, columns of a matrix; bytes = of a row of GGUF blocks.
"""

import ctypes
import mmap
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from keifu.errors import UserError, require_known
from keifu.native import library as native
from keifu.native.describe import LayerPart, MatrixPart, NormPart
from keifu.native.library import Library

CHUNK = 64 << 20  # bytes per allocation
SOURCES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TILE = 16  # rows that are packed together
PIECE = 8 << 20  # bytes, in float32, that are read and packed at a time
HUGE_PAGES = 14  # Linux's MADV_HUGEPAGE


@dataclass(frozen=True)
class Formats:
    """Formats of a model's matrices. The embedding and the head have their own format: their errors reach every logit.

    exact: whether GGUF blocks keep their numbers, if the native code has a format for them.
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
OWN = "own"  # keep a file's numbers: GGUF blocks if the native code has all their types, otherwise float32


def formats(weights: str) -> Formats:
    """Return the formats named f32, bf16, int8, int4, int4_pure or own. Raises UserError for another name."""
    require_known("format of weights", weights, [*FORMATS, OWN])
    return FORMATS["int8" if weights == OWN else weights]


@dataclass(frozen=True)
class Blocks:
    """Rows of a matrix as blocks of a GGUF file. kind: GGML's number of the block type. data: the bytes of each row."""

    kind: int
    data: UInt8[Tensor, "rows bytes"]


class Weights:
    """Source of a model's parameters, by name: a built model. A subclass reads them from a file."""

    def __init__(self, model: nn.Module):
        tensors = (*model.named_parameters(), *model.named_buffers())
        self._parameters: Mapping[str, Tensor] = {name: tensor.detach() for name, tensor in tensors}

    def rows(self, name: str, first: int, rows: int) -> Float[Tensor, "rows columns"]:
        """Return `rows` rows of the matrix `name`, from row `first` on."""
        return self._parameters[name][first : first + rows]

    def blocks(self, name: str, first: int, rows: int) -> Blocks | None:
        """Return the same rows as GGUF blocks; None if the source has none, as in a built model."""

    def numbers(self, name: str) -> Tensor:
        """Return a whole parameter."""
        return self._parameters[name]

    def release(self) -> None:
        """Allow the source to free the matrices that were read. A built model keeps them."""


class Arena:
    """Memory for packed weights, in huge pages if the system has them. It is freed with this object."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []
        self._next = self._end = 0
        self.size = 0  # bytes in use

    def take(self, size: int) -> int:
        """Allocate `size` bytes, aligned to 64 bytes, and return their address."""
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

    def buffers(self) -> list[memoryview]:
        """Return the memory in use."""
        views = [memoryview(mapped) for mapped in self._maps]
        return [*views[:-1], *(view[: len(view) - (self._end - self._next)] for view in views[-1:])]


class Packer:
    """Packer of one model's parameters. It keeps all memory that the native code points to alive.

    overrides: formats by parameter name instead of those of `chosen`: of the embedding, the head and routers.
    """

    def __init__(self, library: Library, weights: Weights, formats: Formats, overrides: Mapping[str, int]):
        self.library, self.weights, self.formats, self.overrides = library, weights, formats, overrides
        self.arena = Arena()
        self._floats: dict[tuple[str, float], Tensor] = {}
        self._kept: dict[bytes, Tensor] = {}
        self.matrices: dict[tuple[str, int], native.Matrix] = {}
        self._experts: list[ctypes.Array[native.Expert]] = []

    def buffers(self) -> list[Any]:
        """Return all memory that the native code reads: matrices, norms, biases and frequencies."""
        return [*self.arena.buffers(), *(x.numpy() for x in (*self._floats.values(), *self._kept.values()))]

    def address(self, numbers: str | Tensor | None, offset: float = 0.0) -> int | None:
        """Return the address of a parameter plus `offset`, or of given numbers, in float32. Equal numbers share one
        address.
        """
        if isinstance(numbers, Tensor):
            return self._kept.setdefault(numbers.numpy().tobytes(), numbers.contiguous()).data_ptr()
        if numbers is None:
            return None
        if (numbers, offset) not in self._floats:
            values = self.weights.numbers(numbers).to("cpu", torch.float32) + offset  # adding makes a copy
            if not bool(values.isfinite().all()):
                raise UserError(f"{numbers} holds a number that is not finite: such weights cannot be used.")
            self._floats[numbers, offset] = values.contiguous()
        return self._floats[numbers, offset].data_ptr()

    def norm(self, part: NormPart) -> native.Norm:
        """Describe a norm by the addresses of its float32 weights."""
        weight = self.address(part.weight, part.offset)
        return native.Norm(part.kind, part.eps, weight, self.address(part.bias))

    def matrix(self, part: MatrixPart) -> native.Matrix:
        """Pack a matrix. A matrix that is used twice is packed once."""
        key = part.weight, part.first
        if key not in self.matrices:
            self.matrices[key] = self._pack(part, self.overrides.get(part.weight, self.formats.layers))
        packed, bias = self.matrices[key], self.address(part.bias)
        address = None if bias is None else bias + 4 * part.bias_first
        return native.Matrix(packed.format, packed.rows, packed.columns, packed.data, address)

    def experts(self, part: LayerPart) -> ctypes.Array[native.Expert]:
        """Pack the experts of a mixture."""
        packed = [{name: self.matrix(matrix) for name, matrix in expert.items()} for expert in part.experts]
        self._experts.append((native.Expert * len(packed))(*(native.Expert(**matrices) for matrices in packed)))
        return self._experts[-1]

    def _pack(self, part: MatrixPart, default_format: int) -> native.Matrix:
        blocks = self.weights.blocks(part.weight, part.first, 1) if self.formats.exact else None
        exact = None if blocks is None else self.library.gguf_format(blocks.kind)
        format_ = default_format if exact is None else exact
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

    def _pack_numbers(self, format_: int, values: Float[Tensor, "rows columns"], to: int) -> None:
        numbers = values.cpu() if values.dtype in SOURCES else values.cpu().float()
        numbers = numbers if numbers.stride(1) == 1 else numbers.contiguous()
        source = SOURCES[numbers.dtype], numbers.data_ptr()
        self.library.call("pack", format_, *source, *numbers.shape, numbers.stride(0), to)

    def _pack_blocks(self, blocks: Blocks | None, columns: int, to: int) -> None:
        assert blocks is not None
        data = blocks.data.contiguous()
        self.library.call("repack_gguf", blocks.kind, data.data_ptr(), len(data), columns, to)

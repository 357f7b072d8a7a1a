"""Weights read from a file directly into the formats of the native code, one matrix after the other.

After a matrix is packed, the memory of the mapped file is released, so that loading needs little more memory than the
packed weights. Axes: rows, columns of one of our matrices; bytes = of a row of GGUF blocks.
"""

import ctypes
import math
import mmap
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keifu.checkpoints.hf.weight_names import Link
from keifu.checkpoints.plan import LoadPlan, read_finite
from keifu.devices import device_choice
from keifu.layers.linear import JoinedLinear, Linear
from keifu.layers.quantized import FORMATS, QuantizedLinear, unpack
from keifu.layers.transformer.decoder import DecoderLM
from keifu.layers.transformer.encoder_decoder import EncoderDecoder
from keifu.layers.transformer.speech import SpeechRecognizer
from keifu.native.compiler import Unavailable
from keifu.native.describe import ModelPart, describe
from keifu.native.library import open_library, say_why, switched_off
from keifu.native.model import NativeLM, attach_native, pack
from keifu.native.pack import OWN, Blocks, Weights
from keifu.native.targets import NativeSpeech, NativeTranslator
from keifu.untrusted import reading

MAPS = Path("/proc/self/maps")
ENOUGH = 16 << 20  # bytes that are read before memory is released
DONTNEED = 4  # Linux's MADV_DONTNEED


def load_packed(load_plan: LoadPlan, weights: str) -> nn.Module:
    """Return the planned model with its weights packed in a format. If the native code cannot compute it, print the
    reason and return the model without packing.

    weights: "own" is the format that keeps the file's numbers: its blocks, or float32. A translator or a speech model
    is not replaced: its packed form is attached to it.
    """
    with_source = isinstance(load_plan.model, EncoderDecoder | SpeechRecognizer)
    if weights == OWN and (switched_off() or not (with_source or isinstance(load_plan.model, DecoderLM))):
        return load_plan.fill("cpu")
    try:
        described, source = describe(load_plan.model), FileWeights(load_plan)
        computed = device_choice().weights not in (None, "auto")  # the user chose a type, which blocks do not have
        if weights == OWN and (computed or not (load_plan.source.blocks and _has_native_blocks(described, source))):
            if load_plan.dtype != torch.float32 or device_choice().allow_nonfinite:
                return load_plan.fill("cpu")
            weights = "f32"
        if with_source:
            return pack_or_keep(load_plan.fill("cpu"), weights)
        return NativeLM(described, source, weights, load_plan.source.config)
    except Unavailable as reason:
        say_why(str(reason))
        return load_plan.fill("cpu")


def _has_native_blocks(model: ModelPart, source: "FileWeights") -> bool:
    library = open_library()
    stored = [source.blocks(matrix.weight, matrix.first, 1) for matrix in model.matrices]
    return all(tensor is not None and library.gguf_format(tensor.kind) is not None for tensor in stored)


def fill_in_blocks(load_plan: LoadPlan, device: torch.device) -> nn.Module:
    """Return the planned model on a device, with those linear layers still quantised that are blocks in a GGUF file."""
    links = [link for link in load_plan.links if _stays_packed(load_plan, link)]
    model = load_plan.fill(device, {link.ours for link in links})
    with reading(load_plan.source.path):
        for link in links:
            name = link.ours.removesuffix(".weight")
            blocks = [_stored(load_plan, link, number, device) for number in range(len(link.theirs))]
            model.set_submodule(name, QuantizedLinear(cast(nn.Linear, model.get_submodule(name)), blocks))
    return model


def bytes_in_blocks(load_plan: LoadPlan) -> int:
    """Return the bytes of the weights of the model that `fill_in_blocks` returns."""
    size = load_plan.dtype.itemsize
    total = load_plan.parameters * size
    for link in filter(partial(_stays_packed, load_plan), load_plan.links):
        for name, rows in zip(link.theirs, link.rows, strict=True):
            form = FORMATS[load_plan.source.stored[name].format]
            numbers = rows * math.prod(link.shape[1:])
            total += numbers // form.numbers * form.bytes - numbers * size
    return total


def _stays_packed(load_plan: LoadPlan, link: Link) -> bool:
    """Return whether a parameter is the matrix of a linear layer whose blocks have known types."""
    name, _, leaf = link.ours.rpartition(".")
    changed = link.transposed or link.offset or link.arrangement is not None
    plain = changed or leaf != "weight" or load_plan.source.blocks is None
    formats_known = {load_plan.source.stored[theirs].format for theirs in link.theirs} <= FORMATS.keys()
    return not plain and formats_known and type(load_plan.model.get_submodule(name)) in (Linear, JoinedLinear)


def _stored(load_plan: LoadPlan, link: Link, number: int, device: torch.device) -> tuple[str, Tensor]:
    """Return the type and the blocks of the file's tensor `number` of a link."""
    source, name = load_plan.source, link.theirs[number]
    format, blocks = source.stored[name].format, source.blocks(name) if source.blocks else None
    assert blocks is not None
    part = link.part(number, blocks.data).reshape(-1, FORMATS[format].bytes).to(device)
    if not device_choice().allow_nonfinite:
        read_finite(lambda _: unpack(part, format, load_plan.dtype_of(link)), source.path, name)
    return format, part


def pack_or_keep(model: nn.Module, weights: str) -> nn.Module:
    """Pack a model that is already built. If the native code cannot compute it, print the reason and return the
    model."""
    try:
        if isinstance(model, EncoderDecoder | SpeechRecognizer):
            attach_native(model, weights, NativeTranslator if isinstance(model, EncoderDecoder) else NativeSpeech)
            return model
        return pack(model, weights)
    except Unavailable as reason:
        say_why(str(reason))
        return model


class FileWeights(Weights):
    """The parameters of a planned model, read from its file."""

    def __init__(self, load_plan: LoadPlan):
        self._source = load_plan.source
        self._links = {link.ours: link for link in load_plan.links}
        # the last converted tensor of the file, while its rows are requested
        self._part: tuple[Any, Tensor] = None, torch.empty(0)
        self._read: list[tuple[int, int]] = []  # addresses and sizes of memory that was read and not released

    def rows(self, name: str, first: int, rows: int) -> Float[Tensor, "rows columns"]:
        """Read some rows of a matrix, in the file's type."""
        link = self._links[name]
        parts = [self._piece(link, *piece, self._source.read) for piece in link.pieces(first, first + rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def blocks(self, name: str, first: int, rows: int) -> Blocks | None:
        """Return the same rows as blocks of a GGUF file; None if the file stores plain numbers."""
        link, pieces = self._links[name], self._links[name].pieces(first, first + rows)
        stored = self._source.blocks(link.theirs[pieces[0][0]]) if self._source.blocks and len(pieces) == 1 else None
        if stored is None or link.transposed:
            return None
        return Blocks(stored.kind, self._piece(link, *pieces[0], lambda _: stored.data, stored.kind))

    def _piece(
        self, link: Link, number: int, rows: slice, read: Callable[[str], Tensor], ggml_type: int | None = None
    ) -> Tensor:
        """Return rows of our tensor that their tensor `number` makes. ggml_type: type of its blocks, if it is read as
        blocks."""
        key = link.theirs[number], ggml_type
        if self._part[0] != key:
            stored = read(key[0])
            self._part = key, link.part(number, stored)
            if self._part[1].data_ptr() != stored.data_ptr():
                self._remember(stored)
        piece = self._part[1][rows]
        self._remember(piece)
        return piece

    def numbers(self, name: str) -> Tensor:
        """Return a whole parameter from the file."""
        link = self._links[name]
        return link.join([link.subtract_offset(self._source.read(theirs)) for theirs in link.theirs])

    def release(self) -> None:
        """Release memory that can be read from the file again."""
        if sys.platform != "linux" or sum(size for _, size in self._read) < ENOUGH:
            return
        mapped = _mapped_files()
        for address, size in self._read:
            start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if any(low <= start < end <= high for low, high in mapped):
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED)
        self._read.clear()

    def _remember(self, tensor: Tensor) -> None:
        self._read.append((tensor.data_ptr(), tensor.nbytes))


def _mapped_files() -> list[tuple[int, int]]:
    """Return the first and the last address of each file mapped into the memory of this process."""
    lines = [line.split() for line in MAPS.read_text().splitlines()]
    ranges = [words[0].split("-") for words in lines if words[4] != "0"]
    return [(int(low, 16), int(high, 16)) for low, high in ranges]

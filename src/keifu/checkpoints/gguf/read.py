"""Reading GGUF files: metadata and tensors from a memory map, and the model that they describe.

The gguf package's reader makes two arrays for each string of the vocabulary, which takes seconds. This one reads the
same header in a tenth of a second, and reports the wrong size of a truncated file.

Axes: blocks = groups of numbers that share a scale; bytes of a stored block, or the numbers in it.
"""

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from keifu.checkpoints.gguf.config import DIVISORS, read_config, rotary_head_dim
from keifu.checkpoints.hf.native_config import check_types
from keifu.checkpoints.plan import PLAIN, Source, StoredTensor, is_stack
from keifu.checkpoints.registry import describe
from keifu.errors import UserError
from keifu.layers.quantized import FORMATS, IN_CACHE, Numbers, Stored, unpack
from keifu.native.pack import Blocks
from keifu.untrusted import plain_file, reading

# GGUF's numbers of value types → format letters of Python's struct
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAGIC = b"GGUF"
LARGEST_ALIGNMENT = 2**20


class TensorEntry(NamedTuple):
    """Position of a tensor in a file. shape: rows first, as in PyTorch. format: GGUF's name of the number type."""

    shape: tuple[int, ...]
    format: str
    start: int
    size: int


@dataclass(frozen=True)
class GGUFFile:
    """An open file: `fields` is its metadata as plain values; `entries` has its tensors' positions."""

    path: Path
    bytes: np.memmap
    fields: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]

    def stored(self) -> dict[str, StoredTensor]:
        """Describe every tensor. Quantised types are read as float32; a type that cannot be read has dtype None."""
        types = {format: _read_array(format) for format in {entry.format for entry in self.entries.values()}}
        return {name: StoredTensor(at.shape, at.format, types[at.format]) for name, at in self.entries.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor's numbers: memory-mapped if the type is one of PyTorch's, otherwise dequantised to
        float32."""
        entry = self.entries[name]
        raw = self.bytes[entry.start : entry.start + entry.size]
        if entry.format in PLAIN:
            return torch.from_numpy(raw).view(PLAIN[entry.format]).view(entry.shape)
        block, size = _block(entry.format)
        return read_blocks(torch.from_numpy(raw).view(-1, size), entry.format, block).view(entry.shape)

    def blocks(self, name: str) -> Blocks | None:
        """Return the stored bytes of a quantised tensor, (rows, bytes); None for a plain one."""
        from gguf import GGMLQuantizationType

        entry = self.entries[name]
        raw = torch.from_numpy(self.bytes[entry.start : entry.start + entry.size])
        format = GGMLQuantizationType[entry.format].value
        return None if entry.format in PLAIN else Blocks(format, raw.view(entry.shape[0], -1))


def read_blocks(stored: Stored, format: str, size: int) -> Numbers:
    """Return the numbers of blocks of this type as float32: (blocks, size).

    PyTorch dequantises the commonest types on several threads (`layers/quantized.py`), and the gguf package all others.
    Both give the gguf package's numbers bit for bit.
    """
    if format in FORMATS:
        return unpack(stored, format)
    from gguf import GGMLQuantizationType, dequantize

    numbers = torch.empty(len(stored), size, dtype=torch.float32, device="cpu")
    step = max(1, IN_CACHE // size)
    for start in range(0, len(stored), step):
        some = dequantize(stored[start : start + step].numpy(), GGMLQuantizationType[format])
        numbers[start : start + step] = torch.from_numpy(some)
    return numbers


def _block(format: str) -> tuple[int, int]:
    """Return how many numbers, and how many bytes, a block of this type has."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[format]]


def _read_array(format: str) -> torch.dtype | None:
    """Return the dtype in which a GGUF type is read; None if the gguf package cannot read it."""
    if format in PLAIN:
        return PLAIN[format]
    if format in FORMATS:
        return torch.float32
    from gguf import GGMLQuantizationType, dequantize

    try:
        dequantize(np.zeros((1, _block(format)[1]), np.uint8), GGMLQuantizationType[format])
    except NotImplementedError:
        return None
    return torch.float32


class _Cursor:
    """Reader of consecutive values. Raises UserError with the file's size at the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def number(self, letter: str) -> Any:
        return self.numbers(letter, 1)[0]

    def numbers(self, letter: str, count: int) -> tuple[Any, ...]:
        return struct.unpack_from(f"<{count}{letter}", self.data, self.advance(count * struct.calcsize(letter)))

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Return `count` strings. It is written for speed: a vocabulary has tens of thousands of them."""
        strings, at, data, size = list[str](), self.at, self.data, len(self.data)
        for _ in range(count):
            start = at + 8
            at = start + int.from_bytes(data[start - 8 : start], "little")
            if start > size or at > size:
                raise truncated_error(self.path, max(start, at), size)
            try:
                strings.append(data[start:at].decode())
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path} is corrupt: the string at byte {start:,} is not UTF-8.") from error
        self.at = at
        return strings

    def value(self, code: int) -> Any:
        if code == STRING:
            return self.string()
        if code != ARRAY:
            return self.number(self.letter(code))
        inner, count = self.number("I"), self.number("Q")
        if inner == STRING:
            return self.strings(self.counted(count))
        if inner == ARRAY:
            raise UserError(f"{self.path} has lists of lists among its fields, which no model needs.")
        return list(self.numbers(self.letter(inner), count))

    def letter(self, code: int) -> str:
        if code not in SCALARS:
            raise UserError(f"{self.path} is corrupt: it gives a value the type {code}, which GGUF does not have.")
        return SCALARS[code]

    def counted(self, count: int) -> int:
        """Return a count of items of at least eight bytes each. Raises UserError if they do not fit into the file."""
        if self.at + 8 * count > len(self.data):
            self.advance(8 * count)
        return count

    def advance(self, size: int) -> int:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise truncated_error(self.path, self.at, len(self.data))
        return start


def is_gguf(path: Path) -> bool:
    """Return whether a file begins like a GGUF file, whatever its name."""
    with plain_file(path).open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def truncated_error(path: Path, needed_bytes: int, size: int) -> UserError:
    """Return the error for a file that is too short."""
    return UserError(f"{path} is truncated or corrupt: it has {size:,} bytes and would need at least {needed_bytes:,}.")


def open_file(path: Path) -> GGUFFile:
    """Read a GGUF file's header. Raises UserError for another kind of file, an unknown version or a truncated file."""
    size = plain_file(path).stat().st_size
    if not is_gguf(path):
        raise UserError(f"{path} is no GGUF file: it does not begin with the letters GGUF.")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data)
    cursor.advance(len(MAGIC))
    version = cursor.number("I")
    if version not in (2, 3):
        raise UserError(f"{path} is GGUF of version {version}; keifu reads 2 and 3 with little-endian numbers.")
    n_tensors, n_fields = cursor.counted(cursor.number("Q")), cursor.counted(cursor.number("Q"))
    fields = {cursor.string(): cursor.value(cursor.number("I")) for _ in range(n_fields)}
    infos = [_info(cursor) for _ in range(n_tensors)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= LARGEST_ALIGNMENT:
        raise UserError(f"{path} is corrupt: its general.alignment is {alignment!r}, and it must be a number of bytes.")
    start = -(-cursor.at // alignment) * alignment
    entries = {name: _entry(path, name, shape, code, start + offset) for name, shape, code, offset in infos}
    if len(entries) < n_tensors or len(fields) < n_fields:
        raise UserError(f"{path} is corrupt: a name occurs twice.")
    _check_entries(path, entries, start, size, alignment)
    return GGUFFile(path, np.memmap(path, mode="c"), fields, entries)


def _check_entries(path: Path, entries: Mapping[str, TensorEntry], start: int, size: int, alignment: int) -> None:
    """Raise UserError unless the tensors fill the file without gaps: otherwise bytes are missing or extra, and later
    tensors would be shifted."""
    end = max((one.start + one.size for one in entries.values()), default=start)
    if end > size:
        raise truncated_error(path, end, size)
    expected = start
    for name, one in sorted(entries.items(), key=lambda entry: entry[1].start):
        if one.start != expected:
            raise UserError(f"{path} is corrupt: {name} begins at byte {one.start:,} instead of {expected:,}.")
        expected = -(-(one.start + one.size) // alignment) * alignment
    if size != expected:
        raise UserError(f"{path} is corrupt: it has {size:,} bytes, and its tensors end, filled up, at {expected:,}.")


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, rank = cursor.string(), cursor.number("I")
    return name, cursor.numbers("Q", rank)[::-1], cursor.number("I"), cursor.number("Q")


def _entry(path: Path, name: str, shape: tuple[int, ...], code: int, start: int) -> TensorEntry:
    from gguf import GGMLQuantizationType

    try:
        type_name = GGMLQuantizationType(code).name
    except ValueError:
        unknown_format = f"the number format {code}, which the gguf package does not know"
        raise UserError(f"{path} stores {name} in {unknown_format}.") from None
    block, size = _block(type_name)
    if not shape or shape[-1] % block:
        raise UserError(f"{path} stores {name} {list(shape)} as {type_name}, whose rows come in blocks of {block}.")
    return TensorEntry(shape, type_name, start, math.prod(shape) * size // block)


def open_gguf(path: Path) -> Source:
    """Open the model in a GGUF file. Its weights are memory-mapped and not yet read."""
    file = open_file(path)
    parts = file.fields.get("split.count", 1)
    if type(parts) is not int or parts > 1:
        raise UserError(f"{path} is one of {parts!r} parts; join them first with llama.cpp's llama-gguf-split --merge.")
    file = replace(file, entries=dict(_unstack(file.entries)))
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    divisors = {name: file.read(name) for name in DIVISORS if name in shapes}
    architecture, config = read_config(file.fields, shapes, divisors, str(path))
    check_types(config, str(path))
    family, _ = describe(config)
    stored = {key: tensor for key, tensor in file.stored().items() if key not in divisors}
    model_name = file.fields.get("general.name")
    notes = (f"The file calls itself {model_name!r}.",) if model_name else ()
    notes += tuple(f"{name} gives the rotary scaling." for name in divisors)
    return Source(
        path, "GGUF", family, config, stored, file.read, partial(_read_tokenizer, file.fields), architecture.names,
        rotary_head_dim(architecture, config), notes, file.blocks, arrangements=architecture.arrangements(vars(config)),
    )  # fmt: skip


def _unstack(entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the tensors of a file, with stacked experts split into single ones: blk.0.ffn_up_exps.3.weight."""
    for name, entry in entries.items():
        stack, _, leaf = name.rpartition(".")
        axes = 2 if leaf == "bias" else 3
        if not stack.endswith("_exps") or len(entry.shape) != axes or not is_stack(entry.shape):
            yield name, entry
            continue
        experts, *shape = entry.shape
        size = entry.size // max(1, experts)
        for number in range(experts):
            yield f"{stack}.{number}.{leaf}", TensorEntry((*shape,), entry.format, entry.start + number * size, size)


def _read_tokenizer(fields: Mapping[str, Any]) -> Any:
    from keifu.data.tokenizers.gguf import READ_FIELDS, gguf_tokenizer

    with reading("The vocabulary of the GGUF file"):
        return gguf_tokenizer({key: value for key, value in fields.items() if key.startswith(READ_FIELDS)})

"""Encoder-decoders computed natively: targets that grow together by the decoder's native step.

A translator's encoder runs in PyTorch. That of a model that hears runs natively too, after its convolutions; in float32
PyTorch's is faster.

A target's keys and values lie in blocks; what targets have in common they share, and a block is copied where two of
them go on from it. Axes: sources, positions = of a source, rows = targets, length = new tokens of each, dim, vocab.
"""

import ctypes
from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any, TypeVar
from weakref import finalize

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.layers.transformer.encoder_decoder import EncoderDecoder, Source, SourceMask, read_source
from keifu.layers.transformer.speech import Features, Memory, SpeechRecognizer, check_window
from keifu.native import library as native
from keifu.native.build import Unavailable
from keifu.native.describe import MEMORY, describe, describe_listener
from keifu.native.model import BLOCK_SIZE, MOST_TOKENS, NativeLM, at
from keifu.native.pack import Weights

Read = TypeVar("Read", bound=nn.Module)


class Reader(nn.Module):
    """What reads the sources of a translator, in float32: their keys and values, a pair for each block of the decoder,
    do not depend on what they are read with."""

    def __init__(self, model: EncoderDecoder):
        super().__init__()
        self.embedding, self.positions, self.scale = model.source_table, model.positions, model.scale
        self.encoder = model.encoder
        self.cross_attention = nn.ModuleList(block.get_submodule("cross_attention") for block in model.decoder)

    @torch.inference_mode()
    def forward(self, source: Source, source_mask: SourceMask | None) -> list[tuple[Tensor, Tensor]]:
        x = self.embedding(source) * self.scale
        x = x + self.positions(0, source.shape[1], x)
        return read_source(x, source_mask, self.encoder, self.cross_attention)


class NativeTranslator(NativeLM):
    """A translator whose decoder is packed; `read` is its encoder."""

    def __init__(self, model: EncoderDecoder, weights: str):
        super().__init__(describe(model), Weights(model), weights, model.config)
        self.read = _in_float32(Reader(model))


def pack_translator(model: nn.Module, weights: str) -> NativeTranslator:
    """Pack an encoder-decoder as `pack` does; its other weights stay as they are."""
    if not isinstance(model, EncoderDecoder):
        raise Unavailable(f"the model is a {type(model).__name__}, which native code does not have")
    return NativeTranslator(model, weights)


def _in_float32(module: Read) -> Read:
    """Return the same module if it is in float32, else a copy that is."""
    if {each.dtype for each in module.parameters()} == {torch.float32}:
        return module
    return deepcopy(module).float().eval()


def _joined(memory: Memory, dtype: torch.dtype) -> Memory:
    """Return keys and values [sources, positions, heads · head_dim], of those by heads."""
    joined = [[each.transpose(1, 2).flatten(2).to(dtype).contiguous() for each in pair] for pair in memory]
    return [(keys, values) for keys, values in joined]


class MemoryWeights(Weights):
    """The parameters of a model that hears, and the keys and values of all blocks of its decoder in one matrix."""

    def __init__(self, model: SpeechRecognizer):
        super().__init__(model)
        joined = [block.get_submodule("cross_attention.kv") for block in model.decoder]
        weight = torch.cat([each.get_parameter("matrix.weight").detach() for each in joined])
        values = [each.get_parameter("biases.v").detach() for each in joined]
        bias = torch.cat([part for each in values for part in (torch.zeros_like(each), each)])
        self._parameters = {**self._parameters, **dict(zip(MEMORY, (weight, bias), strict=True))}


class NativeSpeech(NativeLM):
    """A model that hears whose decoder is packed; `listener` is its encoder after the convolutions, but for f32."""

    def __init__(self, model: SpeechRecognizer, weights: str):
        super().__init__(describe(model), Weights(model), weights, model.config)
        self.read: Any = _in_float32(copy(model))  # not itself, since it will hold this: both would stay in memory
        vars(self.read).pop("native", None)
        self.listener: NativeLM | None = None
        if weights != "f32":
            self.listener = NativeLM(describe_listener(model), MemoryWeights(model), weights, model.config)
            self.read = _in_float32(model.stem)

    @torch.inference_mode()
    def encode(self, features: Features) -> Memory:
        """Return keys and values [windows, positions, dim] of windows of sound, for each block of the decoder."""
        if self.listener is None:
            return _joined(self.read.encode(features), self.cache_dtype)
        about = self.listener.description
        check_window(features, about.context_length)
        x = torch.cat([self.read(each[None])[0] for each in features])  # one by one: the same bits in any batch
        windows, width = len(features), -(-about.context_length // BLOCK_SIZE)
        tables = np.arange(windows * width, dtype=np.int32).reshape(windows, width)
        places, sources = np.arange(len(x), dtype=np.int32), np.arange(windows, dtype=np.int32)
        positions, rows = np.tile(places[: about.context_length], windows), sources.repeat(about.context_length)
        lengths = np.full_like(sources, about.context_length)
        both = torch.empty(windows, about.context_length, about.vocab_size, dtype=torch.float32, device="cpu")
        batch = native.Batch(
            len(x), None, at(positions), at(rows), *tables.shape, at(tables), *tables.shape, at(tables), at(lengths),
            at(sources), len(x), at(places), both.data_ptr(), x.data_ptr(),
        )  # fmt: skip
        call = self.library.call
        handle = call("create", ctypes.byref(about), tables.size, BLOCK_SIZE, len(x))
        try:
            call("forward", handle, ctypes.byref(batch))
        finally:
            self.library.destroy(handle)
        parts = both.to(self.cache_dtype).split(about.dim, -1)
        return [(keys.contiguous(), values.contiguous()) for keys, values in zip(parts[::2], parts[1::2], strict=True)]


def pack_speech(model: nn.Module, weights: str) -> NativeSpeech:
    """Pack a model that hears, as `pack` does others."""
    if not isinstance(model, SpeechRecognizer):
        raise Unavailable(f"the model is a {type(model).__name__}, which native code does not have")
    return NativeSpeech(model, weights)


class Targets:
    """Targets of sources that were read.

    memory: keys and values [sources, positions, heads · head_dim] for each block, in the type of the cache. lengths:
    positions of each source. longest: the most tokens of a target. rows: the most targets at a time.
    """

    def __init__(self, model: NativeLM, memory: Memory, lengths: Sequence[int], longest: int, rows: int):
        self.model, self.length = model, 0
        self.lengths = np.array(lengths, np.int32)
        n_sources, width = len(lengths), -(-max(lengths) // BLOCK_SIZE)
        self.sources = np.arange(n_sources, dtype=np.int32)  # of each row
        self.source_tables = np.arange(n_sources * width, dtype=np.int32).reshape(n_sources, width)
        self.tables = np.zeros((n_sources, -(-longest // BLOCK_SIZE)), np.int32)
        self.n_blocks = self.source_tables.size + rows * self.tables.shape[1]
        described, self.most = ctypes.byref(model.description), max(longest, min(rows, MOST_TOKENS))
        self._handle = model.library.call("create", described, self.n_blocks, BLOCK_SIZE, self.most)
        finalize(self, model.library.destroy, self._handle).atexit = False  # as a runner's
        for layer, (keys, values) in enumerate(memory):
            for place, length in enumerate(lengths):
                source = keys[place].data_ptr(), values[place].data_ptr()
                self._call("store_source", layer, *source, length, at(self.source_tables[place]))
        self._logits = torch.empty(rows, model.description.vocab_size, dtype=torch.float32, device="cpu")

    def write(self, tokens: Int[Tensor, "rows length"], wanted: Sequence[int]) -> Float[Tensor, "rows wanted vocab"]:
        """Return logits after the wanted ones of these tokens, in memory that the next step may write over."""
        ids = np.ascontiguousarray(tokens.numpy(), np.int32)
        rows, length = ids.shape
        first, end = -(-self.length // BLOCK_SIZE), -(-(self.length + length) // BLOCK_SIZE)
        free = self._free(self.tables[:, :first])[: rows * (end - first)]
        self.tables[:, first:end] = free.reshape(rows, end - first)
        enough = rows * len(wanted) <= len(self._logits)
        logits = self._logits if enough else torch.empty(rows * len(wanted), self._logits.shape[1])
        logits = logits[: rows * len(wanted)].view(rows, len(wanted), -1)
        step = self.most // length
        for row in range(0, rows, step):
            piece = slice(row, row + step)
            self._forward(ids[piece], self.tables[piece], self.sources[piece], wanted, logits[piece])
        self.length += length
        return logits

    def next(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Return logits of the token after these, in memory that the next step writes over."""
        return self.write(tokens[:, None], [0])[:, 0]

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Continue with these rows. The first that continues a row takes its last block, and each other one a copy."""
        kept = rows.numpy()
        self.sources, tables = self.sources[kept], self.tables[kept]
        column, offset = divmod(self.length, BLOCK_SIZE)
        if offset:
            last = tables[:, column].copy()
            others = np.setdiff1d(np.arange(len(kept)), np.unique(last, return_index=True)[1])
            for row, block in zip(others, self._free(tables[:, : column + 1]), strict=False):
                self._call("copy_block", int(last[row]), int(block))
                tables[row, column] = block
        self.tables = tables

    def _free(self, held: np.ndarray) -> np.ndarray:
        """Return the blocks that no source and none of these rows hold."""
        free = np.ones(self.n_blocks, bool)
        free[: self.source_tables.size] = False
        free[held] = False
        return np.flatnonzero(free)

    def _forward(
        self, tokens: np.ndarray, tables: np.ndarray, sources: np.ndarray, wanted: Sequence[int], logits: Tensor
    ) -> None:
        rows, length = tokens.shape
        places, tables = np.arange(rows * length, dtype=np.int32).reshape(rows, length), np.ascontiguousarray(tables)
        positions, owners = self.length + places % length, places // length
        asked, sources = np.ascontiguousarray(places[:, list(wanted)]), np.ascontiguousarray(sources)
        batch = native.Batch(
            tokens.size, at(tokens), at(positions), at(owners), *tables.shape, at(tables),
            *self.source_tables.shape, at(self.source_tables), at(self.lengths), at(sources),
            asked.size, at(asked), logits.data_ptr(),
        )  # fmt: skip
        self._call("forward", ctypes.byref(batch))

    def _call(self, name: str, *arguments: object) -> None:
        self.model.library.call(name, self._handle, *arguments)


class NativeTargets(Targets):
    """The `BeamModel` of a packed translator.

    source, source_mask: the sources, padded, True on real tokens. lengths: tokens of each.
    """

    def __init__(
        self, model: NativeTranslator, source: Source, source_mask: SourceMask | None, lengths: Sequence[int],
        longest: int, rows: int,
    ):  # fmt: skip
        memory = _joined(model.read(source, source_mask), model.cache_dtype)
        super().__init__(model, memory, lengths, longest, rows)

    def first(self) -> Float[Tensor, "sources vocab"]:
        """Return logits of the first token of each source's target."""
        return self.next(torch.full((len(self.sources),), self.model.config.start_id, device="cpu"))


class NativeHearer:
    """A packed model that hears, with the calls of `SpeechRecognizer`. rows: the most transcripts at a time."""

    def __init__(self, model: NativeSpeech, rows: int):
        self.config, self.encode, self._model, self._rows = model.config, model.encode, model, rows

    def begin(self, memory: Memory, capacity: int) -> Targets:
        """Return the state of a transcript that begins, of a single window."""
        return Targets(self._model, memory, [memory[0][0].shape[1]], capacity, self._rows)

    def write(
        self, tokens: Int[Tensor, "rows length"], state: Targets, wanted: Sequence[int]
    ) -> Float[Tensor, "rows wanted vocab"]:
        """Return logits after the wanted ones of new tokens."""
        return state.write(tokens, wanted)

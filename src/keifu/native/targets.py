"""Encoder-decoders computed natively: all targets of a batch are decoded together by the native code.

A translator's encoder runs in PyTorch. A speech model's encoder also runs natively, after its convolutions, except in
float32, where PyTorch's is faster.

The keys and values of a target are stored in blocks. Targets share the blocks of a common prefix; a partly filled block
is copied when two targets continue from it. Axes: sources, positions = of a source, rows = targets, length = new tokens
of each, dim, vocab.
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
from keifu.native.describe import MEMORY, describe, describe_speech_encoder, known_layer
from keifu.native.model import BLOCK_SIZE, MOST_TOKENS, NativeLM, at
from keifu.native.pack import Weights

Read = TypeVar("Read", bound=nn.Module)


class Reader(nn.Module):
    """The encoder of a translator, in float32. It returns the cross-attention's keys and values for each
    decoder block."""

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

    def __init__(self, model: nn.Module, weights: str):
        """Pack the decoder of an encoder-decoder (see `pack`). Its other weights do not change."""
        translator = known_layer(model, "", EncoderDecoder)
        super().__init__(describe(model), Weights(model), weights, model.config)
        self.read = _in_float32(Reader(translator))

    def encode(self, source: Source, source_mask: SourceMask | None) -> Memory:
        """Return the keys and values (sources, positions, dim) of padded sources for each decoder block. The mask is
        True on real tokens."""
        return _joined(self.read(source, source_mask), self.cache_dtype)


def _in_float32(module: Read) -> Read:
    """Return the module itself if it is in float32, otherwise a float32 copy."""
    if {p.dtype for p in module.parameters()} == {torch.float32}:
        return module
    return deepcopy(module).float().eval()


def _joined(memory: Memory, dtype: torch.dtype) -> Memory:
    """Join the heads of keys and values: (sources, heads, positions, head_dim) → (sources, positions, heads ·
    head_dim).
    """
    joined = [[x.transpose(1, 2).flatten(2).to(dtype).contiguous() for x in pair] for pair in memory]
    return [(keys, values) for keys, values in joined]


class MemoryWeights(Weights):
    """The parameters of a speech model, and one more matrix that computes the keys and values of all its decoder
    blocks.
    """

    def __init__(self, model: SpeechRecognizer):
        super().__init__(model)
        joined = [block.get_submodule("cross_attention.kv") for block in model.decoder]
        weight = torch.cat([layer.get_parameter("matrix.weight").detach() for layer in joined])
        values = [layer.get_parameter("biases.v").detach() for layer in joined]
        bias = torch.cat([part for v in values for part in (torch.zeros_like(v), v)])
        self._parameters = {**self._parameters, **dict(zip(MEMORY, (weight, bias), strict=True))}


class NativeSpeech(NativeLM):
    """A speech model whose decoder is packed. listener: its packed encoder after the convolutions; None for f32."""

    def __init__(self, module: nn.Module, weights: str):
        """Pack a speech model (see `pack`)."""
        model = known_layer(module, "", SpeechRecognizer)
        super().__init__(describe(model), Weights(model), weights, model.config)
        # a copy: this object will be an attribute of the model, and a cycle would keep both in memory
        self.read: Any = _in_float32(copy(model))
        vars(self.read).pop("native", None)
        self.listener: NativeLM | None = None
        if weights != "f32":
            self.listener = NativeLM(describe_speech_encoder(model), MemoryWeights(model), weights, model.config)
            self.read = _in_float32(model.stem)

    @torch.inference_mode()
    def encode(self, features: Features) -> Memory:
        """Return the keys and values (windows, positions, dim) of windows of sound, for each decoder block."""
        if self.listener is None:
            return _joined(self.read.encode(features), self.cache_dtype)
        about = self.listener.description
        check_window(features, about.context_length)
        # one by one, so that results do not depend on the batch
        x = torch.cat([self.read(window[None])[0] for window in features])
        windows, width = len(features), -(-about.context_length // BLOCK_SIZE)
        tables = np.arange(windows * width, dtype=np.int32).reshape(windows, width)
        indices, sources = np.arange(len(x), dtype=np.int32), np.arange(windows, dtype=np.int32)
        positions, rows = np.tile(indices[: about.context_length], windows), sources.repeat(about.context_length)
        lengths = np.full_like(sources, about.context_length)
        both = torch.empty(windows, about.context_length, about.vocab_size, dtype=torch.float32, device="cpu")
        batch = native.Batch(
            len(x), None, at(positions), at(rows), *tables.shape, at(tables), *tables.shape, at(tables), at(lengths),
            at(sources), len(x), at(indices), both.data_ptr(), x.data_ptr(),
        )  # fmt: skip
        call = self.library.call
        handle = call("create", ctypes.byref(about), tables.size, BLOCK_SIZE, len(x))
        try:
            call("forward", handle, ctypes.byref(batch))
        finally:
            self.library.destroy(handle)
        parts = both.to(self.cache_dtype).split(about.dim, -1)
        return [(keys.contiguous(), values.contiguous()) for keys, values in zip(parts[::2], parts[1::2], strict=True)]


class Targets:
    """Decoding state of targets, one or more for each encoded source. It is the `BeamModel` of a packed translator.

    memory: keys and values (sources, positions, heads · head_dim) for each block, in the cache's dtype. lengths:
    positions of each source. longest: the most tokens of a target. rows: the most targets at a time.
    """

    def __init__(self, model: NativeLM, memory: Memory, lengths: Sequence[int], longest: int, rows: int):
        self.model, self.length = model, 0
        self.lengths = np.array(lengths, np.int32)
        n_sources, width = len(lengths), -(-max(lengths) // BLOCK_SIZE)
        self.sources = np.arange(n_sources, dtype=np.int32)  # the source of each row
        self.source_tables = np.arange(n_sources * width, dtype=np.int32).reshape(n_sources, width)
        self.tables = np.zeros((n_sources, -(-longest // BLOCK_SIZE)), np.int32)
        self.n_blocks = self.source_tables.size + rows * self.tables.shape[1]
        described, self.most = ctypes.byref(model.description), max(longest, min(rows, MOST_TOKENS))
        self._handle = model.library.call("create", described, self.n_blocks, BLOCK_SIZE, self.most)
        finalize(self, model.library.destroy, self._handle).atexit = False  # see NativeRunner
        for layer, (keys, values) in enumerate(memory):
            for row, length in enumerate(lengths):
                source = keys[row].data_ptr(), values[row].data_ptr()
                self._call("store_source", layer, *source, length, at(self.source_tables[row]))
        self._logits = torch.empty(rows, model.description.vocab_size, dtype=torch.float32, device="cpu")

    def write(self, tokens: Int[Tensor, "rows length"], positions: Sequence[int]) -> Float[Tensor, "rows wanted vocab"]:
        """Add tokens to each row and return the logits after the wanted ones. The next call may overwrite the returned
        memory.
        """
        ids = np.ascontiguousarray(tokens.numpy(), np.int32)
        rows, length = ids.shape
        first, end = -(-self.length // BLOCK_SIZE), -(-(self.length + length) // BLOCK_SIZE)
        free = self._free(self.tables[:, :first])[: rows * (end - first)]
        self.tables[:, first:end] = free.reshape(rows, end - first)
        enough = rows * len(positions) <= len(self._logits)
        logits = self._logits if enough else torch.empty(rows * len(positions), self._logits.shape[1])
        logits = logits[: rows * len(positions)].view(rows, len(positions), -1)
        step = self.most // length
        for row in range(0, rows, step):
            piece = slice(row, row + step)
            self._forward(ids[piece], self.tables[piece], self.sources[piece], positions, logits[piece])
        self.length += length
        return logits

    def first(self) -> Float[Tensor, "sources vocab"]:
        """Return the logits of the first token of each source's target."""
        return self.next(torch.full((len(self.sources),), self.model.config.start_id, device="cpu"))

    def next(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Add one token to each row and return the logits after it. The next call may overwrite the returned memory."""
        return self.write(tokens[:, None], [0])[:, 0]

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Continue with these rows: (kept,). The first row that continues a target takes over its last block; other
        rows copy it.
        """
        kept_rows = rows.numpy()
        self.sources, tables = self.sources[kept_rows], self.tables[kept_rows]
        column, offset = divmod(self.length, BLOCK_SIZE)
        if offset:
            last = tables[:, column].copy()
            other_rows = np.setdiff1d(np.arange(len(kept_rows)), np.unique(last, return_index=True)[1])
            for row, block in zip(other_rows, self._free(tables[:, : column + 1]), strict=False):
                self._call("copy_block", int(last[row]), int(block))
                tables[row, column] = block
        self.tables = tables

    def _free(self, used_tables: np.ndarray) -> np.ndarray:
        """Return the numbers of all blocks that neither a source nor the `used_tables` contain."""
        free = np.ones(self.n_blocks, bool)
        free[: self.source_tables.size] = False
        free[used_tables] = False
        return np.flatnonzero(free)

    def _forward(
        self,
        tokens: np.ndarray,
        tables: np.ndarray,
        sources: np.ndarray,
        output_positions: Sequence[int],
        logits: Tensor,
    ) -> None:
        rows, length = tokens.shape
        indices, tables = np.arange(rows * length, dtype=np.int32).reshape(rows, length), np.ascontiguousarray(tables)
        positions, owners = self.length + indices % length, indices // length
        output_indices, sources = (
            np.ascontiguousarray(indices[:, list(output_positions)]),
            np.ascontiguousarray(sources),
        )
        batch = native.Batch(
            tokens.size, at(tokens), at(positions), at(owners), *tables.shape, at(tables),
            *self.source_tables.shape, at(self.source_tables), at(self.lengths), at(sources),
            output_indices.size, at(output_indices), logits.data_ptr(),
        )  # fmt: skip
        self._call("forward", ctypes.byref(batch))

    def _call(self, name: str, *arguments: object) -> None:
        self.model.library.call(name, self._handle, *arguments)


class NativeHearer:
    """A packed speech model with the methods of `SpeechRecognizer`. rows: largest number of transcripts at once."""

    def __init__(self, model: NativeSpeech, rows: int):
        self.config, self.encode, self._model, self._rows = model.config, model.encode, model, rows

    def begin(self, memory: Memory, capacity: int) -> Targets:
        """Return the decoding state of a new transcript of one window."""
        return Targets(self._model, memory, [memory[0][0].shape[1]], capacity, self._rows)

    def write(
        self, tokens: Int[Tensor, "rows length"], state: Targets, positions: Sequence[int]
    ) -> Float[Tensor, "rows wanted vocab"]:
        """Add new tokens to `state` and return the logits after the wanted ones."""
        return state.write(tokens, positions)

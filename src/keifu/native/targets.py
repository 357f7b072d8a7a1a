"""Translators computed natively: the encoder in PyTorch, and targets that grow together by the decoder's native step.

A target's keys and values lie in blocks; what targets have in common they share, and a block is copied where two of
them go on from it. Axes: sources, positions = tokens of a source, rows = targets, dim, vocab.
"""

import ctypes
from collections.abc import Sequence
from copy import deepcopy
from weakref import finalize

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.layers.transformer.encoder_decoder import EncoderDecoder, Source, SourceMask, read_source
from keifu.native import library as native
from keifu.native.build import Unavailable
from keifu.native.describe import describe
from keifu.native.model import BLOCK_SIZE, MOST_TOKENS, NativeLM, at
from keifu.native.pack import Weights


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
        read = Reader(model)
        self.read = read if {p.dtype for p in read.parameters()} == {torch.float32} else deepcopy(read).float().eval()


def pack_translator(model: nn.Module, weights: str) -> NativeTranslator:
    """As `pack`, of an encoder-decoder, whose other weights stay as they are."""
    if not isinstance(model, EncoderDecoder):
        raise Unavailable(f"the model is a {type(model).__name__}, which native code does not have")
    return NativeTranslator(model, weights)


class NativeTargets:
    """The `BeamModel` of a packed translator.

    source, source_mask: the sources, padded, True on real tokens. lengths: tokens of each. longest: the most tokens of
    a target. rows: the most targets at a time.
    """

    def __init__(
        self, model: NativeTranslator, source: Source, source_mask: SourceMask | None, lengths: Sequence[int],
        longest: int, rows: int,
    ):  # fmt: skip
        self.model, self.length = model, 0
        self.lengths = np.array(lengths, np.int32)
        n_sources, width = len(lengths), -(-max(lengths) // BLOCK_SIZE)
        self.sources = np.arange(n_sources, dtype=np.int32)  # of each row
        self.source_tables = np.arange(n_sources * width, dtype=np.int32).reshape(n_sources, width)
        self.tables = np.zeros((n_sources, -(-longest // BLOCK_SIZE)), np.int32)
        self.n_blocks = self.source_tables.size + rows * self.tables.shape[1]
        described = ctypes.byref(model.description)
        self._handle = model.library.call("create", described, self.n_blocks, BLOCK_SIZE, min(rows, MOST_TOKENS))
        finalize(self, model.library.destroy, self._handle).atexit = False  # as a runner's
        for layer, both in enumerate(model.read(source, source_mask)):
            joined = [each.transpose(1, 2).flatten(2).to(model.cache_dtype).contiguous() for each in both]
            for place, length in enumerate(lengths):
                keys, values = (each[place].data_ptr() for each in joined)
                self._call("store_source", layer, keys, values, length, at(self.source_tables[place]))
        self._logits = torch.empty(rows, model.description.vocab_size, dtype=torch.float32, device="cpu")

    def first(self) -> Float[Tensor, "sources vocab"]:
        """Logits of the first token of each source's target."""
        return self.next(torch.full((len(self.sources),), self.model.config.start_id, device="cpu"))

    def next(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocab"]:
        """Logits of the token after these, in memory that the next step writes over."""
        column, offset = divmod(self.length, BLOCK_SIZE)
        if offset == 0:
            self.tables[:, column] = self._free(self.tables[:, :column])[: len(self.tables)]
        ids, logits = tokens.numpy().astype(np.int32), self._logits[: len(tokens)]
        for first in range(0, len(ids), MOST_TOKENS):
            piece = slice(first, first + MOST_TOKENS)
            self._forward(ids[piece], self.tables[piece], self.sources[piece], logits[piece])
        self.length += 1
        return logits

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows. The first that continues a row takes its last block, and each other one a copy."""
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

    def _forward(self, tokens: np.ndarray, tables: np.ndarray, sources: np.ndarray, logits: Tensor) -> None:
        rows, tables = np.arange(len(tokens), dtype=np.int32), np.ascontiguousarray(tables)
        positions, sources = np.full_like(rows, self.length), np.ascontiguousarray(sources)
        batch = native.Batch(
            len(tokens), at(tokens), at(positions), at(rows), *tables.shape, at(tables),
            *self.source_tables.shape, at(self.source_tables), at(self.lengths), at(sources),
            len(rows), at(rows), logits.data_ptr(),
        )  # fmt: skip
        self._call("forward", ctypes.byref(batch))

    def _call(self, name: str, *arguments: object) -> None:
        self.model.library.call(name, self._handle, *arguments)

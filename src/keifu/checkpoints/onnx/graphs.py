"""The parts of a model as graphs: tensors in, tensors out, with the names that optimum and transformers.js know.

A decoder gets its keys and values as tensors and returns them with those of the new tokens. Models with other states
are refused by name. Axes: batch, length = new tokens, seen = tokens before and new ones, heads, head_dim.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers import feedforward, linear, normalisation
from keifu.layers.attention import attention, positions
from keifu.layers.attention.masks import PaddingMask
from keifu.layers.dropout import Dropout
from keifu.layers.transformer import blocks
from keifu.layers.transformer.decoder import DecoderLM, ScaledEmbedding, SoftCappedLM
from keifu.layers.transformer.encoder_decoder import EncoderDecoder
from keifu.layers.unet.conv import DoublingConv2d, grow_kernel
from keifu.models.bert import Bert
from keifu.models.diffusion.ddpm import DDPM

BATCH = "batch_size"  # transformers.js knows this name, and takes 0 for any other length of an empty cache
KNOWN = {  # layers of decoders and translators whose cache is a key and a value for each token
    DecoderLM, SoftCappedLM, EncoderDecoder, ScaledEmbedding, Dropout,
    blocks.PreNorm, blocks.PostNorm, blocks.Parallel, blocks.ReorderedNorm, blocks.SandwichNorm, blocks.CrossPostNorm,
    attention.Attention, attention.CrossAttention, linear.Linear, linear.JoinedLinear,
    feedforward.FeedForward, feedforward.GatedFeedForward,
    normalisation.RMSNorm, normalisation.UnitOffsetRMSNorm, normalisation.FullPrecisionRMSNorm,
    normalisation.AllHeadsRMSNorm, positions.LearnedPositions, positions.SinusoidalPositions, positions.Rotary,
}  # fmt: skip


@dataclass(frozen=True)
class OnnxGraph:
    """A part of a model that becomes one file.

    file: its path in the folder, without the ending. example: returns inputs by name for numbers of rows, of new tokens
    and of tokens before. sizes: for each input its dimensions that may change, BATCH or "" for a length; keys of caches
    are all alike. outputs: names.
    """

    file: str
    module: nn.Module
    example: Callable[[int, int, int], dict[str, Tensor]]
    sizes: Callable[[str], dict[int, str]]
    outputs: tuple[str, ...]


def graphs_of(model: nn.Module) -> list[OnnxGraph]:
    """Return the graphs of a model. Raises `UserError` for one that is not known here."""
    if isinstance(model, Bert):
        return [_bert(model)]
    if isinstance(model, DDPM):
        return [_unet(model)]
    if isinstance(model, (DecoderLM, EncoderDecoder)):
        _check(model)
        return [*_translator(model)] if isinstance(model, EncoderDecoder) else [_decoder(model)]
    raise UserError(
        f"ONNX is written for decoders, translators, BERT and DDPM, and this is a {type(model).__name__}: "
        "write it as hf instead."
    )


def _check(model: nn.Module) -> None:
    """Raise `UserError` for a layer that keeps another state than keys and values, or is not tried."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("keifu.") and type(module) not in KNOWN:
            raise UserError(f"{name or 'The model'} is a {type(module).__name__}, which is not written as ONNX.")
        if isinstance(module, attention.Attention) and (module.window is not None or module.soft_cap):
            kind = "a sliding window" if module.window is not None else "capped scores"
            raise UserError(f"{name} has {kind}, which is not written as ONNX.")
        scaling = module.scaling if isinstance(module, positions.Rotary) else None
        if scaling is not None and scaling.by_length:
            raise UserError(f"{name} has rotary positions that depend on the length, which are not written as ONNX.")


class TensorCache:
    """A layer's cache (`Cache` in layers/attention) out of tensors that the graph is given."""

    def __init__(self, state: "TensorState", index: int):
        self.state, self.index = state, index

    def attend(
        self, q: Tensor, keys: Tensor | None, values: Tensor | None, window: int | None, scoring: attention.Scoring
    ) -> Tensor:
        assert keys is not None and values is not None and window is None
        past_keys, past_values = self.state.past[self.index]
        k, v = torch.cat([past_keys, keys], 2), torch.cat([past_values, values], 2)
        self.state.present += (k, v)
        return attention.attend(q, k, v, self.state.mask, scoring)

    def recur(self, rule: Any, x: Tensor) -> Tensor:
        """Refuse a state of fixed size; `_check` finds such layers first."""
        raise NotImplementedError


class TensorState:
    """The state of earlier tokens (`State` in layers/transformer/decoder.py) out of tensors.

    past: keys and values of each layer, in turn. real: of all seen tokens, 1 for real ones, 0 for padding at the left.
    """

    sequence_lengths = None
    mask: Tensor

    def __init__(self, past: Sequence[Tensor], real: Tensor | None = None):
        self.past, self.real = [*zip(past[::2], past[1::2], strict=True)], real
        self.present: tuple[Tensor, ...] = ()
        self.longest: int = past[0].shape[2]

    def positions(self, length: int, padding: Tensor | None = None) -> Tensor:
        keys = torch.arange(self.longest + length)
        queries = keys[self.longest :, None]
        self.mask = (keys <= queries)[None, None]
        if self.real is None:
            return queries[:, 0]
        real = self.real.bool()
        # padding sees itself: without any key, its state would be NaN and spread
        self.mask = (self.mask & real[:, None, None]) | (keys == queries)[None, None]
        return (real.long().cumsum(1) - 1).clamp(min=0)[:, self.longest :]

    def layer(self, index: int) -> TensorCache:
        return TensorCache(self, index)

    def advance(self) -> None:
        """Do nothing: the graph returns the keys and values."""


class DecoderGraph(nn.Module):
    """Tokens, mask and cache → logits and the new cache."""

    def __init__(self, model: DecoderLM):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        state = TensorState(past, mask)
        return self.model(tokens, state), *state.present


def _cache(shapes: Sequence[attention.CacheShape], infix: str = "") -> tuple[list[str], Callable[[int, int], Any]]:
    """Return the names of the layers' keys and values after their beginning, and a function that makes examples."""
    names = [f"{i}.{infix}{part}" for i in range(len(shapes)) for part in ("key", "value")]
    sizes = [(shape.heads, width) for shape in shapes for width in shape.widths]

    def example(rows: int, before: int) -> dict[str, Tensor]:
        tensors = (torch.randn(rows, heads, before, width) for heads, width in sizes)
        return {f"past_key_values.{name}": tensor for name, tensor in zip(names, tensors, strict=True)}

    return names, example


def _tokens(rows: int, length: int, vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (rows, length))


def _padded(rows: int, length: int, left: bool) -> Tensor:
    """Return the mask of a batch whose second row has padding."""
    mask = torch.ones(rows, length, dtype=torch.long)
    if rows > 1 and length > 2:
        mask[1, slice(0, 2) if left else slice(-2, None)] = 0
    return mask


def _text_sizes(name: str) -> dict[int, str]:
    return {0: BATCH, 2 if name.startswith("past_") else 1: ""}


def _decoder(model: DecoderLM) -> OnnxGraph:
    vocab = model.embedding.num_embeddings
    names, cache = _cache(model.cache_layers)

    def example(rows: int, length: int, before: int) -> dict[str, Tensor]:
        mask = _padded(rows, before + length, left=True)
        return {"input_ids": _tokens(rows, length, vocab), "attention_mask": mask, **cache(rows, before)}

    return OnnxGraph(
        "onnx/model", DecoderGraph(model), example, _text_sizes, ("logits", *(f"present.{name}" for name in names))
    )


class SourceGraph(nn.Module):
    """Source tokens and mask → states of the encoder."""

    def __init__(self, model: EncoderDecoder):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        model, real = self.model, PaddingMask(mask.bool())
        table = model.positions(0, model.positions.context_length, model.source_table.weight)
        x = model.source_table(tokens) * model.scale + table[: tokens.shape[1]]
        for block in model.encoder:
            x = block(x, mask=real)
        return x


class TargetGraph(nn.Module):
    """Target tokens, states of the source and cache → logits and the new cache. The source's keys and values are
    computed at each step, so that one graph serves the first step and all others."""

    def __init__(self, model: EncoderDecoder):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, source: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        model, state, real = self.model, TensorState(past), PaddingMask(mask.bool())
        embedding: Any = model.embedding if model.target_embedding is None else model.target_embedding
        table = model.positions(0, model.positions.context_length, embedding.weight)
        x = embedding(tokens) * model.scale + table[state.positions(tokens.shape[1])]
        blocks: list[Any] = list(model.decoder)
        for i, block in enumerate(blocks):
            memory = block.cross_attention.project(source)
            x = block(x, memory=memory, memory_mask=real, mask=None, cache=state.layer(i))
        return model.logits(x), *state.present


def _translator(model: EncoderDecoder) -> Iterator[OnnxGraph]:
    model.positions(0, 1, model.source_table.weight)  # makes the table before a graph is traced
    blocks: list[Any] = list(model.decoder)
    names, cache = _cache([block.attention.cache_shape for block in blocks], "decoder.")
    vocab, dim = model.source_table.num_embeddings, model.source_table.embedding_dim

    def source(rows: int, length: int, before: int) -> dict[str, Tensor]:
        return {"input_ids": _tokens(rows, length, vocab), "attention_mask": _padded(rows, length, left=False)}

    def target(rows: int, length: int, before: int) -> dict[str, Tensor]:
        states = torch.randn(rows, before + 5, dim)
        mask = _padded(rows, before + 5, left=False)
        tokens = _tokens(rows, length, len(model.head_weight))
        texts = {"input_ids": tokens, "encoder_attention_mask": mask, "encoder_hidden_states": states}
        return texts | cache(rows, before)

    yield OnnxGraph("onnx/encoder_model", SourceGraph(model), source, _text_sizes, ("last_hidden_state",))
    outputs = ("logits", *(f"present.{name}" for name in names))
    yield OnnxGraph("onnx/decoder_model_merged", TargetGraph(model), target, _text_sizes, outputs)


class BertGraph(nn.Module):
    """Tokens, mask and segments → words, labels or states of a BERT."""

    def __init__(self, model: Bert):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
        if self.model.config.labels:
            return self.model.classify(tokens, segments, mask.bool())
        states = self.model.encode(tokens, segments, mask.bool())
        return states if self.model.word_head is None else self.model.words(states)


def _bert(model: Bert) -> OnnxGraph:
    def example(rows: int, length: int, before: int) -> dict[str, Tensor]:
        tokens, mask = _tokens(rows, length + 2, model.config.vocab_size), _padded(rows, length + 2, left=False)
        return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.zeros_like(tokens)}

    states = model.word_head is None and not model.config.labels
    return OnnxGraph(
        "onnx/model", BertGraph(model), example, _text_sizes, ("last_hidden_state" if states else "logits",)
    )


class UNetGraph(nn.Module):
    """Pictures with noise, timesteps and classes (if any) → the prediction."""

    def __init__(self, model: DDPM):
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.model(sample, timestep, labels)


def _unet(model: DDPM) -> OnnxGraph:
    config = model.config
    if config.label != "class":
        raise UserError(f"A U-Net whose label is a {config.label} is not written as ONNX.")
    for module in model.modules():
        if isinstance(module, DoublingConv2d):
            vars(module)["forward"] = partial(_doubled, module)

    def example(rows: int, length: int, before: int) -> dict[str, Tensor]:
        timesteps = torch.randint(0, config.noise.steps, (rows,))
        inputs = {"sample": torch.randn(rows, config.channels, config.size, config.size), "timestep": timesteps}
        classes = config.n_classes + config.null_class
        return inputs | ({"class_labels": torch.randint(0, classes, (rows,))} if classes else {})

    return OnnxGraph("unet/model", UNetGraph(model), example, lambda name: {0: BATCH}, ("out_sample",))


def _doubled(convolution: DoublingConv2d, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Double a picture and convolve it, the plain way: the four kernels are for PyTorch on a CPU."""
    return nn.Conv2d.forward(convolution, grow_kernel(x, size))

"""A causal Transformer, or a stack of an encoder-decoder, as data: its layers and the names of their parameters.

The description depends on the layers, not on the model's class. A layer that the native code does not have raises
`Unavailable` with the layer's name. Axes: rows and columns of a matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keifu.layers import normalisation as norms
from keifu.layers.activations import ACTIVATIONS, Activation
from keifu.layers.attention.attention import (
    Attention,
    CrossAttention,
    JoinedUnbiasedKeys,
    KeysUnbiased,
    KeysUnbiasedCross,
    SinkAttention,
)
from keifu.layers.attention.positions import Rotary
from keifu.layers.feedforward import ClampedFeedForward, FeedForward, GatedFeedForward
from keifu.layers.linear import JoinedLinear, Linear
from keifu.layers.lora import AdaptedLinear
from keifu.layers.mixture import MixtureOfExperts, SoftmaxRouter
from keifu.layers.transformer.blocks import (
    CrossPostNorm,
    CrossPreNorm,
    Parallel,
    PostNorm,
    PreNorm,
    ReorderedNorm,
    SandwichNorm,
)
from keifu.layers.transformer.decoder import DecoderLM, ScaledEmbedding
from keifu.layers.transformer.encoder_decoder import EncoderDecoder
from keifu.layers.transformer.speech import SpeechRecognizer
from keifu.native.compiler import Unavailable


@dataclass(frozen=True)
class MatrixPart:
    """Rows `first`, ..., `first` + `rows` - 1 of the parameter `weight`.

    bias: name of the bias parameter, or None. Its elements from `bias_first` on belong to these rows.
    """

    weight: str
    first: int
    rows: int
    columns: int
    bias: str | None = None
    bias_first: int = 0


@dataclass(frozen=True)
class NormPart:
    """A norm: the names of its parameters (None if it has none). `offset` is added to the weight."""

    kind: int
    eps: float
    weight: str | None
    bias: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class LayerPart:
    """A block: its matrices, norms and numbers, by the names of the native code.

    frequencies: radians per position of each rotary pair. router and experts: the router's matrix, which stays float32,
    and the matrices of each expert of a mixture. sinks: the name of the attention sinks' parameter.
    """

    matrices: Mapping[str, MatrixPart]
    norms: Mapping[str, NormPart]
    numbers: Mapping[str, int | float]
    heads: tuple[int, int, int]  # number of query heads, number of key and value heads, head_dim
    frequencies: Tensor | None
    sinks: str | None = None
    router: MatrixPart | None = None
    experts: tuple[Mapping[str, MatrixPart], ...] = ()


@dataclass(frozen=True)
class ModelPart:
    """A model: embedding, positions, blocks, the final norm and the head.

    positions: the parameter's name if they are learned, or the tensor of fixed ones. source_length: the largest number
    of source positions; 0 without cross-attention.
    """

    embedding: MatrixPart
    embedding_scale: float
    positions: str | Tensor | None
    context_length: int
    layers: tuple[LayerPart, ...]
    norm: NormPart
    head: MatrixPart
    logit_scale: float = 1.0
    source_length: int = 0

    @property
    def matrices(self) -> list[MatrixPart]:
        """Return all matrices but those of routers."""
        parts = [part for layer in self.layers for part in (layer.matrices, *layer.experts)]
        return [self.embedding, self.head, *(matrix for part in parts for matrix in part.values())]


NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2
IDENTITY = NormPart(NO_NORM, 0.0, None)
CLAMPED = 4  # the kind of activation of a ClampedFeedForward
ACTIVATION_KINDS: dict[Activation, int] = {F.silu: 0, ACTIVATIONS["gelu_tanh"]: 1, F.gelu: 2, F.relu: 3}
LIKE = torch.zeros(1, dtype=torch.float32, device="cpu")  # dtype and device of computed numbers
NORMS = {  # module names in a block → names in the native code
    "norm": "attention_norm",
    "cross_attention_norm": "cross_norm",
    "attention.q_norm": "query_norm",
    "attention.k_norm": "key_norm",
}
ALL_HEADS = {"attention.q_norm": "all_queries_norm", "attention.k_norm": "all_keys_norm"}  # for an AllHeadsRMSNorm
REORDERED = {part: f"post_{part}" for part in ("attention_norm", "feedforward_norm")}  # for a ReorderedNorm
RMS_NORMS = norms.RMSNorm, norms.FullPrecisionRMSNorm, norms.UnitOffsetRMSNorm


def describe(model: nn.Module) -> ModelPart:
    """Describe a decoder-only model, or the decoder of an encoder-decoder, as data. The model may be on the meta
    device.

    Raises `Unavailable` for a layer that the native code does not have.
    """
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            raise Unavailable(f"{name} has adapters (LoRA) next to it, which must be merged first")
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unavailable(f"{name or 'the model'} has hooks, which native code does not call")
    if isinstance(model, EncoderDecoder):
        return _describe_decoder(known_layer(model, "", EncoderDecoder))
    if isinstance(model, SpeechRecognizer):
        return _describe_speech_decoder(known_layer(model, "", SpeechRecognizer))
    decoder = known_layer(model, "", DecoderLM)
    table = _matrix(model, "embedding", nn.Embedding, ScaledEmbedding)
    norm = _norm(model, "norm", norms.ScaledLayerNorm)
    head = table if decoder.head is None else _matrix(model, "head")
    scale = decoder.embedding.scale if isinstance(decoder.embedding, ScaledEmbedding) else 1.0
    logit_scale = decoder.norm.scale if isinstance(decoder.norm, norms.ScaledLayerNorm) else 1.0
    name, length = None, decoder.config.context_length
    if decoder.positions is not None:
        name, length = "positions.weight", decoder.positions.num_embeddings
    return ModelPart(table, scale, name, length, _layers(model, "blocks"), norm, head, logit_scale)


def _describe_decoder(model: EncoderDecoder) -> ModelPart:
    table = _matrix(model, "embedding" if model.target_embedding is None else "target_embedding", nn.Embedding)
    head = replace(table if model.head is None else _matrix(model, "head"), bias="logits_bias")
    length, layers = model.positions.context_length, _layers(model, "decoder")
    positions = model.positions(0, length, LIKE)
    return ModelPart(table, model.scale, positions, length, layers, IDENTITY, head, source_length=length)


def _describe_speech_decoder(model: SpeechRecognizer) -> ModelPart:
    table, norm = _matrix(model, "embedding", nn.Embedding), _norm(model, "norm")
    length, heard = model.positions.num_embeddings, len(model.source_positions)
    layers = _layers(model, "decoder")
    return ModelPart(table, 1.0, "positions.weight", length, layers, norm, table, source_length=heard)


MEMORY = "memory.weight", "memory.bias"  # keys and values of all decoder blocks, joined in one matrix


def describe_speech_encoder(model: SpeechRecognizer) -> ModelPart:
    """Describe the encoder of a speech model. Its head computes the keys and values for all decoder blocks.

    Its input is embedded sound, not tokens, so it has no embedding.
    """
    length, dim = model.source_positions.shape
    head = MatrixPart(MEMORY[0], 0, 2 * dim * len(model.decoder), dim, MEMORY[1])
    both = {"bidirectional": True}
    layers = tuple(replace(layer, numbers={**layer.numbers, **both}) for layer in _layers(model, "encoder"))
    norm = _norm(model, "encoder_norm")
    return ModelPart(head, 1.0, "source_positions", length, layers, norm, head, source_length=length)


Kind = TypeVar("Kind", bound=nn.Module)


def known_layer(model: nn.Module, name: str, *kinds: type[Kind]) -> Kind:
    """Return the layer of this name if its class is one of `kinds`. Raises `Unavailable` otherwise, also for
    subclasses, which may differ.
    """
    module = model.get_submodule(name)
    if type(module) not in kinds:
        raise Unavailable(f"{name or 'the model'} is a {type(module).__name__}, which native code does not have")
    return cast(Kind, module)


def _matrix(model: nn.Module, name: str, *kinds: type[nn.Linear | nn.Embedding]) -> MatrixPart:
    """Describe the whole matrix of a layer, whose class is one of `kinds`; default: a linear layer."""
    module = known_layer(model, name, *(kinds or (Linear, JoinedLinear, nn.Linear)))
    rows, columns = module.weight.shape
    bias = module.bias if isinstance(module, nn.Linear) else None
    return MatrixPart(f"{name}.weight", 0, rows, columns, None if bias is None else f"{name}.bias")


def _split(model: nn.Module, name: str, *parts: str) -> dict[str, MatrixPart]:
    """Describe each matrix that is joined in one layer, under the names `parts`."""
    module = known_layer(model, name, JoinedLinear, JoinedUnbiasedKeys)
    if isinstance(module, JoinedUnbiasedKeys):
        biases = {part: f"{name}.biases.{part[0]}" for part in parts if part[0] in module.biases}
        matrix_parts = _split(model, f"{name}.matrix", *parts)
        return {part: replace(matrix, bias=biases.get(part), bias_first=0) for part, matrix in matrix_parts.items()}
    rows, joined_matrix = module.parts, _matrix(model, name)
    matrices = zip(parts, accumulate(rows, initial=0), rows, strict=False)
    return {part: replace(joined_matrix, first=first, rows=count, bias_first=first) for part, first, count in matrices}


def _norm(model: nn.Module, name: str, *norm_types: type[nn.LayerNorm] | type[norms.RMSNorm]) -> NormPart:
    norm = known_layer(model, name, *RMS_NORMS, nn.LayerNorm, nn.Identity, *norm_types)
    if isinstance(norm, nn.Identity):
        return IDENTITY
    weight, bias = (f"{name}.{key}" if key in dict(norm.named_parameters()) else None for key in ("weight", "bias"))
    kind = LAYER_NORM if isinstance(norm, nn.LayerNorm) else RMS_NORM
    return NormPart(kind, norm.eps, weight, bias, 1.0 if isinstance(norm, norms.UnitOffsetRMSNorm) else 0.0)


def _layers(model: nn.Module, name: str) -> tuple[LayerPart, ...]:
    """Describe the list of blocks of this name."""
    return tuple(_layer(model, f"{name}.{number}") for number, _ in model.get_submodule(name).named_children())


def _layer(model: nn.Module, name: str) -> LayerPart:
    blocks = PreNorm, PostNorm, CrossPreNorm, CrossPostNorm, SandwichNorm, ReorderedNorm, Parallel
    block = known_layer(model, name, *blocks)
    attention = known_layer(model, f"{name}.attention", Attention, SinkAttention, KeysUnbiased)
    norm_names = [part for part, _ in block.named_modules(remove_duplicate=False) if part.endswith("norm")]
    norm_parts = dict(_layer_norm(model, name, part) for part in norm_names)
    mixed = isinstance(model.get_submodule(f"{name}.feedforward"), MixtureOfExperts)
    network, router, experts, numbers = (_mixture if mixed else _network)(model, f"{name}.feedforward")
    matrices = _split(model, f"{name}.attention.qkv", "query", "key", "value") | network
    matrices["out"] = _matrix(model, f"{name}.attention.out")
    if isinstance(block, CrossPreNorm | CrossPostNorm):
        matrices |= _cross(model, f"{name}.cross_attention", attention)
    turning, frequencies = ({}, None) if attention.rotary is None else _rotary(model, f"{name}.attention.rotary")
    numbers |= {
        "parallel": isinstance(block, Parallel),
        "norm_after": isinstance(block, PostNorm),
        "window": attention.window or 0,
        "attention_scale": attention.head_dim**-0.5 if attention.scale is None else attention.scale,
    }
    heads = attention.n_heads, attention.n_kv_heads, attention.head_dim
    sinks = f"{name}.attention.sinks" if isinstance(attention, SinkAttention) else None
    return LayerPart(matrices, norm_parts, numbers | turning, heads, frequencies, sinks, router, experts)


Matrices = dict[str, MatrixPart]
Network = tuple[Matrices, MatrixPart | None, tuple[Matrices, ...], dict[str, int | float]]


def _network(model: nn.Module, name: str) -> Network:
    """Return the matrices and numbers of a feed-forward network, with no router and no experts."""
    network = known_layer(model, name, FeedForward, GatedFeedForward, ClampedFeedForward)
    clamped = isinstance(network, ClampedFeedForward)
    if not clamped and network.activation not in ACTIVATION_KINDS:
        raise Unavailable(f"{name} has an activation that native code does not have")
    numbers: dict[str, int | float] = {"activation": CLAMPED if clamped else ACTIVATION_KINDS[network.activation]}
    if clamped:
        numbers |= {"gate_slope": network.slope, "gate_limit": network.limit}
    gated = isinstance(network, GatedFeedForward)
    up = _split(model, f"{name}.gate_up", "gate", "up") if gated else {"up": _matrix(model, f"{name}.up")}
    return up | {"down": _matrix(model, f"{name}.down")}, None, (), numbers


def _mixture(model: nn.Module, name: str) -> Network:
    """Return the router, the experts' matrices and the numbers of a mixture of experts. It has no other matrices."""
    mixture, router = known_layer(model, name, MixtureOfExperts), known_layer(model, f"{name}.router", SoftmaxRouter)
    if mixture.shared is not None:
        raise Unavailable(f"{name} has an expert that every token uses, which native code does not have")
    networks = [_network(model, f"{name}.experts.{number}") for number in range(router.n_experts)]
    numbers = networks[0][-1]
    if any(network[-1] != numbers for network in networks):
        raise Unavailable(f"{name} has experts with different activations")
    numbers |= {"n_experts": router.n_experts, "n_chosen": router.k, "normalised": router.normalised}
    return {}, _matrix(model, f"{name}.router.gate"), tuple(network[0] for network in networks), numbers


def _layer_norm(model: nn.Module, name: str, part: str) -> tuple[str, NormPart]:
    """Return the native code's name of a block's norm, and the norm."""
    norm = model.get_submodule(f"{name}.{part}")
    if part in ALL_HEADS and isinstance(norm, norms.AllHeadsRMSNorm):
        return ALL_HEADS[part], _norm(model, f"{name}.{part}", norms.AllHeadsRMSNorm)
    names = NORMS | (REORDERED if isinstance(model.get_submodule(name), ReorderedNorm) else {})
    return names.get(part, part), _norm(model, f"{name}.{part}")


def _cross(model: nn.Module, name: str, attention: Attention) -> dict[str, MatrixPart]:
    """Describe the queries and the output of a cross-attention. Its keys and values are computed when the source is
    read.
    """
    cross = known_layer(model, name, CrossAttention, KeysUnbiasedCross)
    if (cross.n_heads, attention.scale, attention.window) != (attention.n_kv_heads, None, None):
        raise Unavailable(f"{name} has other heads, or another scale, than the self-attention before it")
    return {"cross_query": _matrix(model, f"{name}.q"), "cross_out": _matrix(model, f"{name}.out")}


def _rotary(model: nn.Module, name: str) -> tuple[dict[str, int | float], Tensor]:
    rotary = known_layer(model, name, Rotary)
    if rotary.scaling and rotary.scaling.by_length:
        raise Unavailable(f"{name} has {rotary.scaling.kind} scaling, whose angles change with the text's length")
    frequencies, magnitude = rotary.frequencies(LIKE), rotary.scaling.magnitude() if rotary.scaling else 1.0
    numbers = {"pairs": len(frequencies), "interleaved": rotary.interleaved, "magnitude": magnitude}
    return {f"rotary_{key}": value for key, value in numbers.items()}, frequencies

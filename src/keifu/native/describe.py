"""A causal Transformer, or a translator's decoder, as data: which layers it is made of, and which parameters they have.

A model is described by its layers, whatever its name is. One that has a layer which the native step does not know is
`Unavailable`, with the layer's name. Axes: rows and columns = of a matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keifu.layers.activations import ACTIVATIONS, Activation
from keifu.layers.attention.attention import Attention, CrossAttention
from keifu.layers.attention.positions import Rotary
from keifu.layers.feedforward import FeedForward, GatedFeedForward
from keifu.layers.linear import JoinedLinear, Linear
from keifu.layers.lora import AdaptedLinear
from keifu.layers.normalisation import RMSNorm, ScaledLayerNorm, UnitOffsetRMSNorm
from keifu.layers.transformer.blocks import CrossPostNorm, Parallel, PostNorm, PreNorm, SandwichNorm
from keifu.layers.transformer.decoder import DecoderLM, ScaledEmbedding
from keifu.layers.transformer.encoder_decoder import EncoderDecoder
from keifu.native.build import Unavailable


@dataclass(frozen=True)
class MatrixPart:
    """Rows `first`, `first` + 1, ... of a parameter; `bias` is the name of the parameter that is added, if any."""

    weight: str
    first: int
    rows: int
    columns: int
    bias: str | None = None


@dataclass(frozen=True)
class NormPart:
    """A norm: the names of its parameters, if it has them; `offset` is added to the weight."""

    kind: int
    eps: float
    weight: str | None
    bias: str | None = None
    offset: float = 0.0


@dataclass(frozen=True)
class RotaryPart:
    """A rotary embedding: radians a position for each pair."""

    frequencies: Tensor
    interleaved: bool
    magnitude: float


@dataclass(frozen=True)
class LayerPart:
    """A block: its matrices and norms by the names of native code, and its numbers."""

    matrices: Mapping[str, MatrixPart]
    norms: Mapping[str, NormPart]
    heads: tuple[int, int, int]  # of queries, of keys and values, and their dimension
    parallel: bool
    norm_after: bool
    activation: int
    window: int
    scale: float
    rotary: RotaryPart | None


@dataclass(frozen=True)
class ModelPart:
    """A model: embedding, positions (the name of their parameter if learned, or their numbers), blocks, the last norm
    and the head."""

    embedding: MatrixPart
    embedding_scale: float
    positions: str | Tensor | None
    context_length: int
    layers: tuple[LayerPart, ...]
    norm: NormPart
    head: MatrixPart
    logit_scale: float


NO_NORM, RMS_NORM, LAYER_NORM = 0, 1, 2
ACTIVATION_KINDS: dict[Activation, int] = {F.silu: 0, ACTIVATIONS["gelu_tanh"]: 1, F.gelu: 2, F.relu: 3}
LIKE = torch.zeros(1, dtype=torch.float32, device="cpu")  # the type and place of numbers that are computed
TWO_NORMS = {"attention_norm": "attention_norm", "feedforward_norm": "feedforward_norm"}
BLOCKS: dict[type, dict[str, str]] = {  # the names that native code has for the norms of a block
    PreNorm: TWO_NORMS,
    PostNorm: TWO_NORMS,
    CrossPostNorm: {**TWO_NORMS, "cross_attention_norm": "cross_norm"},
    SandwichNorm: {
        name: name for name in ("attention_norm", "post_attention_norm", "feedforward_norm", "post_feedforward_norm")
    },
    Parallel: {"norm": "attention_norm"},
}


def describe(model: nn.Module) -> ModelPart:
    """The model as data, of an encoder-decoder the decoder; it may be on the meta device. What the native step does not
    know is `Unavailable`."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            raise Unavailable(f"{name} has adapters (LoRA) beside it, which must be merged first")
        if module._forward_hooks or module._forward_pre_hooks:
            raise Unavailable(f"{name or 'the model'} has hooks, which native code does not call")
    if isinstance(model, EncoderDecoder):
        return _describe_decoder(_known(model, "the model", EncoderDecoder))
    decoder = _known(model, "the model", DecoderLM)
    embedding, positions = _known(decoder.embedding, "embedding", nn.Embedding, ScaledEmbedding), decoder.positions
    table = _matrix(embedding, "embedding")
    return ModelPart(
        table,
        embedding.scale if isinstance(embedding, ScaledEmbedding) else 1.0,
        None if positions is None else "positions.weight",
        decoder.config.context_length if positions is None else positions.num_embeddings,
        tuple(_layer(block, f"blocks.{number}") for number, block in enumerate(decoder.blocks)),
        _norm(decoder.norm, "norm", ScaledLayerNorm),
        table if decoder.head is None else _matrix(_known(decoder.head, "head", *LINEAR), "head"),
        decoder.norm.scale if isinstance(decoder.norm, ScaledLayerNorm) else 1.0,
    )


def _describe_decoder(model: EncoderDecoder) -> ModelPart:
    name = "embedding" if model.target_embedding is None else "target_embedding"
    table = _matrix(_known(model.get_submodule(name), name, nn.Embedding), name)
    head = table if model.head is None else _matrix(_known(model.head, "head", *LINEAR), "head")
    length = model.positions.context_length
    return ModelPart(
        table,
        model.scale,
        model.positions(0, length, LIKE),
        length,
        tuple(_layer(block, f"decoder.{number}") for number, block in enumerate(model.decoder)),
        NormPart(NO_NORM, 0.0, None),
        replace(head, bias="logits_bias"),
        1.0,
    )


Kind = TypeVar("Kind", bound=nn.Module)
LINEAR = (Linear, JoinedLinear, nn.Linear)


def _known(module: nn.Module, name: str, *kinds: type[Kind]) -> Kind:
    """A layer of one of these kinds; a subclass is another kind, since it may compute something else."""
    if type(module) not in kinds:
        raise Unavailable(f"{name} is a {type(module).__name__}, which native code does not have")
    return cast(Kind, module)


def _matrix(module: nn.Linear | nn.Embedding, name: str, first: int = 0, rows: int | None = None) -> MatrixPart:
    count, columns = module.weight.shape
    bias = module.bias if isinstance(module, nn.Linear) else None
    return MatrixPart(f"{name}.weight", first, rows or count, columns, None if bias is None else f"{name}.bias")


def _norm(module: nn.Module, name: str, *more: type[nn.LayerNorm]) -> NormPart:
    norm = _known(module, name, RMSNorm, UnitOffsetRMSNorm, nn.LayerNorm, nn.Identity, *more)
    if isinstance(norm, nn.Identity):
        return NormPart(NO_NORM, 0.0, None)
    weight, bias = (f"{name}.{each}" if each in dict(norm.named_parameters()) else None for each in ("weight", "bias"))
    kind = LAYER_NORM if isinstance(norm, nn.LayerNorm) else RMS_NORM
    return NormPart(kind, norm.eps, weight, bias, 1.0 if isinstance(norm, UnitOffsetRMSNorm) else 0.0)


def _layer(module: nn.Module, name: str) -> LayerPart:
    block = _known(module, name, PreNorm, PostNorm, CrossPostNorm, SandwichNorm, Parallel)
    attention = _known(block.attention, f"{name}.attention", Attention)
    feedforward = _known(block.feedforward, f"{name}.feedforward", FeedForward, GatedFeedForward)
    norms = {theirs: _norm(block.get_submodule(ours), f"{name}.{ours}") for ours, theirs in BLOCKS[type(block)].items()}
    if attention.q_norm is not None and attention.k_norm is not None:
        norms["query_norm"] = _norm(attention.q_norm, f"{name}.attention.q_norm")
        norms["key_norm"] = _norm(attention.k_norm, f"{name}.attention.k_norm")
    if feedforward.activation not in ACTIVATION_KINDS:
        raise Unavailable(f"{name}.feedforward has an activation that native code does not have")
    matrices = _split(attention.qkv, f"{name}.attention.qkv", "query", "key", "value")
    matrices["out"] = _matrix(_known(attention.out, f"{name}.attention.out", *LINEAR), f"{name}.attention.out")
    if "cross_norm" in norms:
        matrices |= _cross(block.get_submodule("cross_attention"), attention, f"{name}.cross_attention")
    return LayerPart(
        matrices | _feedforward(feedforward, f"{name}.feedforward"),
        norms,
        (attention.n_heads, attention.n_kv_heads, attention.head_dim),
        isinstance(block, Parallel),
        isinstance(block, PostNorm),
        ACTIVATION_KINDS[feedforward.activation],
        attention.window or 0,
        attention.head_dim**-0.5 if attention.scale is None else attention.scale,
        None if attention.rotary is None else _rotary(attention.rotary, f"{name}.attention.rotary"),
    )


def _cross(module: nn.Module, own: Attention, name: str) -> dict[str, MatrixPart]:
    """Queries and output of a cross-attention; its keys and values are made where the source is read."""
    cross = _known(module, name, CrossAttention)
    if (cross.n_heads, own.scale, own.window) != (own.n_kv_heads, None, None):
        raise Unavailable(f"{name} has other heads, or another scale, than the self-attention before it")
    query, out = _known(cross.q, f"{name}.q", *LINEAR), _known(cross.out, f"{name}.out", *LINEAR)
    return {"cross_query": _matrix(query, f"{name}.q"), "cross_out": _matrix(out, f"{name}.out")}


def _split(module: nn.Module, name: str, *parts: str) -> dict[str, MatrixPart]:
    """The matrices that are joined in one, by these names."""
    joined = _known(module, name, JoinedLinear)
    each = zip(parts, accumulate(joined.parts, initial=0), joined.parts, strict=False)
    return {part: _matrix(joined, name, first, rows) for part, first, rows in each}


def _feedforward(module: FeedForward | GatedFeedForward, name: str) -> dict[str, MatrixPart]:
    down = {"down": _matrix(_known(module.down, f"{name}.down", *LINEAR), f"{name}.down")}
    if isinstance(module, GatedFeedForward):
        return down | _split(module.gate_up, f"{name}.gate_up", "gate", "up")
    return down | {"up": _matrix(_known(module.up, f"{name}.up", *LINEAR), f"{name}.up")}


def _rotary(module: nn.Module, name: str) -> RotaryPart:
    rotary = _known(module, name, Rotary)
    if rotary.scaling and rotary.scaling.kind == "dynamic":
        raise Unavailable(f"{name} has dynamic scaling, whose angles change with the text's length")
    frequencies = rotary.frequencies(LIKE)
    return RotaryPart(frequencies, rotary.interleaved, rotary.scaling.magnitude() if rotary.scaling else 1.0)

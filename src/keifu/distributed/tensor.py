"""Tensor parallelism (Shoeybi et al., 2019) with sequence parallelism (Korthikanti et al., 2022), put into a built
model from outside, and with loss parallelism.

Each process has some heads of every attention and some units of every feed-forward network. Between them, where norms
and dropout act on each token separately, it has some of the tokens. Axes: batch, length = tokens, dim.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from keifu.distributed.layout import Layout
from keifu.errors import UserError
from keifu.layers.attention.attention import Attention, CrossAttention
from keifu.layers.attention.axial import GridAttention
from keifu.layers.dropout import Dropout, dropout_mask
from keifu.layers.feedforward import GEGLU, FeedForward, GatedFeedForward
from keifu.layers.linear import Linear, linear
from keifu.layers.lora import Adapter, adapters
from keifu.layers.losses import cross_entropy
from keifu.layers.normalisation import (
    AllHeadsRMSNorm,
    FullPrecisionRMSNorm,
    RMSNorm,
    ScaledLayerNorm,
    UnitOffsetRMSNorm,
)
from keifu.layers.quantized import QuantizedLinear
from keifu.layers.transformer.blocks import (
    CrossPostNorm,
    CrossPreNorm,
    Parallel,
    PostNorm,
    PreNorm,
    ReorderedNorm,
    SandwichNorm,
)
from keifu.layers.transformer.encoder_decoder import EncoderDecoder
from keifu.layers.unet.conv import SpatialAttention
from keifu.training.hardware.recompute import HasBlocks


class Tokens:
    """The tokens of a list of blocks, split over the processes along an axis of the mesh; `length`: of the rows that
    are computed."""

    def __init__(self, axis: DeviceMesh):
        self.axis, self.index, self.size, self.length = axis, axis.get_local_rank(), axis.size(), 0

    def part(self, x: Tensor, adds: bool) -> Tensor:
        """Return this process's tokens of what all have, or where it `adds`, of the sum of what each has; with padding
        where the length is no multiple of the processes."""
        padded = F.pad(x, (0, 0, 0, -x.shape[1] % self.size))
        return self.move(padded, Partial() if adds else Replicate(), Shard(1))

    def whole(self, x: Tensor, adds: bool) -> Tensor:
        """Return all tokens. adds: whether the processes' gradients are parts of a sum, or all the same."""
        return self.move(x, Shard(1), Replicate(), Partial() if adds else Replicate())[:, : self.length]

    def shared(self, x: Tensor) -> Tensor:
        """Mark a replicated tensor whose gradient is summed over the processes."""
        return self.move(x, Replicate(), Replicate(), Partial())

    def stack(self, x: Tensor) -> Tensor:
        """Return the same tensor of every process, one behind the other along a new first axis."""
        return self.move(x[None], Shard(0), Replicate())

    def move(self, x: Tensor, before: Placement, after: Placement, gradient: Placement | None = None) -> Tensor:
        """Redistribute x from the placement `before` to `after`. `gradient` is the placement of its gradient; None:
        `after`."""
        whole = DTensor.from_local(x, self.axis, [before], run_check=False).redistribute(placements=[after])
        return whole.to_local(grad_placements=[gradient or after])

    def enter(self, module: nn.Module, inputs: tuple) -> tuple:
        """Give each process its own tokens, as a hook before the first block."""
        self.length = inputs[0].shape[1]
        return (self.part(inputs[0], adds=False), *inputs[1:])


class RowParallel(Linear):
    """A linear layer of some inputs, summed over the processes; the output has this process's tokens."""

    tokens: Tokens

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        y = self.tokens.part(linear(input, self.weight), adds=True)
        return y if self.bias is None else y + self.bias


class SplitDropout(Dropout):
    """Dropout with the mask of the whole tensor, of which the input is a part: some tokens, or a part of an axis."""

    def __init__(self, p: float, tokens: Tokens, axis: int | None = None):
        super().__init__(p)
        self.tokens, self.axis = tokens, axis

    def mask(self, input: Tensor, keys: Tensor, dropped: int) -> Tensor:  # noqa: A002
        shape, tokens, axis = [*input.shape], self.tokens, 1 if self.axis is None else self.axis
        size = shape[axis]
        shape[axis] = tokens.length if self.axis is None else size * tokens.size
        mask = dropout_mask(keys, prod(shape), dropped).view(shape)
        return tokens.part(mask, adds=False) if self.axis is None else mask.narrow(axis, tokens.index * size, size)


class SplitHeadsNorm(AllHeadsRMSNorm):
    """Norm over the heads of all processes, of which the input has this process's."""

    tokens: Tokens

    def forward(self, x: Tensor) -> Tensor:
        flat = x.float().flatten(-2)
        squares = self.tokens.move(flat.square().sum(-1, keepdim=True), Partial(), Replicate())
        count = len(self.weight) * self.tokens.size
        scale = (self.tokens.shared(squares) / count + self.eps).rsqrt()  # copies are in the sum and in the count
        return (flat * scale * self.weight.float()).to(x.dtype).unflatten(-1, x.shape[-2:])


class Head(Tensor):
    """This process's rows of a head's matrix, in place of the whole: it computes the loss's part of their classes (loss
    parallelism), and looks up their tokens. Any other function is given the whole matrix."""

    tokens: Tokens
    classes: Layout

    @property
    def own(self) -> range:
        """Return the indices of this process's classes."""
        return self.classes.rows[self.tokens.index][0]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            match func, args:
                case F.embedding, (tokens, Head() as head, *_):
                    return head.look_up(tokens)
                case cross_entropy.linear_cross_entropy, (hidden, Head() as head, bias, *rest):
                    return head.loss(hidden, bias, rest)
            return func(*(arg.whole() if isinstance(arg, Head) else arg for arg in args), **(kwargs or {}))

    def whole(self) -> Tensor:
        """Return the matrix of all processes, of whose gradient each computes all."""
        sizes = [len(rows[0]) for rows in self.classes.rows]
        padded = F.pad(self.as_subclass(Tensor), (0, 0, 0, max(sizes) - len(self.own)))
        parts = self.tokens.move(padded, Shard(0), Replicate()).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def look_up(self, tokens: Tensor) -> Tensor:
        """Return the rows of tokens, from whichever process has them."""
        own_rows = tokens - self.own.start
        there = (own_rows >= 0) & (own_rows < len(self.own))
        rows = F.embedding(own_rows.where(there, 0), self.as_subclass(Tensor))
        return self.tokens.move(rows * there[..., None], Partial(), Replicate())

    def loss(self, hidden: Tensor, bias: Tensor | None, rest: list[Any]) -> Any:
        """Return the loss over all classes."""
        classes = cross_entropy.Vocabulary(self.own.start, self.classes.shape[0], self.tokens.stack)
        bias = None if bias is None else self.tokens.shared(bias)[self.own.start : self.own.stop]
        local = self.tokens.shared(hidden), self.as_subclass(Tensor), bias
        return cross_entropy.linear_cross_entropy(*local, *rest, vocabulary=classes)


class SplitRows:
    """Mixin for an output head whose `weight` has only this process's rows of the matrix."""

    tokens: Tokens
    classes: Layout
    _parameters: dict[str, Tensor]

    @property
    def weight(self) -> Tensor:
        """Its rows, which know that there are more; as FSDP keeps them between uses, the parameter itself."""
        rows = self._parameters["weight"]
        if isinstance(rows, DTensor):
            return rows
        head = rows.as_subclass(Head)
        head.tokens, head.classes = self.tokens, self.classes
        return head


def _split_head(model: nn.Module, tokens: Tokens) -> dict[str, Layout]:
    """Split the matrix of a language model's head by its classes, and the embedding where that is the same one; none
    if it is no language model.
    """
    models: list[Any] = [part for part in model.modules() if "head_weight" in dir(type(part))]
    matrices = {id(part.head_weight) for part in models}
    users: list[Any] = [(name, part) for name, part in model.named_modules()
                        if any(id(p) in matrices for p in part.parameters(False))]  # fmt: skip
    if len(users) != 1 or users[0][1].weight.shape[0] < tokens.size:
        return {}
    name, user = users[0]
    total, *rest = user.weight.shape
    user.classes = Layout((total, *rest), [[share] for share in _shares(total, tokens.size)])
    user.tokens = tokens
    _take(user, "weight", user.classes, tokens)
    user.__class__ = type(type(user).__name__, (SplitRows, type(user)), {})
    return {f"{name}.weight": user.classes}


def tensor_parallel(model: nn.Module, axis: DeviceMesh) -> tuple[dict[str, Layout], set[str]]:
    """Split the blocks of a model over an axis of the mesh.

    Returns the layout of each parameter that is split, and the names of the other parameters of the blocks, whose
    gradients have to be summed over the axis. Raises a `UserError` for a layer that is not in the tables below.
    """
    if any(adapter.low.dora for adapter in adapters(model)):
        raise UserError("DoRA cannot be split over --mesh.tensor: use --mesh.shard, or leave --lora.dora out.")
    if any(isinstance(layer, QuantizedLinear) for layer in model.modules()):
        raise UserError("--lora.base int4 cannot be split over --mesh.tensor: use --mesh.shard, or leave it out.")
    names = {module: name for name, module in model.named_modules()}
    stacks = stacks_of(model, names)
    if not stacks:
        raise UserError("This model has no Transformer block to split: leave --mesh.tensor out, or use --mesh.shard.")
    layouts: dict[str, Layout] = {}
    summed: set[str] = set()
    for blocks in stacks:
        tokens = Tokens(axis)
        for block in blocks:
            split = {key: layout for key, layout in _split_block(block, tokens) if layout.is_split}
            layouts |= {f"{names[block]}.{key}": layout for key, layout in split.items()}
            summed |= {f"{names[block]}.{key}" for key, _ in block.named_parameters() if key not in split}
        blocks[0].register_forward_pre_hook(tokens.enter)
        blocks[-1].register_forward_hook(lambda _, inputs, output, tokens=tokens: tokens.whole(output, adds=False))
    return layouts | _split_head(model, Tokens(axis)), summed


def stacks_of(model: nn.Module, names: Mapping[nn.Module, str]) -> list[list[nn.Module]]:
    """Return the lists of Transformer blocks of a model, each of which has its tokens split.

    Raises a `UserError` for a layer that is not in the tables below. What is outside of the blocks stays whole.
    """
    if not isinstance(model, HasBlocks):
        return [stack for child in model.children() for stack in stacks_of(child, names)]
    both = (model.encoder, model.decoder) if isinstance(model, EncoderDecoder) else (model.blocks,)
    stacks = [[*blocks] for blocks in both]
    if not any(type(block) in BLOCKS for stack in stacks for block in stack):
        for block in model.blocks:
            if type(block) not in WHOLE and not isinstance(block, HasBlocks):
                _check_whole(block, names)
        return [stack for block in model.blocks for stack in stacks_of(block, names)]
    for block in (block for stack in stacks for block in stack):
        if type(block) not in BLOCKS:
            raise _unknown(block, names)
        for layer in block.children():
            if type(layer) not in LAYERS:
                raise _unknown(layer, names)
            if isinstance(layer, CrossAttention) and layer.dropout.p:
                raise UserError("Dropout inside of a cross-attention cannot be split: leave --mesh.tensor out.")
            if isinstance(layer, Attention):
                _check_head_norms(layer, names)
    return stacks


def _check_whole(block: nn.Module, names: Mapping[nn.Module, str]) -> None:
    """Raise a `UserError` if a block of an unknown class contains a layer that would be split in a known block."""
    if any(LAYERS.get(type(layer)) not in (None, _split_dropout) for layer in block.modules()):
        raise _unknown(block, names)


def _check_head_norms(attention: Attention, names: Mapping[nn.Module, str]) -> None:
    """Refuse an unknown norm of queries or keys that is computed over all heads: each process has some of them."""
    for norm in (attention.q_norm, attention.k_norm):
        if norm is None or type(norm) is AllHeadsRMSNorm:
            continue
        if type(norm) not in LAYERS:
            raise _unknown(norm, names)
        if any(len(weight) != attention.head_dim for weight in norm.parameters()):
            raise _unknown(norm, names, " over all heads")


def _unknown(layer: nn.Module, names: Mapping[nn.Module, str], more: str = "") -> UserError:
    article = "an" if type(layer).__name__[0] in "AEIOU" else "a"
    return UserError(
        f"{names[layer]} is {article} {type(layer).__name__}{more}, which tensor parallelism cannot split: leave "
        "--mesh.tensor out, or use --mesh.shard."
    )


def _split_block(block: nn.Module, tokens: Tokens) -> Iterator[tuple[str, Layout]]:
    for name, layer in block.named_children():
        if rule := LAYERS[type(layer)]:
            yield from ((f"{name}.{key}", layout) for key, layout in rule(layer, tokens))


def _split_dropout(layer: Any, tokens: Tokens) -> Iterator[tuple[str, Layout]]:
    """Let dropout drop the same elements of this process's tokens as of the whole sequence."""
    layer.__class__ = SplitDropout
    vars(layer).update(tokens=tokens, axis=None)
    yield from ()


def _split_cross_attention(layer: Any, tokens: Tokens) -> Iterator[tuple[str, Layout]]:
    """Sum the gradient of the source, which each process reads for its own tokens."""
    layer.kv.register_forward_pre_hook(lambda _, inputs: tokens.shared(inputs[0]))
    yield from ()


def _split_attention(part: Attention, tokens: Tokens) -> Iterator[tuple[str, Layout]]:
    heads, kv_heads, size = part.n_heads, part.n_kv_heads, tokens.size
    if heads % size or (kv_heads % size and size % kv_heads):
        raise UserError(
            f"{heads} heads with {kv_heads} of keys and values cannot be split over --mesh.tensor {size}: it must "
            "divide the first, and divide the second or be a multiple of it."
        )
    inner, kv = heads * part.head_dim, kv_heads * part.head_dim
    parts = [_shares(inner, size), *(_shares(kv, size, kv_heads, start) for start in (inner, inner + kv))]
    yield from _split_pair(part, "qkv", "out", parts, tokens)
    for name, norm, shares in (("q_norm", part.q_norm, parts[0]), ("k_norm", part.k_norm, _shares(kv, size, kv_heads))):
        if isinstance(norm, AllHeadsRMSNorm):
            yield f"{name}.weight", _split_norm(norm, shares, tokens)
    part.n_heads, part.n_kv_heads = heads // size, max(1, kv_heads // size)
    part.dropout = SplitDropout(part.dropout.p, tokens, 1)


def _split_norm(norm: Any, rows: list[range], tokens: Tokens) -> Layout:
    norm.__class__ = SplitHeadsNorm
    vars(norm).update(tokens=tokens)
    return _take(norm, "weight", Layout(tuple(norm.weight.shape), [[row] for row in rows]), tokens)


def _split_feedforward(part: Any, tokens: Tokens) -> Iterator[tuple[str, Layout]]:
    name = next(name for name in ("up", "gate_up", "up_gate") if name in dict(part.named_children()))
    first, hidden, size = getattr(part, name), part.down.weight.shape[1], tokens.size
    if hidden % size:
        raise UserError(f"hidden_dim ({hidden}) cannot be split over --mesh.tensor {size}: it must divide it.")
    parts = [_shares(hidden, size, start=start) for start in range(0, len(first.weight), hidden)]
    yield from _split_pair(part, name, "down", parts, tokens)
    if "dropout" in dict(part.named_children()):
        part.dropout = SplitDropout(part.dropout.p, tokens, -1)


def _split_pair(
    part: Any, first: str, last: str, parts: list[list[range]], tokens: Tokens
) -> Iterator[tuple[str, Layout]]:
    """Split a layer by its outputs, evenly within each of its `parts`, and the layer that follows by its inputs. Of
    their adapters B and A are split likewise; of the gradient of the others, and of B of keys that all have, each
    process computes a part.
    """
    outer, inner = getattr(part, first), getattr(part, last)
    rows, columns = [*zip(*parts, strict=True)], parts[0]
    outer.register_forward_pre_hook(lambda _, inputs: (tokens.whole(inputs[0], adds=True), *inputs[1:]))
    for name, layer in outer.named_modules(prefix=first):
        if isinstance(layer, Linear):
            for key, parameter in [*layer.named_parameters()]:
                yield f"{name}.{key}", _take(layer, key, Layout(tuple(parameter.shape), rows), tokens)
        elif isinstance(layer, Adapter):
            yield f"{name}.b", _split_adapter(layer, rows, tokens)
    for name, layer in inner.named_modules(prefix=last):
        if isinstance(layer, Linear):
            layer.__class__, vars(layer)["tokens"] = RowParallel, tokens
            yield f"{name}.weight", _take(layer, "weight", _of_columns(layer.weight, columns), tokens)
        elif isinstance(layer, Adapter):
            layer.dropout = SplitDropout(layer.dropout.p, tokens, -1)
            layer.register_forward_hook(lambda *call: tokens.part(call[-1], adds=True))
            yield f"{name}.a", _take(layer, "a", _of_columns(layer.a, columns), tokens)


def _split_adapter(adapter: Adapter, rows: Sequence[Sequence[range]], tokens: Tokens) -> Layout:
    """Cut an adapter to the outputs of its layer that this process computes."""
    first, end = adapter.target.start, adapter.target.start + adapter.target.rows
    ranges = [[range(max(span.start, first) - first, min(span.stop, end) - first) for span in one
              if span.start < end and first < span.stop] for one in rows]  # fmt: skip
    before = sum(len(span) for span in rows[tokens.index] if span.stop <= first)
    layout = _take(adapter, "b", Layout(tuple(adapter.b.shape), ranges), tokens)
    adapter.target = replace(adapter.target, start=before, rows=len(adapter.b))
    return layout


def _of_columns(parameter: Tensor, columns: list[range]) -> Layout:
    return Layout(tuple(parameter.shape), [[range(len(parameter))]] * len(columns), columns)


def _take(layer: nn.Module, name: str, layout: Layout, tokens: Tokens) -> Layout:
    """Replace a parameter of a layer by the part that this process keeps; return the layout."""
    whole = getattr(layer, name)
    part = layout.take(whole.detach(), 0, tokens.index).clone()
    setattr(layer, name, nn.Parameter(part, whole.requires_grad))
    return layout


def _shares(total: int, size: int, units: int | None = None, start: int = 0) -> list[range]:
    """Return a range of rows, of `total` from `start` on, for each process; if there are fewer units (heads) than
    processes, several have the same.
    """
    parts = min(size, units or size)
    starts = [index * parts // size for index in range(size)]
    return [range(start + total * first // parts, start + total * (first + 1) // parts) for first in starts]


Rule = Callable[[Any, Tokens], Iterator[tuple[str, Layout]]]

BLOCKS = {PreNorm, PostNorm, ReorderedNorm, SandwichNorm, Parallel, CrossPreNorm, CrossPostNorm}
LAYERS: dict[type, Rule | None] = {  # of a block; None: it acts on each token separately
    Attention: _split_attention,
    GridAttention: _split_attention,
    CrossAttention: _split_cross_attention,
    FeedForward: _split_feedforward,
    GatedFeedForward: _split_feedforward,
    GEGLU: _split_feedforward,
    Dropout: _split_dropout,
    nn.LayerNorm: None,
    RMSNorm: None,
    FullPrecisionRMSNorm: None,
    UnitOffsetRMSNorm: None,
    ScaledLayerNorm: None,
}
WHOLE = {SpatialAttention}  # blocks that each process computes whole, though there are such layers inside

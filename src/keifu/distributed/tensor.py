"""Tensor parallelism (Shoeybi et al., 2019) with sequence parallelism (Korthikanti et al., 2022) and loss parallelism,
for a model that is already built.

Each rank has some heads of every attention and some hidden units of every feed-forward network. Between these layers,
norms and dropout act on each token separately: there each rank has some of the tokens. Axes: batch, length = tokens,
dim.
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
from keifu.layers import normalisation as norms
from keifu.layers.attention.attention import Attention, CrossAttention
from keifu.layers.attention.axial import GridAttention
from keifu.layers.dropout import Dropout, dropout_mask
from keifu.layers.feedforward import GEGLU, FeedForward, GatedFeedForward
from keifu.layers.linear import Linear, linear
from keifu.layers.lora import Adapter, adapters
from keifu.layers.losses import cross_entropy
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

Layouts = Iterator[tuple[str, Layout]]  # the layout of each split parameter, by its name


class Tokens:
    """Sequence parallelism of a list of blocks: the tokens are split over the ranks of `axis`. `length`: tokens of the
    current batch's sequences, without padding.
    """

    def __init__(self, axis: DeviceMesh):
        self.axis, self.index, self.size, self.length = axis, axis.get_local_rank(), axis.size(), 0

    def scatter(self, x: Tensor, reduce: bool) -> Tensor:
        """Return this rank's tokens: (batch, length, dim) → (batch, ceil(length / size), dim), padded with zeros at the
        end.

        reduce: x is a partial sum on each rank, so sum it over the ranks (reduce-scatter). Otherwise x is replicated.
        """
        padded = F.pad(x, (0, 0, 0, -x.shape[1] % self.size))
        return self.move(padded, Partial() if reduce else Replicate(), Shard(1))

    def gather(self, x: Tensor, reduce: bool) -> Tensor:
        """Gather all tokens: (batch, ceil(length / size), dim) → (batch, length, dim). reduce: sum the ranks'
        gradients; otherwise they are equal.
        """
        return self.move(x, Shard(1), Replicate(), Partial() if reduce else Replicate())[:, : self.length]

    def sum_gradient(self, x: Tensor) -> Tensor:
        """Return x, which is equal on all ranks, unchanged; its gradient is summed over the ranks."""
        return self.move(x, Replicate(), Replicate(), Partial())

    def stack(self, x: Tensor) -> Tensor:
        """Stack the ranks' tensors of one shape along a new first axis: (...) → (size, ...)."""
        return self.move(x[None], Shard(0), Replicate())

    def move(self, x: Tensor, before: Placement, after: Placement, gradient: Placement | None = None) -> Tensor:
        """Redistribute x from the placement `before` to `after`. gradient: the placement of the gradient of the result;
        None: `after`.
        """
        distributed_tensor = DTensor.from_local(x, self.axis, [before], run_check=False).redistribute(
            placements=[after]
        )
        return distributed_tensor.to_local(grad_placements=[gradient or after])

    def enter(self, module: nn.Module, inputs: tuple) -> tuple:
        """Scatter the tokens of a block's input. This is a forward pre-hook of the first block."""
        self.length = inputs[0].shape[1]
        return (self.scatter(inputs[0], reduce=False), *inputs[1:])


class RowParallel(Linear):
    """Linear layer that is split by its inputs. It sums over the ranks and returns this rank's tokens."""

    tokens: Tokens

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        y = self.tokens.scatter(linear(input, self.weight), reduce=True)
        return y if self.bias is None else y + self.bias


class SplitDropout(Dropout):
    """Dropout that drops the same elements as one process would. The input is this rank's part of the whole tensor
    along `axis`; None: its tokens (axis 1).
    """

    def __init__(self, p: float, tokens: Tokens, axis: int | None = None):
        super().__init__(p)
        self.tokens, self.axis = tokens, axis

    def mask(self, input: Tensor, keys: Tensor, dropped: int) -> Tensor:  # noqa: A002
        shape, tokens, axis = [*input.shape], self.tokens, 1 if self.axis is None else self.axis
        size = shape[axis]
        shape[axis] = tokens.length if self.axis is None else size * tokens.size
        mask = dropout_mask(keys, prod(shape), dropped).view(shape)
        return tokens.scatter(mask, reduce=False) if self.axis is None else mask.narrow(axis, tokens.index * size, size)


class SplitHeadsNorm(norms.AllHeadsRMSNorm):
    """RMSNorm over all heads, where the input has only this rank's heads: (batch, length, heads, head_dim)."""

    tokens: Tokens

    def forward(self, x: Tensor) -> Tensor:
        flat = x.float().flatten(-2)
        squares = self.tokens.move(flat.square().sum(-1, keepdim=True), Partial(), Replicate())
        count = len(self.weight) * self.tokens.size
        # the gradient of a sum over ranks has to be summed over ranks too
        scale = (self.tokens.sum_gradient(squares) / count + self.eps).rsqrt()
        return (flat * scale * self.weight.float()).to(x.dtype).unflatten(-1, x.shape[-2:])


class Head(Tensor):
    """This rank's rows of an output head's matrix (classes, dim), used like the whole matrix (loss parallelism).

    The loss computes these classes on this rank, and an embedding looks up these tokens. Any other function gets the
    gathered matrix.
    """

    tokens: Tokens
    classes: Layout

    @property
    def indices(self) -> range:
        """Return the indices of this rank's classes."""
        return self.classes.rows[self.tokens.index][0]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            match func, args:
                case F.embedding, (tokens, Head() as head, *_):
                    return head.look_up(tokens)
                case cross_entropy.linear_cross_entropy, (hidden, Head() as head, bias, *options):
                    return head.loss(hidden, bias, options)
            return func(*(arg.full_weight() if isinstance(arg, Head) else arg for arg in args), **(kwargs or {}))

    def full_weight(self) -> Tensor:
        """Gather the matrix of all classes: (classes, dim). Each rank computes its whole gradient."""
        sizes = [len(rows[0]) for rows in self.classes.rows]
        padded = F.pad(self.as_subclass(Tensor), (0, 0, 0, max(sizes) - len(self.indices)))
        parts = self.tokens.move(padded, Shard(0), Replicate()).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def look_up(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of tokens; each comes from the rank that stores its row."""
        local = tokens - self.indices.start
        there = (local >= 0) & (local < len(self.indices))
        rows = F.embedding(local.where(there, 0), self.as_subclass(Tensor))
        return self.tokens.move(rows * there[..., None], Partial(), Replicate())

    def loss(self, hidden: Tensor, bias: Tensor | None, options: list[Any]) -> Any:
        """Return the loss over all classes of all ranks. options: the other positional arguments of
        `linear_cross_entropy`.
        """
        classes = cross_entropy.Vocabulary(self.indices.start, self.classes.shape[0], self.tokens.stack)
        bias = None if bias is None else self.tokens.sum_gradient(bias)[self.indices.start : self.indices.stop]
        local = self.tokens.sum_gradient(hidden), self.as_subclass(Tensor), bias
        return cross_entropy.linear_cross_entropy(*local, *options, vocabulary=classes)


class SplitRows:
    """Mixin for an output head whose `weight` is this rank's rows of the matrix."""

    tokens: Tokens
    classes: Layout
    _parameters: dict[str, Tensor]

    @property
    def weight(self) -> Tensor:
        """This rank's rows, as a `Head`. While FSDP has the parameter sharded: the DTensor itself."""
        rows = self._parameters["weight"]
        if isinstance(rows, DTensor):
            return rows
        head = rows.as_subclass(Head)
        head.tokens, head.classes = self.tokens, self.classes
        return head


def _split_head(model: nn.Module, tokens: Tokens) -> dict[str, Layout]:
    """Split the matrix of a language model's output head by classes, and the embedding if it is tied to the head.
    Return its layout by name; {} if the model has no head that can be split.
    """
    models: list[Any] = [part for part in model.modules() if "head_weight" in dir(type(part))]
    matrices = {id(part.head_weight) for part in models}
    users: list[Any] = [(name, part) for name, part in model.named_modules()
                        if any(id(p) in matrices for p in part.parameters(False))]  # fmt: skip
    if len(users) != 1 or users[0][1].weight.shape[0] < tokens.size:
        return {}
    name, user = users[0]
    total, dim = user.weight.shape
    user.classes = Layout((total, dim), [[share] for share in _shares(total, tokens.size)])
    user.tokens = tokens
    _take(user, "weight", user.classes, tokens)
    user.__class__ = type(type(user).__name__, (SplitRows, type(user)), {})
    return {f"{name}.weight": user.classes}


def tensor_parallel(model: nn.Module, axis: DeviceMesh) -> tuple[dict[str, Layout], set[str]]:
    """Split the blocks of a model over an axis of the mesh.

    Return the layout of each split parameter, and the names of the blocks' other parameters, whose gradients have to be
    summed over the axis. Raises UserError for a layer that is not in the tables below.
    """
    if any(adapter.low.dora for adapter in adapters(model)):
        raise UserError("DoRA cannot be split over --mesh.tensor: use --mesh.shard, or leave --lora.dora out.")
    if any(isinstance(layer, QuantizedLinear) for layer in model.modules()):
        raise UserError("--lora.base int4 cannot be split over --mesh.tensor: use --mesh.shard, or leave it out.")
    names = {module: name for name, module in model.named_modules()}
    stacks = split_stacks(model, names)
    layouts: dict[str, Layout] = {}
    summed: set[str] = set()
    for blocks in stacks:
        tokens = Tokens(axis)
        for block in blocks:
            split = {key: layout for key, layout in _split_block(block, tokens) if layout.is_split}
            layouts |= {f"{names[block]}.{key}": layout for key, layout in split.items()}
            summed |= {f"{names[block]}.{key}" for key, _ in block.named_parameters() if key not in split}
        blocks[0].register_forward_pre_hook(tokens.enter)
        blocks[-1].register_forward_hook(lambda _, inputs, output, tokens=tokens: tokens.gather(output, reduce=False))
    return layouts | _split_head(model, Tokens(axis)), summed


def split_stacks(model: nn.Module, names: Mapping[nn.Module, str]) -> list[list[nn.Module]]:
    """Return the model's lists of Transformer blocks. Raises UserError if it has none, or if one cannot be split."""
    if not (stacks := stacks_of(model, names)):
        raise UserError("This model has no Transformer block to split: leave --mesh.tensor out, or use --mesh.shard.")
    return stacks


def stacks_of(model: nn.Module, names: Mapping[nn.Module, str]) -> list[list[nn.Module]]:
    """Return the model's lists of Transformer blocks. The tokens are split within each list.

    Modules outside the blocks are not split. Raises UserError for a layer that is not in the tables below.
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
    """Raise UserError if a block of an unknown class contains a layer that would be split in a known block."""
    if any(LAYERS.get(type(layer)) not in (None, _split_dropout) for layer in block.modules()):
        raise _unknown(block, names)


def _check_head_norms(attention: Attention, names: Mapping[nn.Module, str]) -> None:
    """Raise UserError for an unknown norm of queries or keys over all heads: each rank has only some heads."""
    for norm in (attention.q_norm, attention.k_norm):
        if norm is None or type(norm) is norms.AllHeadsRMSNorm:
            continue
        if type(norm) not in LAYERS:
            raise _unknown(norm, names)
        if any(len(weight) != attention.head_dim for weight in norm.parameters()):
            raise _unknown(norm, names, " over all heads")


def _unknown(layer: nn.Module, names: Mapping[nn.Module, str], detail: str = "") -> UserError:
    article = "an" if type(layer).__name__[0] in "AEIOU" else "a"
    return UserError(
        f"{names[layer]} is {article} {type(layer).__name__}{detail}, which tensor parallelism cannot split: leave "
        "--mesh.tensor out, or use --mesh.shard."
    )


def _split_block(block: nn.Module, tokens: Tokens) -> Layouts:
    for name, layer in block.named_children():
        if rule := LAYERS[type(layer)]:
            yield from ((f"{name}.{key}", layout) for key, layout in rule(layer, tokens))


def _split_dropout(layer: Any, tokens: Tokens) -> Layouts:
    """Make dropout drop the same elements of this rank's tokens as of the whole sequence."""
    layer.__class__ = SplitDropout
    vars(layer).update(tokens=tokens, axis=None)
    yield from ()


def _split_cross_attention(layer: Any, tokens: Tokens) -> Layouts:
    """Sum the gradient of the source over the ranks: each rank attends to it from its own tokens."""
    layer.kv.register_forward_pre_hook(lambda _, inputs: tokens.sum_gradient(inputs[0]))
    yield from ()


def _split_attention(part: Attention, tokens: Tokens) -> Layouts:
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
        if isinstance(norm, norms.AllHeadsRMSNorm):
            yield f"{name}.weight", _split_norm(norm, shares, tokens)
    part.n_heads, part.n_kv_heads = heads // size, max(1, kv_heads // size)
    part.dropout = SplitDropout(part.dropout.p, tokens, 1)


def _split_norm(norm: Any, rows: list[range], tokens: Tokens) -> Layout:
    norm.__class__ = SplitHeadsNorm
    vars(norm).update(tokens=tokens)
    return _take(norm, "weight", Layout(tuple(norm.weight.shape), [[row] for row in rows]), tokens)


def _split_feedforward(part: Any, tokens: Tokens) -> Layouts:
    name = next(name for name in ("up", "gate_up", "up_gate") if name in dict(part.named_children()))
    first, hidden, size = getattr(part, name), part.down.weight.shape[1], tokens.size
    if hidden % size:
        raise UserError(f"hidden_dim ({hidden}) cannot be split over --mesh.tensor {size}: it must divide it.")
    parts = [_shares(hidden, size, start=start) for start in range(0, len(first.weight), hidden)]
    yield from _split_pair(part, name, "down", parts, tokens)
    if "dropout" in dict(part.named_children()):
        part.dropout = SplitDropout(part.dropout.p, tokens, -1)


def _split_pair(layer: Any, first: str, last: str, parts: list[list[range]], tokens: Tokens) -> Layouts:
    """Split the linear layer `first` by outputs and the next one, `last`, by inputs (column-parallel, then
    row-parallel).

    parts: for each matrix that is joined in `first`, one range of rows per rank. LoRA adapters are split too: B of
    `first` by outputs and A of `last` by inputs.
    """
    outer, inner = getattr(layer, first), getattr(layer, last)
    rows, columns = [*zip(*parts, strict=True)], parts[0]
    outer.register_forward_pre_hook(lambda _, inputs: (tokens.gather(inputs[0], reduce=True), *inputs[1:]))
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
            layer.register_forward_hook(lambda *call: tokens.scatter(call[-1], reduce=True))
            yield f"{name}.a", _take(layer, "a", _of_columns(layer.a, columns), tokens)


def _split_adapter(adapter: Adapter, rows: Sequence[Sequence[range]], tokens: Tokens) -> Layout:
    """Split B of an adapter by the outputs of its layer that each rank computes."""
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
    """Replace a layer's parameter by this rank's shard, and return the layout."""
    parameter = getattr(layer, name)
    part = layout.take(parameter.detach(), 0, tokens.index).clone()
    setattr(layer, name, nn.Parameter(part, parameter.requires_grad))
    return layout


def _shares(total: int, size: int, units: int | None = None, start: int = 0) -> list[range]:
    """Divide the rows start, ..., start + total - 1 into one range per rank.

    units: the number of heads. If there are fewer heads than ranks, several ranks get the same range.
    """
    parts = min(size, units or size)
    starts = [index * parts // size for index in range(size)]
    return [range(start + total * first // parts, start + total * (first + 1) // parts) for first in starts]


Rule = Callable[[Any, Tokens], Layouts]

BLOCKS = {PreNorm, PostNorm, ReorderedNorm, SandwichNorm, Parallel, CrossPreNorm, CrossPostNorm}
LAYERS: dict[type, Rule | None] = {  # layers of a block; None: the layer acts on each token separately
    Attention: _split_attention,
    GridAttention: _split_attention,
    CrossAttention: _split_cross_attention,
    FeedForward: _split_feedforward,
    GatedFeedForward: _split_feedforward,
    GEGLU: _split_feedforward,
    Dropout: _split_dropout,
    nn.LayerNorm: None,
    norms.RMSNorm: None,
    norms.FullPrecisionRMSNorm: None,
    norms.UnitOffsetRMSNorm: None,
    norms.ScaledLayerNorm: None,
}
WHOLE = {SpatialAttention}  # blocks that are not split, although they contain layers of the table

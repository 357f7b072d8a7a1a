"""Decoder blocks for generation on a GPU: the same modules with fewer kernels, and without gradients.

A decoding step is so little work that launching kernels determines its time. So queries and keys are rotated in place,
the cache takes queries, keys and values in one tensor, and the kernel of a matrix multiplication adds its result to the
residual stream. Axes: length = tokens of all sequences, all_heads = those of queries, keys and values.
"""

import copy
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import Positions, Rotation
from keifu.layers.feedforward import ClampedFeedForward, FeedForward, GatedFeedForward
from keifu.layers.linear import JoinedLinear, Linear, triton_kernels
from keifu.layers.normalisation import RMSNorm
from keifu.layers.quantized import QuantizedLinear
from keifu.layers.transformer.blocks import PreNorm
from keifu.layers.transformer.decoder import DecoderLM

Stream = Float[Tensor, "1 length dim"]
KNOWN = {  # classes whose operations never read from the device to the host
    nn.Embedding, nn.LayerNorm, RMSNorm, Linear, JoinedLinear, QuantizedLinear,
}  # fmt: skip


class DecodingBlock(nn.Module):
    """A `PreNorm` block with plain attention that changes the residual stream in place.

    Its cache has the method `attend_joined`, which takes queries, keys and values of all heads in one tensor
    (inference/text/paged).
    """

    def __init__(self, block: PreNorm, kernels: Any = None):
        super().__init__()
        self.block, self.kernels = block, kernels

    def forward(self, x: Stream, mask: None, positions: Positions, cache: Any) -> Stream:
        attention: Any = self.block.attention
        feedforward: Any = self.block.feedforward
        heads = attention.qkv(self.block.attention_norm(x)).unflatten(-1, (-1, attention.head_dim))
        if attention.rotary is not None:
            self._rotate(heads, heads.shape[2] - attention.n_kv_heads, positions.rotation(attention.rotary))
        x = _add(x, cache.attend_joined(heads, attention.n_heads, attention.window, attention.scoring), attention.out)
        return _add(x, self._inner(self.block.feedforward_norm(x)), feedforward.down)

    def _rotate(self, heads: Float[Tensor, "1 length all_heads head_dim"], count: int, rotation: Rotation) -> None:
        """Rotate queries and keys in place."""
        if self.kernels is None:
            rotation.turn(heads[:, :, :count])
        else:
            self.kernels.turn(heads[0], count, rotation.cos[0], rotation.sin[0], rotation.interleaved)

    def _inner(self, x: Stream) -> Float[Tensor, "1 length hidden"]:
        """Return the input of the last layer of the feed-forward network."""
        feedforward: Any = self.block.feedforward
        if self.kernels is None or type(feedforward) is not GatedFeedForward or feedforward.activation is not F.silu:
            return feedforward.inner(x)
        return self.kernels.gate(feedforward.gate_up(x)[0])[None]


def _add(x: Stream, inner: Float[Tensor, "1 length hidden"], last: nn.Module) -> Stream:
    """Add the result of a sublayer's last layer to the stream, in the same kernel if possible."""
    if type(last) is Linear and last.bias is None:
        x[0].addmm_(inner[0], last.weight.mT)
        return x
    return x.add_(last(inner))


def _fits(block: nn.Module) -> bool:
    """Return whether a block is a `PreNorm` of classes that this file supports."""
    if type(block) is not PreNorm or type(block.attention) is not Attention or block.attention.q_norm is not None:
        return False
    plain = type(block.feedforward) in (ClampedFeedForward, FeedForward, GatedFeedForward)
    parts = [*block.attention.children(), *block.feedforward.children(), block.attention_norm, block.feedforward_norm]
    return plain and all(type(part) in KNOWN for part in parts if [*part.parameters()])


def decoding_form(model: Any) -> tuple[Any, bool]:
    """Return the model with `DecodingBlock`s if possible, and whether it never reads from the device to the host."""
    model_class = type(model)
    is_common = model_class.hidden is DecoderLM.hidden and model_class._hidden is DecoderLM._hidden
    if not is_common or not all(map(_fits, model.blocks)):
        return model, False
    form = copy.copy(model)
    blocks: list[Any] = list(model.blocks)
    fused = [DecodingBlock(block, triton_kernels(model.embedding.weight.device)) for block in blocks]
    form._modules = {**model._modules, "blocks": nn.ModuleList(fused)}
    other_modules = [module for name, module in model.named_children() if name not in ("blocks", "positions")]
    return form, all(type(module) in KNOWN for module in other_modules if [*module.parameters()])

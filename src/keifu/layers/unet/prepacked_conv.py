"""Prepacked convolution weights for inference: kernels in the memory layout of the CPU library oneDNN.

torch reorders a kernel at every call. For a single image, at a U-Net's coarse resolutions, this takes as long as the
convolution. Here it is done once. Training and adapters must be finished before.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keifu.layers.unet.conv import DoublingConv2d, doubling_pays, fold_upsampling, grow_kernel, interleave

T = TypeVar("T", bound=nn.Module)
Resampled = Float[Tensor, "batch out new_height new_width"]


class PackedConv2d(nn.Module):
    """Packed `nn.Conv2d`, without gradients. It stores only the packed kernel."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = _prepack(conv, conv.weight.detach(), conv.bias)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Resampled:
        return self.conv(x)


class PackedDoublingConv2d(PackedConv2d):
    """Packed `DoublingConv2d`, with its four kernels computed beforehand."""

    def __init__(self, conv: DoublingConv2d):
        super().__init__(conv)
        bias = None if conv.bias is None else conv.bias.repeat(4)
        self.fourfold = _prepack(conv, fold_upsampling(conv.weight.detach()), bias)

    def forward(self, x: Float[Tensor, "batch channels height width"], size: Sequence[int] | None = None) -> Resampled:
        return interleave(self.fourfold(x)) if doubling_pays(x, size) else self.conv(grow_kernel(x, size))


def _prepack(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> partial[Tensor]:
    """Return the convolution with this kernel and the other settings of `conv`, as a function of a picture."""
    geometry = (_pair(conv.padding), _pair(conv.stride), _pair(conv.dilation), conv.groups)
    kernel = torch.ops.aten.mkldnn_reorder_conv2d_weight(weight.contiguous().to_mkldnn(), *geometry)
    bias = None if bias is None else bias.detach()
    return partial(_convolve, arguments=(kernel, bias, *geometry, "none", [], ""))


def _convolve(x: Tensor, arguments: tuple) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, *arguments)


def _pair(value: int | tuple[int, ...] | str) -> list[int]:
    assert not isinstance(value, str)
    return [value, value] if isinstance(value, int) else [*value]


def prepack(model: T) -> T:
    """Return a copy of a model for inference whose convolutions are packed. Everything else is shared with the model.

    1×1 convolutions are not packed: in bfloat16 oneDNN takes up to twenty times as long for packed ones.

    Later changes of the model's kernels do not affect the copy. The model itself is returned if its kernels cannot be
    packed (a device other than the CPU, torch without oneDNN, or an unsupported dtype).
    """
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)]
    if not convs or not all(_packable(conv) for conv in convs):
        return model
    memo = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    with torch.inference_mode():
        for conv in convs:
            memo[id(conv)] = PackedDoublingConv2d(conv) if isinstance(conv, DoublingConv2d) else PackedConv2d(conv)
    return copy.deepcopy(model, memo).eval()


def _packable(conv: nn.Conv2d) -> bool:
    """Return whether oneDNN computes this convolution in its dtype. Subclasses with other computations are not
    packed."""
    plain = type(conv) in (nn.Conv2d, DoublingConv2d) and conv.padding_mode == "zeros"
    if not plain or conv.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    bfloat16 = conv.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not isinstance(conv.padding, str) and (conv.weight.dtype == torch.float32 or bfloat16)

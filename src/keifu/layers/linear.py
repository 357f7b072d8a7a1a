"""Linear layers and their products: the fastest that PyTorch has for a row, for a matrix, and on this processor; and
joined matrices with one product for several (q, k, v)."""

import platform
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SMALL = 2**13  # numbers of a matrix with which the choice of a product costs more than it brings


def _is_amd_with_avx512() -> bool:
    """Return whether MKL, with which PyTorch multiplies float32, uses half of the processor's width, as on AMD's."""
    is_wide, source = torch.backends.cpu.get_cpu_capability() == "AVX512", Path("/proc/cpuinfo")
    return is_wide and "AuthenticAMD" in (source.read_text("utf-8") if source.exists() else platform.processor())


USES_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and _is_amd_with_avx512()


def linear(
    x: Float[Tensor, "*batch in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """Return x @ weight.T + bias. A single row, which is what decoding has, goes to the product of matrix and vector.

    On a CPU that reads a bfloat16 matrix up to 1.7 times as fast as the general product does, float32 no slower.
    """
    if x.numel() != x.shape[-1] or x.dtype != weight.dtype:  # the latter under autocast, which knows no addmv
        if USES_ONEDNN and _fits_onednn(x, weight):
            return _OneDnn.apply(x, weight, bias)
        return F.linear(x, weight, bias)
    row = x.reshape(-1)
    y = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
    return y.view(*x.shape[:-1], -1)


def product(a: Float[Tensor, "*batch inner"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "*batch columns"]:
    """Multiply a @ b, by the same choice as `linear`."""
    return _OneDnn.apply(a, b.mT, None) if USES_ONEDNN and _fits_onednn(a, b) else a @ b


def _fits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether this is plain float32 on a CPU, outside autocast, compiled or traced code and torch.func's
    transforms. It must not depend on the number of rows, so that a row has the same bits in any batch."""
    return (
        weight.numel() >= SMALL
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
    )


class _OneDnn(torch.autograd.Function):
    """x @ weight.T + bias by oneDNN, which knows the whole width of AMD's processors; its gradients likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (wanted,) = ctx.saved_tensors, upstream
        rows = wanted.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(wanted, weight) if needs_x else None,
            product(rows.mT, x.flatten(0, -2)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


@cache
def triton_kernels(device: torch.device) -> Any:
    """Return the module of the kernels in Triton for an NVIDIA GPU; None if there is no Triton or another device."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return import_module("keifu.layers.transformer.triton_kernels")


class Linear(nn.Linear):
    """`nn.Linear` through `linear`; what else may stand in its place keeps `weight`, `bias` and the shapes."""

    def forward(self, input: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:  # noqa: A002
        return linear(input, self.weight, self.bias)


class JoinedLinear(Linear):
    """A `Linear` whose rows are several matrices one above the other: queries, keys and values, or gate and up.

    `parts` are their numbers of rows: who uses the output splits it by them, and weights are loaded, saved, adapted
    and orthogonalised part by part.
    """

    def __init__(self, in_features: int, parts: Sequence[int], bias: bool = True):
        super().__init__(in_features, sum(parts), bias)
        self.parts = tuple(parts)

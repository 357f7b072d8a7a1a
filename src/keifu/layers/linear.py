"""Linear layers with the fastest matrix multiplication that PyTorch has for one row, for many rows, and for this CPU;
and joined matrices (q, k, v), which are multiplied at once."""

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

SMALL = 2**13  # numbers of a matrix; for smaller ones the choice costs more time than it saves


def _is_amd_with_avx512() -> bool:
    """Return whether MKL, which PyTorch uses for float32, uses only half of the CPU's vector width, as on AMD with
    AVX-512."""
    is_wide, source = torch.backends.cpu.get_cpu_capability() == "AVX512", Path("/proc/cpuinfo")
    return is_wide and "AuthenticAMD" in (source.read_text("utf-8") if source.exists() else platform.processor())


USES_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available() and _is_amd_with_avx512()


def linear(
    x: Float[Tensor, "*batch in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """Return x @ weight.T + bias. A single row, as in decoding, uses a matrix-vector multiplication.

    On a CPU, that reads a bfloat16 matrix up to 1.7 times as fast as the general multiplication, and float32 no slower.
    """
    # dtypes differ under autocast, which does not support addmv
    if x.numel() != x.shape[-1] or x.dtype != weight.dtype:
        if USES_ONEDNN and _fits_onednn(x, weight):
            return _OneDnn.apply(x, weight, bias)
        return F.linear(x, weight, bias)
    row = x.reshape(-1)
    y = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
    return y.view(*x.shape[:-1], -1)


def product(a: Float[Tensor, "*batch inner"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "*batch columns"]:
    """Return a @ b, with the same choice of the implementation as in `linear`."""
    return _OneDnn.apply(a, b.mT, None) if USES_ONEDNN and _fits_onednn(a, b) else a @ b


def _fits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether the tensors are plain float32 on a CPU, outside autocast, compiled or traced code and torch.func's
    transforms.

    The result must not depend on the number of rows, so that a row has the same bits in any batch.
    """
    return (
        weight.numel() >= SMALL
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() > 0
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        # with columns of a wider matrix oneDNN takes its reference loops, which are hundreds of times as slow
        and (weight.is_contiguous() or weight.mT.is_contiguous())
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
    )


class _OneDnn(torch.autograd.Function):
    """x @ weight.T + bias by oneDNN, which uses the whole vector width of AMD's CPUs; the same for its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (gradient,) = ctx.saved_tensors, upstream
        rows = gradient.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(gradient, weight) if needs_x else None,
            product(rows.mT, x.flatten(0, -2)) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def product_dtype(like: Tensor) -> torch.dtype:
    """Return the dtype of matrix multiplications: autocast's if it is on, otherwise that of `like`."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


@cache
def triton_kernels(device: torch.device) -> Any:
    """Return the module of Triton kernels for an NVIDIA GPU; None if there is no Triton, or for another device."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    return import_module("keifu.layers.transformer.triton_kernels")


class Linear(nn.Linear):
    """`nn.Linear` that calls `linear`. A replacement must keep `weight`, `bias` and the shapes."""

    def forward(self, input: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:  # noqa: A002
        return linear(input, self.weight, self.bias)


class JoinedLinear(Linear):
    """A `Linear` whose weight joins several matrices by rows: queries, keys and values, or gate and up.

    parts: their row counts. The user of the output splits it by them. Weights are loaded, saved, adapted and
    orthogonalised part by part.
    """

    def __init__(self, in_features: int, parts: Sequence[int], bias: bool = True):
        super().__init__(in_features, sum(parts), bias)
        self.parts = tuple(parts)

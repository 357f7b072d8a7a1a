"""Normalisations that torch lacks, or whose published rounding differs from torch's. (Plain LayerNorm is torch's.)"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Norm x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich, 2019): computed in float32, rounded, then scaled.

    A GPU has one kernel for all of this, which scales before it rounds.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        if x.dtype == torch.float32 or (x.device.type != "cpu" and x.dtype == self.weight.dtype):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class PlainRMSNorm(nn.Module):
    """Norm x / sqrt(mean(x²) + eps), without weights (nanochat, 2025): computed in float32, then rounded."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return F.rms_norm(x.float(), (self.dim,), None, self.eps).to(x.dtype)


class ScaledRMSNorm(RMSNorm):
    """RMSNorm times a constant. As the final norm it scales the logits, since the head is linear (Granite, 2024)."""

    def __init__(self, dim: int, eps: float, scale: float):
        super().__init__(dim, eps)
        self.scale = scale

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return super().forward(x) * self.scale


class UnitOffsetRMSNorm(nn.Module):
    """Norm x / sqrt(mean(x²) + eps) · (1 + weight), all in float32, then rounded. Weights start at 0 (Gemma, 2024)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)


class FullPrecisionRMSNorm(RMSNorm):
    """RMSNorm that multiplies by the weight in float32 and rounds once, at the end (OLMo 2, 2024; gpt-oss, 2025)."""

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """RMSNorm whose result is multiplied by SiLU of a gate (Mamba-2, Dao and Gu, 2024; Gated DeltaNet)."""

    def forward(self, x: Float[Tensor, "*batch dim"], gate: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return (super().forward(x) * F.silu(gate.float())).to(x.dtype)


class AllHeadsRMSNorm(FullPrecisionRMSNorm):
    """RMSNorm of queries or keys over all heads together, `dim` = heads · head_dim (OLMo 2, 2024, section 3.3)."""

    def forward(self, x: Float[Tensor, "*batch heads head_dim"]) -> Float[Tensor, "*batch heads head_dim"]:
        return super().forward(x.flatten(-2)).unflatten(-1, x.shape[-2:])


class ScaledLayerNorm(nn.LayerNorm):
    """LayerNorm without bias, times a constant. As the final norm it scales the logits, since the head is linear. PaLM
    divides them by √dim, because its head is the embedding, whose numbers are near 1 (Chowdhery et al., 2022)."""

    def __init__(self, dim: int, eps: float = 1e-5, scale: float = 1.0):
        super().__init__(dim, eps, bias=False)
        self.scale = scale

    def forward(self, input: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:  # noqa: A002
        return super().forward(input) * self.scale

"""Adafactor without factoring (Shazeer and Stern, 2018), the optimizer of PaLM (Chowdhery et al., 2022, section 5).

PaLM's paper calls it Adam with parameter scaling. This code follows T5X, which trained PaLM: the momentum averages the
scaled update, without bias correction, and the weight decay is decoupled. PaLM's paper does not say whether updates
were clipped; here they are, with Shazeer and Stern's threshold d = 1.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

SQUARE_EPSILON, SCALE_EPSILON = 1e-30, 1e-3  # ε₁ and ε₂ of the paper's section 8
DECAY = 0.8  # exponent of the decay β₂ of the squares (section 7.2)
CLIP_THRESHOLD = 1.0  # d of section 6: the largest root mean square of an update, before it is scaled

Rows = Mapping[Tensor, tuple[int, ...]]


class Adafactor(torch.optim.Optimizer):
    """Update k (from 1) of a tensor X with the gradient G, where RMS is the root mean square of a tensor:

    V ← β₂ V + (1 − β₂)(G² + ε₁), with β₂ = 1 − k^−0.8;  U = G / √V;  U ← U / max(1, RMS(U));
    M ← β₁ M + (1 − β₁) · lr · max(ε₂, RMS(X)) · U;  X ← (1 − weight_decay · lr²) X − M.

    rows: row counts of the matrices of each joined parameter; each matrix is a separate X. `lr` is relative: 0.01
    changes a tensor by 1% of its size. Weight decay is multiplied by lr², as in PaLM; in transformers' class by lr ·
    max(ε₂, RMS(X)), and in torch's, which has no momentum, by lr. Both of these factor matrices. All tensors are
    updated together, without a copy to the host.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, beta1: float = 0.9, weight_decay: float = 0.0, rows: Rows | None = None
    ):
        super().__init__(params, {"lr": lr, "beta1": beta1, "weight_decay": weight_decay})
        self.rows = rows or {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every tensor that has a gradient."""
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state(p) for p in parameters]
        torch._foreach_add_([state["step"] for state in states], 1)  # pyright: ignore
        weights = self._split(parameters, parameters)
        counts = [(float(state["step"]), len(self._of(p))) for state, p in zip(states, parameters, strict=True)]
        new = [step**-DECAY for step, matrices in counts for _ in range(matrices)]
        squares = self._split(parameters, [state["square"] for state in states])
        directions = _directions(squares, self._split(parameters, [p.grad for p in parameters]), new)
        torch._foreach_mul_(directions, _scales(weights, directions, group["lr"]))  # pyright: ignore
        means = self._split(parameters, [state["mean"] for state in states])
        torch._foreach_lerp_(means, directions, 1 - group["beta1"])  # pyright: ignore
        torch._foreach_mul_(weights, 1 - group["weight_decay"] * group["lr"] ** 2)  # pyright: ignore
        torch._foreach_sub_(weights, means)  # pyright: ignore

    def _of(self, p: Tensor) -> tuple[int, ...]:
        """Return the row count of each matrix of a parameter."""
        return self.rows.get(p) or tuple(p.shape[:1]) or (1,)

    def _split(self, parameters: list[Tensor], tensors: list[Any]) -> list[Tensor]:
        """Split tensors that have the parameters' shapes into the matrices of each parameter."""
        pairs = zip(parameters, tensors, strict=True)
        return [part for p, tensor in pairs for part in (tensor.split(self._of(p)) if tensor.dim() else (tensor,))]

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        if not self.state[p]:  # the step stays on the host, which computes β₂ from it
            self.state[p].update(step=torch.zeros(()), square=torch.zeros_like(p), mean=torch.zeros_like(p))
        return self.state[p]


def _directions(squares: list[Tensor], gradients: list[Tensor], new: list[float]) -> list[Tensor]:
    """Update V in place, and return U before its clip. new: 1 − β₂ of each tensor."""
    torch._foreach_mul_(squares, [1 - share for share in new])  # pyright: ignore
    torch._foreach_addcmul_(squares, gradients, gradients, new)  # pyright: ignore
    torch._foreach_add_(squares, [share * SQUARE_EPSILON for share in new])  # pyright: ignore
    directions = torch._foreach_rsqrt(squares)  # pyright: ignore
    torch._foreach_mul_(directions, gradients)  # pyright: ignore
    return list(directions)


def _scales(weights: list[Tensor], directions: list[Tensor], rate: float) -> tuple[Tensor, ...]:
    """Return rate · max(ε₂, RMS(X)) / max(1, RMS(U)) of each tensor, on the tensors' device."""
    size, change = _root_mean_squares(weights), _root_mean_squares(directions)
    return (rate * size.clamp(min=SCALE_EPSILON) / (change / CLIP_THRESHOLD).clamp(min=1)).unbind()


def _root_mean_squares(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors)  # pyright: ignore
    return torch.stack(torch._foreach_mul(norms, [tensor.numel() ** -0.5 for tensor in tensors]))  # pyright: ignore

"""Adafactor without factoring (Shazeer and Stern, 2018), as PaLM was trained with; knows no model and no schedule.

"Adam with parameter scaling" (Chowdhery et al., 2022, section 5). It is written as T5X, which trained PaLM, has it: the
momentum is of the finished update, without a correction of its first steps, and what decays is the weight itself.
PaLM's paper does not say whether the update's own clip was on; here it is, at Shazeer and Stern's 1.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

SQUARE_EPSILON, SCALE_EPSILON = 1e-30, 1e-3  # ε₁ and ε₂ of the paper's section 8
LARGEST = 1.0  # d of section 6: the root mean square of an update, before it is scaled


class Adafactor(torch.optim.Optimizer):
    """Update k (from 1) of a tensor X with the gradient G, RMS being the root of the mean square of all numbers:

    V ← β₂ V + (1 − β₂)(G² + ε₁), with β₂ = 1 − k^−0.8;  U = G / √V;  U ← U / max(1, RMS(U));
    M ← β₁ M + (1 − β₁) · lr · max(ε₂, RMS(X)) · U;  X ← (1 − weight_decay · lr²) X − M.

    All tensors are worked on together, and none is read by the host. `lr` is relative: 0.01 moves a tensor by 1% of its
    size. The decay of lr² is PaLM's; transformers' class decays by lr · max(ε₂, RMS(X)), torch's, which has no
    momentum, by lr, and both factor matrices.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, beta1: float = 0.9, decay: float = 0.8, weight_decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "beta1": beta1, "decay": decay, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every tensor that has a gradient."""
        for group in self.param_groups:
            if weights := [p for p in group["params"] if p.grad is not None]:
                self._update(weights, group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state(p) for p in weights]
        directions = _directions(states, [p.grad for p in weights], group["decay"])
        scales = _scales(weights, directions, group["lr"])
        torch._foreach_mul_(directions, scales)  # pyright: ignore
        means = [state["mean"] for state in states]
        torch._foreach_lerp_(means, directions, 1 - group["beta1"])  # pyright: ignore
        torch._foreach_mul_(weights, 1 - group["weight_decay"] * group["lr"] ** 2)  # pyright: ignore
        torch._foreach_sub_(weights, means)  # pyright: ignore

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        if not self.state[p]:  # the step stays on the host, where β₂ is made of it
            self.state[p].update(step=torch.zeros(()), square=torch.zeros_like(p), mean=torch.zeros_like(p))
        return self.state[p]


def _directions(states: list[dict[str, Tensor]], gradients: list[Any], decay: float) -> list[Tensor]:
    """U before its clip, after V has taken the gradients in."""
    squares, steps = [state["square"] for state in states], [state["step"] for state in states]
    torch._foreach_add_(steps, 1)  # pyright: ignore
    new = [float(step) ** -decay for step in steps]  # 1 − β₂
    torch._foreach_mul_(squares, [1 - share for share in new])  # pyright: ignore
    torch._foreach_addcmul_(squares, gradients, gradients, new)  # pyright: ignore
    torch._foreach_add_(squares, [share * SQUARE_EPSILON for share in new])  # pyright: ignore
    directions = torch._foreach_rsqrt(squares)  # pyright: ignore
    torch._foreach_mul_(directions, gradients)  # pyright: ignore
    return list(directions)


def _scales(weights: list[Tensor], directions: list[Tensor], rate: float) -> tuple[Tensor, ...]:
    """rate · max(ε₂, RMS(X)) / max(1, RMS(U)) of each tensor, where the tensors are."""
    size, change = _root_mean_squares(weights), _root_mean_squares(directions)
    return (rate * size.clamp(min=SCALE_EPSILON) / (change / LARGEST).clamp(min=1)).unbind()


def _root_mean_squares(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors)  # pyright: ignore
    return torch.stack(torch._foreach_mul(norms, [each.numel() ** -0.5 for each in tensors]))  # pyright: ignore

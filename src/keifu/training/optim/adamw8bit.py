"""AdamW with its two averages in 8 bits, a scale for each block of 256 numbers (Dettmers et al., 2022).

A code is the rounded root of a number's share of its block's largest: the square root of the first average, with a
sign, and the fourth root of the second one, so that small numbers keep digits. (The paper has a table of levels.)
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 256
SMALL = 4096  # numbers of a tensor below which its averages stay in float32


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay and bias correction as torch's AdamW; 2 bytes of state for each number instead of 8."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every tensor that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    _update(p, p.grad.float(), self.state[p], group)


def _update(p: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """Update one tensor and its state."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    if not state:
        state["step"] = torch.zeros(())  # on the host, where the bias corrections are made of it
    state["step"] += 1
    count = float(state["step"])
    mean = _load(state, "mean", p).lerp_(gradient, 1 - beta1)
    square = _load(state, "square", p).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    p.mul_(1 - rate * group["weight_decay"])
    spread = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
    p.addcdiv_(mean, spread, value=-rate / (1 - beta1**count))
    _keep(state, "mean", mean)
    _keep(state, "square", square)


def _load(state: dict[str, Tensor], name: str, p: Tensor) -> Tensor:
    """Return an average in float32, 0 at first."""
    kept = state[name] if name in state else torch.zeros_like(p, dtype=torch.float32)
    if kept.dtype == torch.float32:
        return kept
    share = kept.float() / (127 if name == "mean" else 255)
    share = share * share.abs() if name == "mean" else share.square().square()
    return _blocks(share).mul_(state[f"{name}_scale"][:, None]).flatten()[: p.numel()].view_as(p)


def _keep(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Put an average into the state, in 8 bits if it is large enough."""
    state[name], blocks = value, _blocks(value)
    if value.numel() < SMALL:
        return
    scale = blocks.abs().amax(1)
    share = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    if name == "mean":
        codes = (share.abs().sqrt() * 127).round().copysign(share).to(torch.int8)
    else:  # rounded up: the divisor of an update is never too small
        codes = (share.sqrt().sqrt() * 255).ceil().to(torch.uint8)
    state[name] = codes.flatten()[: value.numel()].view_as(value)
    state[f"{name}_scale"] = scale


def _blocks(x: Tensor) -> Tensor:
    """Return the numbers as rows of `BLOCK`, with zeros behind the last one."""
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)

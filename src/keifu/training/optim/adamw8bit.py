"""AdamW whose two averages are stored in 8 bits, with a scale for each block of 256 numbers (Dettmers et al., 2022).

A code is a root of |number| / (largest magnitude of its block), rounded: the square root with a sign for the first
average, and the fourth root for the second one. Roots give small numbers more precision. (The paper uses a table of
levels.)
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 256
SMALL = 4096  # averages of tensors with fewer numbers stay in float32


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 2 bytes of state per number instead of 8. Weight decay and bias correction are those of
    torch's AdamW."""

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
        state["step"] = torch.zeros(())  # on the host, which computes the bias corrections
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
    """Return an average in float32, decoded if stored in 8 bits; zeros before the first update."""
    stored = state[name] if name in state else torch.zeros_like(p, dtype=torch.float32)
    if stored.dtype == torch.float32:
        return stored
    share = stored.float() / (127 if name == "mean" else 255)
    share = share * share.abs() if name == "mean" else share.square().square()
    return _blocks(share).mul_(state[f"{name}_scale"][:, None]).flatten()[: p.numel()].view_as(p)


def _keep(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Store an average in the state, in 8 bits if it is large enough."""
    state[name], blocks = value, _blocks(value)
    if value.numel() < SMALL:
        return
    scale = blocks.abs().amax(1)
    share = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    if name == "mean":
        codes = (share.abs().sqrt() * 127).round().copysign(share).to(torch.int8)
    else:  # rounded up, so that an update's divisor is never too small
        codes = (share.sqrt().sqrt() * 255).ceil().to(torch.uint8)
    state[name] = codes.flatten()[: value.numel()].view_as(value)
    state[f"{name}_scale"] = scale


def _blocks(x: Tensor) -> Tensor:
    """Reshape to (blocks, BLOCK), padded with zeros."""
    return torch.nn.functional.pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)

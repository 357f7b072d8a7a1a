"""64-bit numbers on devices that have none (Apple's GPU): such computations are done in the CPU's memory."""

import torch
from torch import Tensor

WITHOUT = {"mps"}  # device types that lack float64


def wide(x: Tensor) -> Tensor:
    """Return x where float64 is: itself, or a copy in the CPU's memory of what lies on a device without it."""
    return x.cpu() if x.device.type in WITHOUT else x


def narrow(x: Tensor, device: torch.device) -> Tensor:
    """Return a float64 tensor on the device that `wide` took it from; as float32 where that has no float64, and then
    what lies below 1 stays below 1."""
    if device.type not in WITHOUT:
        return x
    return torch.where(x < 1, x.float().clamp(max=1 - 2.0**-24), x.float()).to(device)

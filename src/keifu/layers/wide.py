"""64-bit computations for devices that do not support them (Apple's GPU): they run on the CPU."""

import torch
from torch import Tensor

WITHOUT = {"mps"}  # device types that lack float64


def wide(x: Tensor) -> Tensor:
    """Return x itself, or a copy on the CPU if the device of x lacks float64."""
    return x.cpu() if x.device.type in WITHOUT else x


def narrow(x: Tensor, device: torch.device) -> Tensor:
    """Return a float64 tensor on the given device. If the device lacks float64, it becomes float32, and numbers below 1
    stay below 1."""
    if device.type not in WITHOUT:
        return x
    return torch.where(x < 1, x.float().clamp(max=1 - 2.0**-24), x.float()).to(device)

"""How many operations a device can do, and how many a pass needs; knows no model.

A multiplication and an addition count as two operations (FLOPs).
"""

import functools
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

SECONDS = 0.2


@functools.cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large square matrix product, the best of those that fit in 0.2 s after a first one."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, seconds(lambda: torch.mm(a, b), device))
    return 2 * size**3 / best


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long some work takes, with what it has put into the device's queue."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Waits for the device's queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention in some work, forward and backward, counted by torch.

    For a language model this is PaLM's 6N + 12·L·H·Q·T per token (appendix B): causal attention counts in full.
    """
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    return 2 * sdpa_flop_count(query, key, value)

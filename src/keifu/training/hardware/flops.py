"""The peak FLOPs per second of a device, and the FLOPs of a forward and backward pass.

A multiplication and an addition count as two operations.
"""

import functools
import re
from collections.abc import Callable
from time import perf_counter

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from keifu.layers.linear import product

SECONDS = 0.2
# Published peaks of dense matrix multiplications accumulated in float32, in TFLOP/s: in bfloat16, float16 and float32
# (TF32 if the device has tensor cores). The tests compute them again as units x clock x operations per clock, except
# B200 and H100 NVL, whose clocks are not published: these figures are from NVIDIA's data sheets. The first pattern that
# matches a GPU's name counts. Each die of AMD's cards with two dies is a device.
TFLOPS = {
    r"\bB200\b": (2250, 2250, 1125),
    r"\bH100 PCIe\b": (756, 756, 378),
    r"\bH100 NVL\b": (835, 835, 418),
    r"\b(H100|H200|GH200)\b": (989, 989, 495),
    r"\b(A100|A800)\b": (312, 312, 156),
    r"\bA30$": (165, 165, 82),
    r"\bA40$": (150, 150, 75),
    r"\bA10$": (125, 125, 62.5),
    r"\bRTX A6000$": (155, 155, 77.4),
    r"\bL40S$": (362, 362, 183),
    r"\bL40$": (181, 181, 90.5),
    r"\bL4$": (121, 121, 60.5),
    r"\bT4$": (0, 65, 8.1),
    r"\bV100\b.*PCIE": (0, 112, 14),
    r"\bV100\b": (0, 125, 15.7),
    r"\bRTX 3090$": (71, 71, 35.6),
    r"\bRTX 4090$": (165, 165, 82.6),
    r"\bRTX 5090$": (209.5, 209.5, 104.8),
    r"\bMI100\b": (92.3, 184.6, 46.1),
    r"\bMI210\b": (181, 181, 45.3),
    r"\bMI250X\b": (191.5, 191.5, 47.9),
    r"\bMI250\b": (181, 181, 45.3),
    r"\bMI300A\b": (981, 981, 490),
    r"\b(MI300X|MI325X)\b": (1307, 1307, 654),
}
FORMATS = (torch.bfloat16, torch.float16, torch.float32)


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return a device's peak FLOPs per second of matrix multiplications: published for common GPUs, otherwise
    measured."""
    published = named_peak(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    return published or matmul_peak(device, dtype)


def named_peak(name: str, dtype: torch.dtype) -> float | None:
    """Return the published peak of a GPU by its name; None for an unknown GPU, or a format that it does not support."""
    row = next((figures for pattern, figures in TFLOPS.items() if re.search(pattern, name)), None)
    return row[FORMATS.index(dtype)] * 1e12 or None if row else None


@functools.cache
def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = SECONDS) -> float:
    """Return the result of the first call of `measure_peak` in this process."""
    return measure_peak(device, dtype, seconds)


def measure_peak(device: torch.device, dtype: torch.dtype, seconds: float = SECONDS) -> float:
    """Measure the FLOPs per second of a large square matrix multiplication; return the best of all repetitions."""
    size = {"cuda": 8192, "mps": 4096}.get(device.type, 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), perf_counter() + seconds
    while best == float("inf") or perf_counter() < end:
        best = min(best, time_call(lambda: product(a, b), device))
    return 2 * size**3 / best


def time_call(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a function takes, until the device has finished its work."""
    synchronize(device)
    start = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work. Do nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def count_flops(work: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix multiplications, convolutions and attention in `work`, counted by torch.

    For a language model this is PaLM's 6N + 12·L·H·Q·T per token (appendix B): causal attention counts as full
    attention.
    """
    aten = torch.ops.aten
    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        torch.ops.mkldnn._linear_pointwise: _linear,
        aten.mkldnn_rnn_layer: _recurrent,
        aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        work()
    return counter.get_total_flops()


def _linear(x: torch.Size, weight: torch.Size, *_, **__) -> int:
    return 2 * x.numel() * weight[0]


def _recurrent(x: torch.Size, input_weight: torch.Size, recurrent_weight: torch.Size, *_, **__) -> int:
    """Count a fused recurrent layer: each token is multiplied with both matrices."""
    return 2 * x[:-1].numel() * (input_weight.numel() + recurrent_weight.numel())


def _recurrent_backward(*shapes, **__) -> int:
    return 2 * _recurrent(*shapes)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    return 2 * sdpa_flop_count(query, key, value)

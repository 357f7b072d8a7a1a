"""Mixed precision: the number format of matrix products, autocast, TF32, and loss scaling for float16."""

import functools
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

NATIVE = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")  # the flags of x86 and of Arm processors


@functools.cache
def processor(field: str) -> str:
    """A field of Linux's /proc/cpuinfo; empty on other systems."""
    source = Path("/proc/cpuinfo")
    text = source.read_text() if source.exists() else ""
    found = re.search(rf"^(?:{field})\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def processor_name() -> str:
    """The model name of the processor."""
    return processor("model name") or platform.processor() or platform.machine()


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices natively, not emulated in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "cpu" and bool(NATIVE.search(processor("flags|Features")))


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The number format of a precision setting on this device: `auto` is bfloat16 where the device has it, otherwise
    float16 on a GPU and float32 on a CPU."""
    if precision == "auto":
        half = torch.float32 if device.type == "cpu" else torch.float16
        return torch.bfloat16 if has_bfloat16(device) else half
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The autocast context of a forward pass; it does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@contextmanager
def tensor_float32(device: torch.device) -> Iterator[None]:
    """A block in which an NVIDIA GPU computes float32 products as TF32 (10 bits of mantissa) on tensor cores."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    backends: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32"
    try:
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value


class LossScale:
    """Dynamic loss scaling: the factor of the loss before the backward pass, so that small gradients do not underflow
    in float16 (Micikevicius et al., 2018, section 3.2); 1 for every other format.

    Like torch.amp.GradScaler, it starts at 65,536, is halved where a gradient is not finite, and doubled after 2,000
    steps without. Unlike there, a step whose gradient was not finite is computed again with the lower scale, not
    skipped.
    """

    FIRST, INTERVAL = 65_536.0, 2_000

    def __init__(self, dtype: torch.dtype):
        self.moves = dtype == torch.float16
        self.load()

    def load(self, value: float | None = None, steps: int = 0) -> None:
        """Restores what `facts` gave, or begins anew."""
        self.value = (value or self.FIRST) if self.moves else 1.0
        self.steps = steps

    def lower(self) -> bool:
        """Halves the scale; False where it is fixed, or already 1."""
        if not self.moves or self.value <= 1:
            return False
        self.value /= 2
        self.steps = 0
        return True

    def count(self) -> None:
        """Counts a step that was made, and doubles the scale when it is time."""
        self.steps += self.moves
        if self.steps == self.INTERVAL:
            self.value *= 2
            self.steps = 0

    def facts(self) -> dict[str, float]:
        """The scale and the steps since it was changed, for a checkpoint."""
        return {"value": self.value, "steps": self.steps}

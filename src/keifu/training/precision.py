"""In which number format matrix products are computed, by what the hardware has; knows no model."""

import functools
import platform
import re
from pathlib import Path

import torch

NATIVE = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")  # the flags of x86 and of Arm processors


@functools.cache
def processor(field: str) -> str:
    """A field of what Linux says about the processor; nothing on other systems."""
    source = Path("/proc/cpuinfo")
    text = source.read_text() if source.exists() else ""
    found = re.search(rf"^(?:{field})\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def processor_name() -> str:
    """The processor as its maker calls it."""
    return processor("model name") or platform.processor() or platform.machine()


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself, and not through float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(NATIVE.search(processor("flags|Features")))


def resolve(precision: str, device: torch.device) -> torch.dtype:
    """The format that `auto`, `float32` or `bfloat16` stands for on this device."""
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a forward pass runs; it does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

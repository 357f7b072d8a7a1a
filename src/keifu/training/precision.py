"""In which number format matrix products are computed, by what the hardware has; knows no model."""

import functools
import re
from pathlib import Path

import torch

NATIVE = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")  # the flags of x86 and of Arm processors


@functools.cache
def processor_flags() -> str:
    """What Linux says that the processor can do; nothing on other systems."""
    source = Path("/proc/cpuinfo")
    text = source.read_text() if source.exists() else ""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices itself, and not through float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(NATIVE.search(processor_flags()))


def resolve(precision: str, device: torch.device) -> torch.dtype:
    """The format that `auto`, `float32` or `bfloat16` stands for on this device."""
    if precision == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which a forward pass runs; it does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

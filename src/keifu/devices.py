"""Choice of the device, made only here: CUDA or ROCm if there is one, else Apple's MPS, else the CPU.

The device's name comes from `--device` or `load(..., device=)`, else from the environment variable KEIFU_DEVICE.
`Choice` holds the device options of the command line for the whole process.
"""

import functools
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from keifu.errors import UserError

if TYPE_CHECKING:
    import torch

VARIABLE = "KEIFU_DEVICE"
NATIVE = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")  # flags of x86 and Arm processors in /proc/cpuinfo
KIND = re.compile(r" \(cuda[^)]*\)$|, \d+ threads?$")  # the details of a device name that `same_kind` ignores


@dataclass(frozen=True)
class Choice:
    """Device options of the command line. None leaves a setting to the environment, the machine or the recipe.

    allow_nonfinite: load weights that are not finite. weights: dtype of a model that is run, not trained: float32,
    bfloat16, float16, or auto: bfloat16 on a GPU for a file in float32, else as None (see `checkpoints.load`).
    """

    device: str | None = None
    precision: str | None = None
    compile: bool | None = None
    activation_checkpointing: str | None = None
    optimizer_state: str | None = None
    deterministic: bool | None = None
    allow_nonfinite: bool | None = None
    weights: str | None = None


_choice = Choice()


def device_choice() -> Choice:
    """Return the device options of this process."""
    return _choice


@contextmanager
def choosing(choice: Choice) -> Iterator[None]:
    """Set device options inside a block; unset ones keep their value. Raises `UserError` for a device that this machine
    lacks."""
    global _choice
    if choice.device is not None:
        choose(choice.device)
    before = _choice
    _choice = replace(before, **{name: value for name, value in vars(choice).items() if value is not None})
    try:
        yield
    finally:
        _choice = before


def available() -> list[str]:
    """Return the names of this machine's devices. The default device is first."""
    import torch

    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*(["cuda"] if gpus else []), *gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def choose(name: "str | torch.device | None" = None) -> "torch.device":
    """Return the device of that name. Without a name, use the command line's, then the environment's, then the
    machine's best.

    Raises `UserError`, which lists the available devices, if the name is unknown or this machine lacks the device.
    """
    import torch

    if isinstance(name, torch.device):
        return name
    variable = os.environ.get(VARIABLE)
    said = name or _choice.device
    device_name, exist = said or variable, available()
    if device_name and device_name not in exist:
        start = "There" if said else f"{VARIABLE}: there"
        raise UserError(f"{start} is no device {device_name!r} on this machine, which has {', '.join(exist)}.")
    return torch.device(device_name or exist[0])


def device_name(device: "torch.device") -> str:
    """Return a device's product name for people, such as the GPU's model."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    if device.type == "mps":
        return "Apple's GPU (mps)"
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'' if threads == 1 else 's'}"


def same_kind(one: str, other: str) -> bool:
    """Return whether two results of `device_name` name the same kind of device. Devices of one kind give bitwise equal
    results."""
    return re.sub(KIND, "", one) == re.sub(KIND, "", other)


@functools.cache
def processor(field: str) -> str:
    """Return a field of Linux's /proc/cpuinfo; empty on other systems."""
    source = Path("/proc/cpuinfo")
    text = source.read_text() if source.exists() else ""
    match = re.search(rf"^(?:{field})\s*:(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


def processor_name() -> str:
    """Return the model name of the processor."""
    return processor("model name") or platform.processor() or platform.machine()


def has_bfloat16(device: "torch.device") -> bool:
    """Return whether the device multiplies bfloat16 matrices natively, not emulated in float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "cpu" and bool(NATIVE.search(processor("flags|Features")))


def require_compiler(device: "torch.device") -> None:
    """Raise a `UserError` if torch.compile would find no C++ compiler for a CPU."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        raise UserError("Compiling needs a C++ compiler, and none was found; install g++ or clang++, or leave it out.")

"""The one place that chooses where models run: CUDA or ROCm if there is one, else Apple's MPS, else the CPU.

A name comes from `--device` or `load(..., device=)`, else from the environment's KEIFU_DEVICE. `Choice` holds what a
command line says about how to compute, for the whole process.
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
NATIVE = re.compile(r"\b(avx512_bf16|amx_bf16|bf16)\b")  # the flags of x86 and of Arm processors
KIND = re.compile(r" \(cuda[^)]*\)$|, \d+ threads?$")  # what is no part of a kind's name


@dataclass(frozen=True)
class Choice:
    """How to compute, where a command line says so; None leaves it to the environment, the machine or the recipe.

    allow_nonfinite: load weights that are not finite. weights: type of the weights of a model that is run, not trained:
    float32, bfloat16, float16, or auto: bfloat16 on a GPU for a file in float32, else as stored.
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


def chosen() -> Choice:
    """Return the choice of this process's command line."""
    return _choice


@contextmanager
def choosing(choice: Choice) -> Iterator[None]:
    """Choose the device settings of a block; unset ones stay as they are. A device that this machine lacks is a
    `UserError`.
    """
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
    """Return the names of the devices of this machine, the one that is chosen where nothing is said first."""
    import torch

    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*(["cuda"] if gpus else []), *gpus, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def choose(name: "str | torch.device | None" = None) -> "torch.device":
    """Return the device of that name; without one, of the command line's, the environment's, or else the machine's
    best.

    A name that is none, or a device that this machine has not, is a `UserError` that names those that exist.
    """
    import torch

    if isinstance(name, torch.device):
        return name
    variable = os.environ.get(VARIABLE)
    said = name or _choice.device
    wanted, exist = said or variable, available()
    if wanted and wanted not in exist:
        start = "There" if said else f"{VARIABLE}: there"
        raise UserError(f"{start} is no device {wanted!r} on this machine, which has {', '.join(exist)}.")
    return torch.device(wanted or exist[0])


def device_name(device: "torch.device") -> str:
    """Return the device as a person knows it."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    if device.type == "mps":
        return "Apple's GPU (mps)"
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'' if threads == 1 else 's'}"


def same_kind(one: str, other: str) -> bool:
    """Return whether two names of `device_name` are of devices of one kind, whose results are bitwise the same."""
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

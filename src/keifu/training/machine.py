"""How much memory there is for this process and how much some work takes, on a CPU or a GPU; knows no model."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch

GROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc/meminfo")


def available(device: torch.device) -> int:
    """Bytes that may still be taken: of the GPU, or of the machine and of the container that this process runs in."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, min(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory(), _machine()))
    return min([_machine(), *container()])


def taken(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that some work takes at most beside what is there before it, as CUDA's allocator counts them."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def release(device: torch.device) -> None:
    """Gives back memory that an allocator holds and nothing uses, as after a step that did not fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _machine() -> int:
    """Linux and Windows say what is available; elsewhere it is what is free, or all there is."""
    if PROC.exists():
        fields = dict(line.split(":", 1) for line in PROC.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    if not hasattr(os, "sysconf"):
        return _windows()
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *[(name, ctypes.c_uint64) for name in ("total", "available", *"abcde")],
    ]


def _windows() -> int:
    """Bytes of memory that Windows says are available."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # pyright: ignore[reportAttributeAccessIssue]
        raise ctypes.WinError()  # pyright: ignore[reportAttributeAccessIssue]
    return status.available


def container(groups: Path = GROUPS) -> list[int]:
    """What control groups leave, for each of version 2 and 1 that limits; caches that can be dropped count as free."""
    places = (
        (groups / "memory.max", groups / "memory.current", groups / "memory.stat", "inactive_file"),
        (
            groups / "memory/memory.limit_in_bytes",
            groups / "memory/memory.usage_in_bytes",
            groups / "memory/memory.stat",
            "total_inactive_file",
        ),
    )
    return [left for place in places if (left := _left(*place)) is not None]


def _left(limit: Path, usage: Path, statistics: Path, droppable: str) -> int | None:
    if not (limit.exists() and usage.exists()) or limit.read_text().strip() == "max":
        return None
    lines = statistics.read_text().splitlines() if statistics.exists() else []
    caches = sum(int(line.split()[1]) for line in lines if line.split()[0] == droppable)
    return max(0, int(limit.read_text()) - int(usage.read_text()) + caches)

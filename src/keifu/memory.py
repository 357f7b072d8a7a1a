"""Memory: what is free of a GPU's, or of the machine's within the limits of its container, and how fast it is read."""

import ctypes
import os
import time
from pathlib import Path

import torch

GROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc/meminfo")


def available_memory(device: torch.device) -> int:
    """Bytes of free memory: of the GPU, or of the machine within the limits of the container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, min(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory(), _machine()))
    return min([_machine(), *container()])


def _machine() -> int:
    """Available memory on Linux and Windows; elsewhere free memory, or all memory."""
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
    """Bytes of available memory on Windows."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # pyright: ignore[reportAttributeAccessIssue]
        raise ctypes.WinError()  # pyright: ignore[reportAttributeAccessIssue]
    return status.available


def container(groups: Path = GROUPS) -> list[int]:
    """Bytes left by each control group (version 2, version 1) that has a limit; droppable caches count as free."""
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


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which a device reads memory: products of matrices too large for any cache with one vector."""
    matrices = [torch.ones(8192, 4096, device=device) for _ in range(8)]  # 1 GiB
    vector = torch.ones(4096, device=device)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        total = sum(torch.mv(matrix, vector)[0] for matrix in matrices)
        assert float(total) == 8 * 4096  # which waits for the device
        best = min(best, time.perf_counter() - start)
    return sum(matrix.nbytes for matrix in matrices) / best

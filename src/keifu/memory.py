"""Memory: free memory of a GPU, or of the machine within its container's limits; memory kept by allocators; read
bandwidth."""

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from keifu.threads import GROUPS, OWN_GROUP, control_groups

PROC = Path("/proc/meminfo")
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8  # parameters of glibc's mallopt


def available_memory(device: torch.device) -> int:
    """Return the free bytes of the GPU, or of the machine within its container's limits. Processes that torchrun
    started on the machine share it equally."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, min(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory(), _machine()))
    return min([_machine(), *container(), *address_space()]) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _machine() -> int:
    """Return the machine's available bytes on Linux and Windows; on other systems the free bytes, or all if unknown."""
    if PROC.exists():
        fields = dict(line.split(":", 1) for line in PROC.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    if not hasattr(os, "sysconf"):
        return _windows()
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


class _MemoryStatus(ctypes.Structure):
    """Windows structure MEMORYSTATUSEX."""

    _fields_ = [*[(name, ctypes.c_uint32) for name in ("length", "load")],
                *[(name, ctypes.c_uint64) for name in ("total", "available", *"abcde")]]  # fmt: skip


def _windows() -> int:
    """Return the bytes of available memory on Windows."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # pyright: ignore[reportAttributeAccessIssue]
        raise ctypes.WinError()  # pyright: ignore[reportAttributeAccessIssue]
    return status.available


def container(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> list[int]:
    """Return the free bytes within each control group (version 1 or 2) that has a limit. Caches that can be dropped
    count as free."""
    limits = [(group, "memory.max", "memory.current", "inactive_file") for group in control_groups(groups, own_group)]
    limits.append((groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
    return [free_bytes for limit in limits if (free_bytes := _free_bytes(*limit)) is not None]


def _free_bytes(group: Path, most: str, usage_file: str, droppable: str) -> int | None:
    limit, usage, statistics = group / most, group / usage_file, group / "memory.stat"
    if not (limit.exists() and usage.exists()) or limit.read_text().strip() == "max":
        return None
    lines = statistics.read_text().splitlines() if statistics.exists() else []
    caches = sum(int(line.split()[1]) for line in lines if line.split()[0] == droppable)
    return max(0, int(limit.read_text()) - int(usage.read_text()) + caches)


def address_space() -> list[int]:
    """Return the bytes that this process may still map, if a limit is set for it (`ulimit -v`)."""
    if not PROC.exists():  # only Linux says how much is mapped
        return []
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return [] if limit == resource.RLIM_INFINITY else [max(0, limit - pages * resource.getpagesize())]


def release(device: torch.device) -> None:
    """Return an allocator's unused memory to the system, for example after a step that ran out of memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif glibc := _glibc():
        glibc.malloc_trim(0)


@contextmanager
def keep_freed(device: torch.device) -> Iterator[None]:
    """Make the CPU allocator (glibc) keep memory that is freed in this block for later allocations. `release` returns
    it."""
    glibc = _glibc() if device.type == "cpu" else None
    if not glibc:
        yield
        return
    # By default a large tensor's memory goes back to the system when it is freed. The next tensor then causes a page
    # fault for each page: 240,000 in a step of GPT-2 124M, a fifth of its time.
    glibc.mallopt(MMAP_MAX, 0)
    glibc.mallopt(TRIM_THRESHOLD, -1)
    _keeping.append(device)
    try:
        yield
    finally:
        _keeping.pop()
        glibc.mallopt(MMAP_MAX, 65_536)
        reuse_freed()
        release(device)


_keeping: list[torch.device] = []  # one entry for each `keep_freed` block that is active


def reuse_freed() -> None:
    """Let glibc keep freed blocks of up to 32 MB, 64 MB in all, for later allocations. These are the largest values to
    which its thresholds adapt by themselves. Otherwise each token's logits of a batch begin as new pages."""
    if not _keeping and (glibc := _glibc()):
        glibc.mallopt(MMAP_THRESHOLD, 2**25)
        glibc.mallopt(TRIM_THRESHOLD, 2**26)


def share_freed() -> None:
    """Let all threads of this process allocate from one arena of glibc. Call it before threads start,
    because the arena of a running thread remains.

    By default there are up to eight arenas per core, and memory that is freed in one is of no use to the threads of
    another. A service whose threads come and go then grows for hours, although it uses no more.
    """
    if glibc := _glibc():
        glibc.mallopt(ARENA_MAX, 1)


def _glibc() -> Any:
    """Return the C library if it is glibc, else None."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None


def read_bandwidth(device: torch.device) -> float:
    """Return the bytes per second at which a device reads memory. It sums numbers too many for any cache."""
    parts = [torch.ones(1 << 25, device=device) for _ in range(8)]  # 1 GiB
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        total = sum(part.sum() for part in parts)
        assert float(total) == 1 << 28  # converting to float waits for the device
        best = min(best, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / best

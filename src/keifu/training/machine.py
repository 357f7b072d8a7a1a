"""How much memory there is for this process, on a CPU or a GPU; knows no model."""

import os
from pathlib import Path

import torch

GROUPS = Path("/sys/fs/cgroup")


def available(device: torch.device) -> int:
    """Bytes that may still be taken: of the GPU, or of the machine and of the container that this process runs in."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min([_machine(), *container()])


def _machine() -> int:
    """Linux says what is available; elsewhere it is what is free, or all there is."""
    source = Path("/proc/meminfo")
    if source.exists():
        fields = dict(line.split(":", 1) for line in source.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


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

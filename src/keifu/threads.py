"""Control of compute threads by the machine's load: how they wait, and on which cores they run. It does not import
torch.

OpenMP threads wait for work in a loop ("spin"), which is fastest on free cores. If other programs use the cores, a
spinning thread takes a core from a working one, and all threads wait for a thread that has no core. So while others use
cores, this module makes waiting threads sleep, and moves all threads to the remaining cores.

PyTorch's wheels for Linux contain GNU's OpenMP. It reads its waiting policy from the environment only when it is
loaded. But it spins only for microseconds while the process has more OpenMP threads than cores (libgomp's manual,
GOMP_SPINCOUNT). So a sleeping team of extra threads (`IdleTeam`) switches spinning off, and its end switches spinning
on again. The number of computing threads does not change, so results keep their bits.
"""

import ctypes
import math
import os
import random
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_THREAD_LIMIT")  # if one is set, the user decides how threads wait
WHERE = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")  # or where they run
COUNT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")  # or how many there are
INTERVAL = 0.25  # seconds between readings
TAKEN, FREE = 0.35, 0.15  # cores used by others: more than the first disturb us, fewer than the second do not
FULL = 0.3  # with fewer idle cores than this, all cores are in use
IDLE = 0.5  # with fewer used cores than this, this process needs none of its cores
UNUSED = 0.05  # maximum of used cores while the process waits for work
GIVE, TAKE = 0.2, 2.0  # seconds for which readings must ask before cores are given up, and taken back
TASKS, GROUPS, OWN_GROUP = Path("/proc/self/task"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
STATISTICS = Path("/proc/stat")
_started = threading.Lock()  # acquired by the first call and never released


def follow_load() -> None:
    """Start a background thread that reads the machine's load four times a second and moves this process's threads.

    Only the first call has an effect. Settings in environment variables for the number, waiting or cores of threads are
    respected.
    """
    if not _started.acquire(blocking=False):
        return
    limit_threads()
    if TASKS.exists() and STATISTICS.exists() and not any(name in os.environ for name in (*WAY, *WHERE)):
        threading.Thread(target=_watch, name="keifu-threads", daemon=True).start()


def limit_threads() -> None:
    """Limit the number of compute threads to the container's cores, unless an environment variable sets the number. It
    starts no thread, so the command line calls it before it imports torch."""
    if not any(name in os.environ for name in COUNT):
        _limit(quota())


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Compute on `count` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Placement:
    """Choice of cores for this process's threads: all, or the cores `held_cores` while other programs use the rest.

    Several such processes find different cores, because each moves to cores that it sees unused, at a random moment.
    """

    cores: frozenset[int]
    held_cores: frozenset[int] | None = None
    since: float = math.inf  # time at which readings began to ask for a change

    def read(self, now: float, busy: Mapping[int, float], used_cores: float) -> bool:
        """Update the choice by one reading, and return whether it changed. now: time in seconds. busy: share of time
        that each core was used by any process. used_cores: number of cores that this process used."""
        if self.held_cores and used_cores < UNUSED:  # a waiting process gives up its choice
            self.held_cores, self.since = None, math.inf
            return True
        used_by_others = max(0.0, math.fsum(busy.values()) - used_cores)
        n_cores = max(1, len(self.cores) - max(1, round(used_by_others)))
        if not self._asks(busy, used_cores, used_by_others, n_cores):
            self.since = math.inf
            return False
        self.since = min(self.since, now)
        if now - self.since < (GIVE if self.held_cores is None else TAKE):
            return False
        self.since = math.inf
        if self.held_cores and used_by_others < FREE:
            self.held_cores = None
        else:
            shares = (
                {
                    core: busy[core] - (used_cores / len(self.held_cores) if core in self.held_cores else 0.0)
                    for core in busy
                }
                if self.held_cores
                else dict.fromkeys(self.cores, 0.0)
            )
            self.held_cores = frozenset(
                sorted(self.cores, key=lambda core: (shares[core] > TAKEN, random.random()))[:n_cores]
            )
        return True

    def _asks(self, busy: Mapping[int, float], used_cores: float, used_by_others: float, n_cores: int) -> bool:
        """Return whether a reading asks for other cores than the present ones."""
        if self.held_cores is None:
            full = math.fsum(busy.values()) > len(self.cores) - FULL
            return len(self.cores) > 1 and full and used_by_others > TAKEN and used_cores > IDLE
        disturbed = math.fsum(busy[core] for core in self.held_cores) - used_cores > TAKEN
        elsewhere = min((busy[core] for core in self.cores - self.held_cores), default=1.0) < FREE
        return used_by_others < FREE or n_cores != len(self.held_cores) or (disturbed and elsewhere)


class IdleTeam(threading.Thread):
    """Team of idle OpenMP threads. While it exists, no thread of this process spins."""

    def __init__(self, openmp: Any):
        super().__init__(name="keifu-idle-team", daemon=True)
        self.openmp, self.ready, self.end = openmp, threading.Event(), threading.Event()

    def stop(self) -> None:
        """End the team. Its OpenMP threads end with the thread that created them."""
        self.end.set()
        self.join()

    def run(self) -> None:
        """Start one thread more than there are cores. Each only asks for its number, then sleeps."""
        work = ctypes.cast(self.openmp.omp_get_thread_num, ctypes.c_void_p)
        self.openmp.GOMP_parallel(work, None, ctypes.c_uint(self.openmp.omp_get_num_procs() + 1), ctypes.c_uint(0))
        self.ready.set()
        self.end.wait()


def _watch() -> None:
    """Read the load of the cores about four times a second, until the process ends."""
    placement, team = Placement(frozenset(os.sched_getaffinity(0))), None
    before = _clocks()
    while True:
        time.sleep(INTERVAL * random.uniform(0.8, 1.2))
        clocks = _clocks()
        passed = clocks[0] - before[0]
        busy = {core: (clocks[2][core] - before[2].get(core, 0.0)) / passed for core in placement.cores & {*clocks[2]}}
        last = placement.held_cores
        changed = placement.read(clocks[0], busy, (clocks[1] - before[1]) / passed)
        before = clocks
        if not changed:
            continue
        if placement.held_cores and team is None and (openmp := _openmp()):
            team = IdleTeam(openmp)
            team.start()
        elif team and not placement.held_cores:
            team.stop()
            team = None
        move(last or placement.cores, placement.held_cores or placement.cores)


def _clocks() -> tuple[float, float, dict[int, float]]:
    """Return seconds of wall-clock time, seconds of this process's CPU time, and the used seconds of each core."""
    return time.perf_counter(), time.process_time(), busy_seconds()


def busy_seconds(statistics: Path = STATISTICS) -> dict[int, float]:
    """Return the seconds for which each core was used so far, by processes whose priority competes with this one's."""
    fields = [line.split() for line in statistics.read_text().splitlines() if line[:3] == "cpu" and line[3].isdigit()]
    lower = os.nice(0) > 0  # the second number counts lower priorities, which yield to others
    ticks = {int(row[0][3:]): [int(field) for field in row[1:8]] for row in fields}
    seconds = os.sysconf("SC_CLK_TCK")
    return {core: (n[0] + n[1] * lower + n[2] + n[5] + n[6]) / seconds for core, n in ticks.items()}


def move(last: frozenset[int], cores: frozenset[int], tasks: Path = TASKS) -> None:
    """Move threads of this process from cores `last` to `cores`. Threads that were placed on other cores stay there."""
    for task in tasks.iterdir():
        with suppress(OSError):  # the thread has just ended
            if os.sched_getaffinity(int(task.name)) == last:
                os.sched_setaffinity(int(task.name), cores)


def _openmp() -> Any:
    """Return PyTorch's OpenMP library if it is GNU's. Return None for others, and before PyTorch is imported."""
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "get_num_threads"):
        return None
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
    return library if hasattr(library, "GOMP_parallel") else None


def _limit(share: float) -> None:
    """Limit the number of threads to `share`, the container's cores. By default PyTorch starts one for each core of the
    machine."""
    torch: Any = sys.modules.get("torch")
    if torch is None and share < (os.cpu_count() or 1):
        os.environ[COUNT[0]] = str(math.ceil(share))
    elif torch is not None and share < torch.get_num_threads():
        torch.set_num_threads(math.ceil(share))


def control_groups(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> list[Path]:
    """Return the folders of this process's control group (version 2) and of its ancestors. All of them limit the
    process."""
    lines = own_group.read_text().splitlines() if own_group.exists() else []
    group = next((groups / line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")), groups)
    return [folder for folder in (group, *group.parents) if folder.is_relative_to(groups)]


def quota(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> float:
    """Return the smallest number of cores that a control group of this process permits; ∞ without a limit."""
    limits = [control_group / "cpu.max" for control_group in control_groups(groups, own_group)]
    quotas = [limit.read_text().split() for limit in limits if limit.exists()]  # version 2: "200000 100000", or "max …"
    first = groups / "cpu/cpu.cfs_quota_us"  # version 1; -1: no limit
    if first.exists():
        quotas.append([first.read_text().strip(), first.with_name("cpu.cfs_period_us").read_text().strip()])
    return min((int(most) / int(period) for most, period in quotas if most not in ("max", "-1")), default=math.inf)

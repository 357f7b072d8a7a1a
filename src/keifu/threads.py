"""How threads that compute wait for each other, and where: both follow the machine's load; imports no torch.

OpenMP's threads wait for their next work in a loop ("spin"), which is the fastest way on free cores. Where other
programs use the cores, a thread that spins takes a core from one that works, and threads that wait for one that has no
core stand still. So while others use cores, threads sleep where they wait, and all run on the cores that are left.

GNU's OpenMP, which PyTorch's wheels for Linux have, reads its rule from the environment when it is loaded, but spins
only for some microseconds while the process has more OpenMP threads than there are cores (libgomp's manual,
GOMP_SPINCOUNT). So a team of threads that has nothing to do, and sleeps, switches spinning off, and its end switches it
on again. As many threads compute as before, so results have the same bits.
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

WAY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_THREAD_LIMIT")  # if one is set, how threads wait is left alone
WHERE = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")  # and where they run
COUNT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")  # and how many there are
INTERVAL = 0.25  # seconds between readings
TAKEN, FREE = 0.35, 0.15  # cores that others use: above the first they are in the way, below the second they are not
FULL = 0.3  # idle cores below which all cores are in use
IDLE = 0.5  # cores that this process uses, below which it has nothing to lose
UNUSED = 0.05  # cores that it uses while it waits for work, at most
GIVE, TAKE = 0.2, 2.0  # seconds that readings ask for it, before cores are given to others, and taken back
TASKS, GROUPS, OWN_GROUP = Path("/proc/self/task"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
STATISTICS = Path("/proc/stat")
_started = threading.Lock()  # taken by the first call, and kept


def follow_load() -> None:
    """Let this process follow the load of the machine from now on: a thread looks at it four times a second.

    It may be called often. Where a variable of the environment says how threads wait, or how many there are, it stays.
    """
    if not _started.acquire(blocking=False):
        return
    if not any(name in os.environ for name in COUNT):
        _limit(quota())
    if TASKS.exists() and STATISTICS.exists() and not any(name in os.environ for name in (*WAY, *WHERE)):
        threading.Thread(target=_watch, name="keifu-threads", daemon=True).start()


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Compute on `count` threads in a block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class Placement:
    """Choice of cores for the threads of this process: all, or while others use some, the rest (`held`).

    Several processes that do this find different cores: each moves to cores that it sees unused, at a random moment.
    """

    cores: frozenset[int]
    held: frozenset[int] | None = None
    since: float = math.inf  # when readings began to ask for a change

    def read(self, now: float, busy: Mapping[int, float], used: float) -> bool:
        """Return whether the cores change: `now` in seconds, `busy` the share of time that each core was used by
        anyone, and `own` the cores that this process used."""
        if self.held and used < UNUSED:  # it holds nothing while it waits for work
            self.held, self.since = None, math.inf
            return True
        others = max(0.0, math.fsum(busy.values()) - used)
        wanted = max(1, len(self.cores) - max(1, round(others)))
        if not self._asks(busy, used, others, wanted):
            self.since = math.inf
            return False
        self.since = min(self.since, now)
        if now - self.since < (GIVE if self.held is None else TAKE):
            return False
        self.since = math.inf
        if self.held and others < FREE:
            self.held = None
        else:
            shares = (
                {core: busy[core] - (used / len(self.held) if core in self.held else 0.0) for core in busy}
                if self.held
                else dict.fromkeys(self.cores, 0.0)
            )
            self.held = frozenset(sorted(self.cores, key=lambda core: (shares[core] > TAKEN, random.random()))[:wanted])
        return True

    def _asks(self, busy: Mapping[int, float], used: float, others: float, wanted: int) -> bool:
        """Return whether a reading asks for other cores than those of now."""
        if self.held is None:
            full = math.fsum(busy.values()) > len(self.cores) - FULL
            return len(self.cores) > 1 and full and others > TAKEN and used > IDLE
        disturbed = math.fsum(busy[core] for core in self.held) - used > TAKEN
        elsewhere = min((busy[core] for core in self.cores - self.held), default=1.0) < FREE
        return others < FREE or wanted != len(self.held) or (disturbed and elsewhere)


class IdleTeam(threading.Thread):
    """A team of OpenMP's threads that do nothing: while there is one, no thread of this process spins."""

    def __init__(self, openmp: Any):
        super().__init__(name="keifu-idle-team", daemon=True)
        self.openmp, self.ready, self.end = openmp, threading.Event(), threading.Event()

    def stop(self) -> None:
        """End the team: its threads end with the one that made them."""
        self.end.set()
        self.join()

    def run(self) -> None:
        """Run more threads than cores, each of which asks once for its number."""
        work = ctypes.cast(self.openmp.omp_get_thread_num, ctypes.c_void_p)
        self.openmp.GOMP_parallel(work, None, ctypes.c_uint(self.openmp.omp_get_num_procs() + 1), ctypes.c_uint(0))
        self.ready.set()
        self.end.wait()


def _watch() -> None:
    """Read the load of the cores, about four times a second, until the process ends."""
    placement, team = Placement(frozenset(os.sched_getaffinity(0))), None
    before = _clocks()
    while True:
        time.sleep(INTERVAL * random.uniform(0.8, 1.2))
        clocks = _clocks()
        passed = clocks[0] - before[0]
        busy = {core: (clocks[2][core] - before[2].get(core, 0.0)) / passed for core in placement.cores & {*clocks[2]}}
        last = placement.held
        changed = placement.read(clocks[0], busy, (clocks[1] - before[1]) / passed)
        before = clocks
        if not changed:
            continue
        if placement.held and team is None and (openmp := _openmp()):
            team = IdleTeam(openmp)
            team.start()
        elif team and not placement.held:
            team.stop()
            team = None
        move(last or placement.cores, placement.held or placement.cores)


def _clocks() -> tuple[float, float, dict[int, float]]:
    """Return the seconds that have passed, that this process computed, and that each core did."""
    return time.perf_counter(), time.process_time(), used()


def used(statistics: Path = STATISTICS) -> dict[int, float]:
    """Return the seconds so far that each core was used, by anyone of a priority that competes with this process."""
    fields = [line.split() for line in statistics.read_text().splitlines() if line[:3] == "cpu" and line[3].isdigit()]
    lower = os.nice(0) > 0  # the second number is of lower priorities, which give way to others
    ticks = {int(row[0][3:]): [int(field) for field in row[1:8]] for row in fields}
    seconds = os.sysconf("SC_CLK_TCK")
    return {core: (n[0] + n[1] * lower + n[2] + n[5] + n[6]) / seconds for core, n in ticks.items()}


def move(last: frozenset[int], cores: frozenset[int], tasks: Path = TASKS) -> None:
    """Move all threads of this process from some cores to others; those that run elsewhere, as their maker wanted,
    stay there."""
    for task in tasks.iterdir():
        with suppress(OSError):  # a thread that has just ended
            if os.sched_getaffinity(int(task.name)) == last:
                os.sched_setaffinity(int(task.name), cores)


def _openmp() -> Any:
    """Return the OpenMP library of PyTorch if it is GNU's. Return None for others, and before PyTorch is imported."""
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "get_num_threads"):
        return None
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
    return library if hasattr(library, "GOMP_parallel") else None


def _limit(share: float) -> None:
    """Limit the threads to the cores that a container may use; PyTorch would start one for each of the machine."""
    torch: Any = sys.modules.get("torch")
    if torch is None and share < (os.cpu_count() or 1):
        os.environ[COUNT[0]] = str(math.ceil(share))
    elif torch is not None and share < torch.get_num_threads():
        torch.set_num_threads(math.ceil(share))


def control_groups(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> list[Path]:
    """Return the folders of this process's control group (version 2) and of those above it, which all limit it."""
    lines = own_group.read_text().splitlines() if own_group.exists() else []
    group = next((groups / line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")), groups)
    return [folder for folder in (group, *group.parents) if folder.is_relative_to(groups)]


def quota(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> float:
    """Return the smallest number of cores that a control group of this process permits; ∞ without a limit."""
    limits = [control_group / "cpu.max" for control_group in control_groups(groups, own_group)]
    quotas = [limit.read_text().split() for limit in limits if limit.exists()]  # version 2: "200000 100000", or "max …"
    first = groups / "cpu/cpu.cfs_quota_us"  # version 1, with -1 for no limit
    if first.exists():
        quotas.append([first.read_text().strip(), first.with_name("cpu.cfs_period_us").read_text().strip()])
    return min((int(most) / int(period) for most, period in quotas if most not in ("max", "-1")), default=math.inf)

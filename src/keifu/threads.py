"""How threads that compute wait for each other, and how many there are: both follow the machine; imports no torch.

OpenMP's threads wait for their next work in a loop ("spin"), which is the fastest way on free cores. Where other
programs use the cores, a thread that spins takes a core from one that works, and everything is several times slower.
GNU's OpenMP, which PyTorch's wheels for Linux have, reads its rule from the environment when it is loaded, but spins
only for some microseconds while the process has more OpenMP threads than there are cores (libgomp's manual,
GOMP_SPINCOUNT). So a team of threads that has nothing to do, and sleeps, switches spinning off, and its end switches it
on again. As many threads compute as before, so results have the same bits.
"""

import ctypes
import math
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAY = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_THREAD_LIMIT")  # if one is set, how threads wait is left alone
COUNT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")  # and how many there are
INTERVAL = 0.5  # seconds between readings
BUSY, FREE = 0.25, 0.15  # seconds a second that threads have no core: above, they sleep; below, they may spin again
IDLE = 0.1  # seconds a second that threads compute, below which nothing is learnt about the cores
SHORTEST, LONGEST = 2.0, 32.0  # seconds of free cores before they spin again
TASKS, GROUPS, OWN_GROUP = Path("/proc/self/task"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_started = threading.Lock()  # taken by the first call, and kept


def follow_load() -> None:
    """Lets this process follow the load of the machine from now on: a thread looks at it twice a second.

    It may be called often. Where a variable of the environment says how threads wait, or how many there are, it stays.
    """
    if not _started.acquire(blocking=False):
        return
    if not any(name in os.environ for name in COUNT):
        _limit(quota())
    if TASKS.exists() and not any(name in os.environ for name in WAY):
        threading.Thread(target=_watch, name="keifu-threads", daemon=True).start()


@dataclass
class Waiting:
    """Decides whether threads that wait should sleep, from readings of how long threads that were ready had no core.

    Threads that sleep seldom lack a core, so that little is seen then of what spinning would cost: where a try to spin
    again fails at once, the next one comes after twice the time.
    """

    asleep: bool = False
    patience: float = SHORTEST
    since: float = -math.inf  # when they last began to spin, or when, while they sleep, the last core was lacking

    def read(self, now: float, lacking: float, computing: float = 1.0) -> bool:
        """Whether they should sleep: `now` in seconds, `lacking` the seconds a second that threads had no core, and
        `computing` those that they used one: while nothing is computed, no core is known to be free."""
        if self.asleep and (lacking > FREE or computing < IDLE):
            self.since = now
        elif self.asleep and now - self.since >= self.patience:
            self.asleep, self.since = False, now
        elif not self.asleep and lacking > BUSY:
            failed = now - self.since < SHORTEST
            self.patience = min(2 * self.patience, LONGEST) if failed else SHORTEST
            self.asleep, self.since = True, now
        return self.asleep


class IdleTeam:
    """A team of OpenMP's threads that do nothing: while there is one, no thread of this process spins."""

    def __init__(self, openmp: Any):
        self.openmp, self.ready, self.end = openmp, threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._hold, name="keifu-idle-team", daemon=True)

    def start(self) -> None:
        """Makes the team."""
        self.thread.start()

    def stop(self) -> None:
        """Ends it: its threads end with the one that made them."""
        self.end.set()
        self.thread.join()

    def _hold(self) -> None:
        """More threads than cores, each of which asks once for its number."""
        work = ctypes.cast(self.openmp.omp_get_thread_num, ctypes.c_void_p)
        self.openmp.GOMP_parallel(work, None, ctypes.c_uint(self.openmp.omp_get_num_procs() + 1), ctypes.c_uint(0))
        self.ready.set()
        self.end.wait()


def _watch() -> None:
    """Reads how long threads lacked a core, twice a second, until the process ends."""
    waiting, team = Waiting(), None
    before = _clocks()
    while True:
        time.sleep(INTERVAL)
        clocks = _clocks()
        passed, without, computing = (max(0.0, now - then) for now, then in zip(clocks, before, strict=True))
        before = clocks
        asleep = waiting.read(clocks[0], without / passed, computing / passed)
        if asleep and team is None and (openmp := _openmp()):
            team = IdleTeam(openmp)
            team.start()
        elif team and not asleep:
            team.stop()
            team = None


def _clocks() -> tuple[float, float, float]:
    """Seconds that have passed, that threads had no core, and that they computed."""
    return time.perf_counter(), lacked(), time.process_time()


def lacked(tasks: Path = TASKS) -> float:
    """Seconds so far that this process's threads were ready to run and had no core."""
    return sum(_lacked(task / "schedstat") for task in tasks.iterdir())


def _lacked(file: Path) -> float:
    try:
        return int(file.read_text().split()[1]) / 1e9
    except (OSError, IndexError):  # a thread that has just ended
        return 0.0


def _openmp() -> Any:
    """The OpenMP that PyTorch computes with, where it is GNU's; None also before PyTorch is imported."""
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "get_num_threads"):
        return None
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libtorch_cpu.so"))
    return library if hasattr(library, "GOMP_parallel") else None


def _limit(share: float) -> None:
    """No more threads than the cores that a container may use; PyTorch by itself makes one for each of the machine."""
    torch: Any = sys.modules.get("torch")
    if torch is None and share < (os.cpu_count() or 1):
        os.environ[COUNT[0]] = str(math.ceil(share))
    elif torch is not None and share < torch.get_num_threads():
        torch.set_num_threads(math.ceil(share))


def quota(groups: Path = GROUPS, own: Path = OWN_GROUP) -> float:
    """The cores that control groups let this process use: the strictest of its own and those above; ∞ without one."""
    lines = own.read_text().splitlines() if own.exists() else []
    group = next((groups / line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::")), groups)
    limits = [place / "cpu.max" for place in (group, *group.parents) if place.is_relative_to(groups)]
    found = [limit.read_text().split() for limit in limits if limit.exists()]  # version 2: "200000 100000", or "max …"
    first = groups / "cpu/cpu.cfs_quota_us"  # version 1, with -1 for no limit
    if first.exists():
        found.append([first.read_text().strip(), first.with_name("cpu.cfs_period_us").read_text().strip()])
    return min((int(most) / int(period) for most, period in found if most not in ("max", "-1")), default=math.inf)

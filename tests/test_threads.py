"""Threads follow the load: the decision from made-up readings, what is read, and what is done then."""

import ctypes
import math
import os
import random
import threading
import time
from pathlib import Path

import pytest
import torch

from keifu import threads
from keifu.threads import TAKE, IdleTeam, Placement, busy_seconds, move, quota

TICK = 0.5
TWO = frozenset({0, 1})


def test_a_process_alone_keeps_all_cores_however_it_computes() -> None:
    placement = Placement(TWO)
    for number, own in enumerate((2.0, 1.9, 1.3, 0.4, 2.0, 0.0)):
        assert not placement.read(TICK * number, {0: own / 2 + 0.05, 1: own / 2 + 0.05}, own)
    assert placement.held_cores is None


def test_cores_are_given_to_a_program_that_uses_one_and_taken_back_when_it_has_ended() -> None:
    placement, changes = Placement(TWO), []
    for number in range(20):
        ended = number >= 10
        busy = dict.fromkeys(TWO, 1.0)
        if placement.held_cores:
            busy = {core: 1.0 if core in placement.held_cores else 0.0 if ended else 1.0 for core in TWO}
        own = 1.0 if placement.held_cores else 2.0 if ended else 1.3
        if placement.read(TICK * number, busy, own):
            changes.append((TICK * number, len(placement.held_cores or TWO)))
    assert changes == [(0.5, 1), (5.0 + TAKE, 2)]


@pytest.mark.parametrize(
    ("busy", "own"),
    [
        ({0: 1.0, 1: 1.0}, 1.9),  # a moment of something else
        ({0: 0.9, 1: 0.7}, 0.9),  # cores are left
        ({0: 1.0, 1: 1.0}, 0.2),  # nothing to lose
    ],
)
def test_no_core_is_given_where_nothing_is_lost(busy: dict[int, float], own: float) -> None:
    placement = Placement(TWO)
    assert not any(placement.read(TICK * number, busy, own) for number in range(10))


def test_one_reading_alone_changes_nothing() -> None:
    placement = Placement(TWO)
    for number in range(20):
        assert not placement.read(TICK * number, dict.fromkeys(TWO, 1.0), 2.0 if number % 2 else 1.2)


def test_a_process_that_waits_for_work_holds_no_cores() -> None:
    placement = Placement(TWO)
    for number in range(2):
        placement.read(TICK * number, dict.fromkeys(TWO, 1.0), 1.0)
    assert placement.held_cores
    assert placement.read(2 * TICK, dict.fromkeys(TWO, 1.0), 0.0) and placement.held_cores is None
    assert not placement.read(3 * TICK, dict.fromkeys(TWO, 1.0), 0.0)


def test_of_many_cores_those_that_others_use_are_left_to_them() -> None:
    cores = frozenset(range(8))
    placement = Placement(cores)
    for number in range(3):
        placement.read(TICK * number, dict.fromkeys(cores, 1.0), 5.0)
    assert placement.held_cores and len(placement.held_cores) == 5
    others = cores - placement.held_cores
    for number in range(3, 20):  # one of three programs ends: its core is taken back
        busy = {core: 1.0 if core in placement.held_cores or core in sorted(others)[:2] else 0.0 for core in cores}
        placement.read(TICK * number, busy, float(len(placement.held_cores)))
    assert len(placement.held_cores) == 6 and not placement.held_cores & {*sorted(others)[:2]}


def test_processes_that_follow_the_load_find_different_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of two threads each on two cores, whose readings come at moments of their own."""
    draw = random.Random(0)
    monkeypatch.setattr(random, "random", draw.random)
    for _ in range(50):
        both, last, now = [Placement(TWO), Placement(TWO)], [-1.0, -0.7], 0.0
        for _ in range(400):
            now += 0.1
            for number, placement in enumerate(both):
                if now - last[number] < draw.uniform(0.4, 0.6):
                    continue
                last[number] = now
                other = both[1 - number]
                alone = placement.held_cores and other.held_cores and placement.held_cores != other.held_cores
                own = (
                    1.0 if alone else 0.5 if placement.held_cores == other.held_cores and placement.held_cores else 1.0
                )
                busy = dict.fromkeys(TWO, 1.0)
                if placement.held_cores and placement.held_cores == other.held_cores:
                    busy = {core: float(core in placement.held_cores) for core in TWO}
                placement.read(now, busy, own)
        assert both[0].held_cores and both[1].held_cores and both[0].held_cores != both[1].held_cores


def test_used_counts_what_competes_on_each_core(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    row = [1 * tick, 5 * tick, 2 * tick, 90 * tick, 7 * tick, 3 * tick, 4 * tick, 8 * tick, 0, 0]
    lines = ["cpu  1 2 3 4 5 6 7 8 9 10", "cpu0 " + " ".join(map(str, row)), "cpu13 " + "0 " * 10, "intr 5 6"]
    (tmp_path / "stat").write_text("\n".join(lines))
    assert busy_seconds(tmp_path / "stat") == {0: 1 + 2 + 3 + 4 + 5 * (os.nice(0) > 0), 13: 0}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen on Linux alone")
def test_threads_move_and_come_back_but_for_those_whose_cores_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "move", lambda *_: None)  # the load of the machine moves none of them meanwhile
    cores = frozenset(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("there is one core")
    some, end = frozenset({min(cores)}), threading.Event()
    own = threading.Thread(target=lambda: (os.sched_setaffinity(0, {max(cores)}), end.wait()))
    own.start()
    while os.sched_getaffinity(own.native_id or 0) != {max(cores)}:
        time.sleep(0.001)
    try:
        move(cores, some)
        assert os.sched_getaffinity(0) == some and os.sched_getaffinity(own.native_id or 0) == {max(cores)}
        later = threading.Thread(target=end.wait)
        later.start()
        assert os.sched_getaffinity(later.native_id or 0) == some
        move(some, cores)
        assert os.sched_getaffinity(0) == os.sched_getaffinity(later.native_id or 0) == cores
    finally:
        end.set()
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"cpu.max": "max 100000"}, math.inf),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000", "a/cpu.max": "400000 100000", "a/b/cpu.max": "800000 100000"}, 4.0),
        ({"c/cpu.max": "100000 100000"}, math.inf),
        ({"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
    ],
)
def test_quota_is_the_strictest_of_the_groups_above(tmp_path: Path, files: dict[str, str], expected: float) -> None:
    own = tmp_path / "cgroup"
    own.write_text("1:cpu:/x\n0::/a/b\n")
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert quota(tmp_path / "groups", own) == expected


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the threads that `follow_load` starts, and do not run them. Unset its variables."""
    names: list[str] = []
    monkeypatch.setattr(threads, "_started", threading.Lock())
    monkeypatch.setattr(threads, "quota", lambda: 1.5)
    for name in (*threads.WAY, *threads.WHERE, *threads.COUNT):
        monkeypatch.delenv(name, raising=False)

    class Thread(threading.Thread):
        def start(self) -> None:
            names.append(self.name)

    monkeypatch.setattr(threads.threading, "Thread", Thread)
    return names


def test_a_container_gets_as_many_threads_as_it_may_use_cores_and_one_that_watches(begun: list[str]) -> None:
    torch.set_num_threads(4)
    threads.follow_load()
    threads.follow_load()
    assert torch.get_num_threads() == 2
    assert len(begun) == threads.TASKS.exists()


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_PROC_BIND"])
def test_who_says_how_threads_wait_or_where_they_run_is_obeyed(
    begun: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    threads.follow_load()
    assert begun == []


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_who_says_how_many_there_are_is_obeyed(begun: list[str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "4")
    torch.set_num_threads(4)
    threads.follow_load()
    assert torch.get_num_threads() == 4


def test_before_torch_is_imported_the_environment_says_how_many(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.sys, "modules", {})
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that it is taken away again
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.limit_threads()
    assert threads.os.environ["OMP_NUM_THREADS"] == "2"
    assert begun == []  # a thread would get an arena of its own before the service can prevent it


def test_the_idle_team_has_more_threads_than_there_are_cores_and_changes_no_bit() -> None:
    openmp = threads._openmp()
    if openmp is None:
        pytest.skip("PyTorch's OpenMP is not GNU's")
    x = torch.randn(300, 300)
    alone, before = x @ x, len(list(threads.TASKS.iterdir()))
    team = IdleTeam(openmp)
    team.start()
    team.ready.wait()
    openmp.omp_get_num_procs.restype = ctypes.c_int
    assert len(list(threads.TASKS.iterdir())) >= before + openmp.omp_get_num_procs() + 1
    assert torch.equal(x @ x, alone)
    team.stop()
    assert not team.is_alive()

"""Threads follow the load: the decision from made-up readings, what is read, and the team that ends spinning."""

import ctypes
import math
import threading
from pathlib import Path

import pytest
import torch

from keifu import threads
from keifu.threads import FREE, LONGEST, SHORTEST, IdleTeam, Waiting, lacked, quota

TICK = 0.5


def states(readings: list[float], waiting: Waiting | None = None) -> list[bool]:
    waiting = waiting or Waiting()
    return [waiting.read(TICK * number, lacking) for number, lacking in enumerate(readings)]


def test_threads_spin_on_free_cores_and_sleep_as_soon_as_they_lack_one() -> None:
    assert states([0.0, 0.2, 0.0]) == [False, False, False]
    assert states([0.0, 1.2, 0.5]) == [False, True, True]


def test_nothing_is_decided_while_nothing_is_computed() -> None:
    waiting = Waiting()
    states([1.0], waiting)
    assert all(waiting.read(float(number), lacking=0.0, computing=0.01) for number in range(1, 100))
    assert waiting.read(99.5, lacking=0.0) and not waiting.read(103.0, lacking=0.0)


def test_they_spin_again_when_no_core_was_lacking_for_a_while() -> None:
    free = round(SHORTEST / TICK)
    after = states([1.0, 0.3, 0.3] + [0.0] * (free + 1))
    assert after[: 3 + free - 1] == [True] * (3 + free - 1) and after[-1] is False
    assert all(states([1.0] + [0.0, FREE * 2] * 50)), "a core that is lacking now and then is not a free one"


def test_a_try_to_spin_that_fails_at_once_is_repeated_after_twice_the_time_and_no_more_than_the_longest() -> None:
    waiting, lengths, length = Waiting(), [], 0
    for number in range(2000):
        asleep = waiting.asleep
        now_asleep = waiting.read(TICK * number, 0.0 if asleep else 1.0)  # nothing is seen of the load while they sleep
        length += 1
        if asleep and not now_asleep:
            lengths.append(length * TICK)
            length = 0
    assert lengths[:3] == pytest.approx([SHORTEST, 2 * SHORTEST, 4 * SHORTEST], abs=2 * TICK)
    assert max(lengths) <= LONGEST + 2 * TICK and lengths[-1] >= LONGEST


def test_after_a_good_time_of_spinning_the_first_try_comes_soon_again() -> None:
    waiting = Waiting(patience=LONGEST)
    states([0.0] * 20 + [1.0], waiting)
    assert waiting.asleep and waiting.patience == SHORTEST


def test_lacked_sums_the_waits_of_all_threads(tmp_path: Path) -> None:
    for number, text in enumerate(["9000000000 2000000000 0\n", "1 500000000 10000\n", "nonsense"]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "schedstat").write_text(text)
    (tmp_path / "gone").mkdir()
    assert lacked(tmp_path) == pytest.approx(2.0 + 0.5)


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
    """The threads that `follow_load` begins, which do not run; no variable of the environment is set."""
    names: list[str] = []
    monkeypatch.setattr(threads, "_started", threading.Lock())
    monkeypatch.setattr(threads, "quota", lambda: 1.5)
    for name in (*threads.WAY, *threads.COUNT):
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


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_who_says_how_threads_wait_is_obeyed(begun: list[str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
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
    threads.follow_load()
    assert threads.os.environ["OMP_NUM_THREADS"] == "2"


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
    assert not team.thread.is_alive()

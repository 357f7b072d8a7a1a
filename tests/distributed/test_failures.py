"""Processes that die, hang or differ: the run goes on from its last state, or the first process says why it ends."""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from keifu import cli
from keifu.distributed import failures, group
from keifu.distributed.checkpoint import States
from keifu.distributed.group import _fresh_store
from keifu.distributed.mesh import Mesh
from keifu.errors import UserError
from keifu.processes import Processes

RECIPE = Path(__file__).parent / "toy_recipe.py"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "KEIFU_DEVICE": "cpu"}


def command(out: Path, *words: str) -> subprocess.Popen:
    line = [sys.executable, "-m", "keifu", "train", str(RECIPE), "--out", str(out), *words]
    return subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def finished(out: Path, *words: str) -> tuple[int, str]:
    """Run a command to its end, and return its exit status and its output."""
    process = command(out, *words)
    _, said = process.communicate(timeout=900)
    return process.returncode, said


def digest(out: Path, step: int) -> str:
    return hashlib.sha256((out / "state" / f"step-{step:08d}.safetensors").read_bytes()).hexdigest()


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def children(process: subprocess.Popen) -> list[int]:
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in task.read_text().split()] if task.exists() else []


class Clock:
    """A clock for three processes: while one sleeps, those of `alive` give signs of life."""

    def __init__(self, store: distributed.Store):
        self.store, self.now, self.alive = store, 0.0, {0, 1, 2}

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for number in self.alive:
            self.store.set(f"alive/{number}", str(self.now))


@pytest.fixture
def store() -> Iterator[distributed.Store]:
    yield distributed.TCPStore("localhost", 0, 1, is_master=True)  # its end is that of its server


@pytest.fixture
def clock(store: distributed.TCPStore, monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock(store.clone())
    monkeypatch.setattr(failures, "time", found)
    return found


@pytest.fixture
def signs(store: distributed.TCPStore) -> list[failures.Signs]:
    """Return signs of three processes, whose threads have not begun."""
    return [failures.Signs(number, 3, store.clone()) for number in range(3)]


def test_a_process_that_gives_no_sign_of_life_is_named(signs: list[failures.Signs], clock: Clock) -> None:
    clock.sleep(1.0)
    clock.alive = {0, 1}
    assert signs[0].reason().startswith("Process 2 of 3 (counted from 0) has died or makes no progress, at step 0")


def test_a_process_that_is_late_is_named(signs: list[failures.Signs], clock: Clock) -> None:
    for number, step in enumerate((7, 6, 7)):
        signs[number].store.set(f"step/{number}", str(step))
    assert "Process 1 of 3 (counted from 0) did not answer within the time limit, at step 8" in signs[0].reason()


def test_a_dead_process_is_reported_while_the_main_thread_waits(
    signs: list[failures.Signs], clock: Clock, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Wait as NCCL does, until its watchdog aborts. A process that has done its work is not dead."""
    exits = []
    monkeypatch.setattr("os._exit", lambda status: exits.append((status, clock.now)) or signs[0].ended.set())
    signs[1].ended.set()
    signs[1].thread.start()
    signs[1].thread.join()

    def wait(seconds: float) -> bool:
        clock.alive = {0, 2} if clock.now < 100 else {0}  # then process 2 gives no sign any more
        clock.sleep(seconds)
        return signs[0].ended.is_set()

    monkeypatch.setattr(signs[0].ended, "wait", wait)
    signs[0].thread.start()
    signs[0].thread.join()
    [(status, seconds)] = exits
    assert status == 1 and 100 + failures.DEAD < seconds < 101 + failures.DEAD
    said = capfd.readouterr().err
    assert said == (
        "Process 2 of 3 (counted from 0) has died, at step 0: start again with --resume, or let torchrun do so "
        "(--max-restarts).\n"
    )


def test_the_sentence_that_a_process_left_is_the_reason(signs: list[failures.Signs]) -> None:
    signs[0].store.set(failures.SHOWN, "")
    signs[1].leave(UserError("The disk is full."), str)
    assert signs[0].reason() == "Process 1 of 3 (counted from 0): The disk is full."


def test_processes_that_start_anew_find_nothing_of_those_before() -> None:
    """torchrun keeps one store over its restarts: what the dead have written there is not read."""
    first = distributed.TCPStore("localhost", 0, 1, is_master=True)

    def start(number: int, seconds: float = 300.0) -> distributed.Store:
        return _fresh_store(first.clone(), number, 3, seconds)

    for _ in range(3):
        with ThreadPoolExecutor(3) as processes:
            stores = [*processes.map(start, range(3))]
        assert not stores[1].check(["value/1"])
        stores[0].set("value/1", "6")
        assert stores[2].get("value/1") == b"6"
        first.set("drawn/2", "of one that died before it was told")
    with pytest.raises(UserError, match="Process 1 of 3 .* has not come in 0.1 seconds"):
        start(0, 0.1)


@pytest.mark.parametrize(("error", "sentence"), [
    (UserError("The data differ."), "^The data differ.$"),
    (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), "^Process 1 of 2 .* at step 0"),
])  # fmt: skip
def test_the_first_process_says_its_own_error_as_it_is(
    error: Exception, sentence: str, store: distributed.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "GRACE", 0.1)
    two = Processes()
    two.world_size = 2
    with pytest.raises(UserError, match=sentence), failures.explained(two, store, str):
        raise error
    assert store.check([failures.SHOWN])


@pytest.mark.parametrize(("error", "lost"), [
    (RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc] Connection closed by peer"), True),
    (distributed.DistNetworkError("timed out"), True), (RuntimeError("shapes differ"), False),
    (OSError(28, "full"), False),
])  # fmt: skip
def test_an_exchange_that_failed_is_told_from_other_errors(error: Exception, lost: bool) -> None:
    assert failures.exchange_failed(error) is lost
    outer = UserError("outside")
    outer.__cause__ = error
    assert failures.exchange_failed(outer) is lost


def test_a_part_that_could_not_be_written_is_said_at_the_next_state() -> None:
    states = States.__new__(States)
    states.pending_write = Future()
    states.pending_write.set_exception(
        CheckpointException("write", {1: _wrap_exception(OSError(28, "No space left on device"))})
    )
    with pytest.raises(UserError, match="Process 1 could not write its part of the state: .*No space left on device"):
        states.flush()
    states.flush()


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_ends_with_the_bits_of_one_never_disturbed(tmp_path: Path) -> None:
    """Twenty times, one of two processes at a random moment, which may be in its start, a step or a state."""
    status, said = finished(tmp_path / "calm", "--processes", "2", "--steps", "60")
    assert status == 0, said
    words = ["--processes", "2", "--restarts", "20", "--steps", "60", "--seconds", "0.1", "--until", tmp_path / "end"]
    process, chance, killed = command(tmp_path / "wild", *map(str, words)), random.Random(0), set[int]()
    while len(killed) < 20:
        time.sleep(chance.uniform(0, 8))
        assert process.poll() is None, process.communicate()[1]
        if alive := sorted({*children(process)} - killed):
            chosen = chance.choice(alive)
            os.kill(chosen, signal.SIGKILL)
            killed.add(chosen)
    (tmp_path / "end").touch()
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert digest(tmp_path / "wild", 60) == digest(tmp_path / "calm", 60)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes(tmp_path: Path) -> None:
    """Three processes, of which one dies; then two. The losses are those of three that nothing disturbed."""
    status, said = finished(tmp_path / "run", "--processes", "3", "--fault", "die")
    assert status == 1 and "Process 1" in said
    status, said = finished(tmp_path / "run", "--processes", "2", "--resume")
    assert status == 0, said
    assert finished(tmp_path / "calm", "--processes", "3")[0] == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "calm"), rel=1e-6)


@pytest.mark.slow
def test_a_damaged_part_takes_all_processes_to_the_state_before(tmp_path: Path) -> None:
    two = "--processes", "2", "--mesh.shard", "2"
    assert finished(tmp_path / "run", *two)[0] == finished(tmp_path / "calm", *two, "--steps", "14")[0] == 0
    part = max((tmp_path / "run/state/step-00000012").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    status, said = finished(tmp_path / "run", *two, "--resume", "--steps", "14", "--mesh.time-limit", "60")
    assert status == 0 and f"{part.name} is damaged" in said and "Going on from step 10" in said, said


@pytest.mark.slow
def test_a_state_of_which_a_process_was_killed_is_none(tmp_path: Path) -> None:
    """While it writes its part, when that of the other process is whole. The run goes on to the bits of a calm one."""
    two = "--processes", "2", "--mesh.shard", "2"
    status, said = finished(tmp_path / "run", *two, "--fault", "cut off")
    assert status == 1 and "Process 1" in said
    assert [path.name for path in (tmp_path / "run/state").glob("*6*")] == [".step-00000006.part"]
    status, said = finished(tmp_path / "run", *two, "--resume")
    assert status == 0 and "Going on from step 4" in said, said
    assert finished(tmp_path / "calm", *two)[0] == 0
    ends = [sorted((tmp_path / name / "state/step-00000012").iterdir()) for name in ("run", "calm")]
    assert len(ends[0]) == len(ends[1]) == 2
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(load_file(one), load_file(other), rtol=0, atol=0)


@pytest.mark.slow
def test_a_state_that_the_first_process_could_not_end_is_left_out_by_all(tmp_path: Path) -> None:
    words = "--processes", "2", "--mesh.shard", "2", "--mesh.time-limit", "60"
    status, said = finished(tmp_path, *words, "--fault", "no room")
    assert status == 0 and "The state could not be written: [Errno 28] No space left" in said, said
    assert "Training goes on." in said and (tmp_path / "state/step-00000012.json").exists()


@pytest.mark.slow
def test_a_pod_that_dies_is_left_out(tmp_path: Path) -> None:
    """Two machines of one pod each, as torchrun sees them; of one, torchrun and what it started are killed. The other
    one goes on alone, with the losses of two that nothing disturbed."""
    calm = finished(tmp_path / "calm", "--processes", "2", "--steps", "40")
    assert calm[0] == 0, calm[1]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    waits = "join_timeout=120,last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    common = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1",
              "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]  # fmt: skip
    own = ["-m", "keifu", "train", str(RECIPE), "--out", str(tmp_path / "run"), "--mesh.pods", "2", "--steps", "40"]
    pods = [subprocess.Popen([*common, "--rdzv-conf", f"is_host={host},{waits}", *own, "--seconds", "0.3"],
                             env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
            for host in ("true", "false")]  # fmt: skip
    while len([*(tmp_path / "run/state").glob("*.json")]) < 2:
        assert all(pod.poll() is None for pod in pods)
        time.sleep(0.2)
    for dead in (pods[1].pid, *children(pods[1])):
        os.kill(dead, signal.SIGKILL)
    said = pods[0].communicate(timeout=400)[1]
    pods[1].communicate()
    assert pods[0].returncode == 0, said
    assert "Process 1 of 2 (counted from 0) has died or makes no progress" in said and "Going on from step" in said
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "calm"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("die", "Process 1 "),
        ("hang", "Process 1 of 2 (counted from 0) did not answer within the time limit, at step 8"),
        ("fail", "Process 1 of 2 (counted from 0): There is no file 'part-1.bin'."),
        ("other data", "Process 1 differs from process 0: data toys → others."),
        ("other version", "Process 1 differs from process 0: version.keifu "),
        ("full disk", "Process 1 could not write its part of the state: [Errno 27] File too large"),
    ],
)
def test_the_first_process_says_what_is_wrong(fault: str, sentence: str, tmp_path: Path) -> None:
    limit, mesh = "30" if fault == "hang" else "300", ["--mesh.shard", "2"] if fault == "full disk" else []
    status, said = finished(tmp_path, "--processes", "2", "--fault", fault, "--mesh.time-limit", limit, *mesh)
    assert status != 0 and sentence in said, said
    assert "Traceback" not in said


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(group, "choose", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="and there are 2 here: start 2 processes"), group.join(Mesh()):
        pass


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--processes", "3", "--mesh.shard", "2"], "The mesh does not fit"),
        (["--processes", "2", "--mesh.pods", "4"], "The mesh does not fit"),
        (["--processes", "0"], "--processes"),
        (["--processes", "2", "--mesh.offload"], "--mesh.offload is for shared weights"),
        (["--mesh.sync-each"], "--mesh.sync-each is for shared weights"),
        (["--mesh.tensr", "2"], "--mesh.tensor"),
    ],
)
def test_a_wrong_mesh_is_refused_before_anything_starts(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("KEIFU_DEVICE", "cpu")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(RECIPE), "--out", str(tmp_path), *words])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in said and said.count("\n") == 1

"""Processes that die, hang or differ: the run goes on from its last state, or the first process says why it ends."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import distributed
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

from keifu.distributed import failures
from keifu.distributed.checkpoint import States
from keifu.errors import UserError

RECIPE = Path(__file__).parent / "toy_recipe.py"


def command(out: Path, *words: str) -> subprocess.Popen:
    keep = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "KEIFU_DEVICE": "cpu"}
    line = [sys.executable, "-m", "keifu", "train", str(RECIPE), "--out", str(out), *words]
    return subprocess.Popen(line, env=keep, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def finished(out: Path, *words: str) -> tuple[int, str]:
    """The exit status and what was said."""
    process = command(out, *words)
    _, said = process.communicate(timeout=900)
    return process.returncode, said


def digest(out: Path, step: int) -> str:
    return hashlib.sha256((out / "state" / f"step-{step:08d}.safetensors").read_bytes()).hexdigest()


def children(process: subprocess.Popen) -> list[int]:
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in task.read_text().split()] if task.exists() else []


@pytest.fixture
def signs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[failures.Signs]]:
    """Those of three processes, as threads of this one."""
    monkeypatch.setattr(failures, "BEAT", 0.02)
    monkeypatch.setattr(failures, "GRACE", 1.0)
    store = distributed.TCPStore("localhost", 0, 1, is_master=True)
    found = [failures.Signs(number, 3, store.clone()) for number in range(3)]
    for each in found:
        each.start()
    yield found
    for each in found:
        each.stop()
        each.thread.join()
    del store  # it ends its server


def test_a_process_that_gives_no_sign_of_life_is_named(signs: list[failures.Signs]) -> None:
    time.sleep(0.2)
    signs[2].stop()
    time.sleep(0.1)
    assert signs[0].reason().startswith("Process 2 of 3 (counted from 0) has died or stands still, at step 0")


def test_a_process_that_is_late_is_named(signs: list[failures.Signs]) -> None:
    for number, step in enumerate((7, 6, 7)):
        signs[number].store.set(f"step/{number}", str(step))
    time.sleep(0.2)
    assert "Process 1 of 3 (counted from 0) did not answer within the time limit, at step 8" in signs[0].reason()


def test_the_sentence_that_a_process_left_is_the_reason(signs: list[failures.Signs]) -> None:
    signs[0].store.set(failures.SHOWN, "")
    signs[1].leave(UserError("The disk is full."), str)
    assert signs[0].reason() == "Process 1 of 3 (counted from 0): The disk is full."


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
    states.thread = threading.Thread(target=lambda: None)
    states.thread.start()
    states.error = CheckpointException("write", {1: _wrap_exception(OSError(28, "No space left on device"))})
    with pytest.raises(UserError, match="Process 1 could not write its part of the state: .*No space left on device"):
        states.flush()
    states.flush()


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_ends_with_the_bits_of_one_never_disturbed(tmp_path: Path) -> None:
    """Twenty times, one of two processes at a random moment."""
    status, said = finished(tmp_path / "calm", "--processes", "2", "--steps", "400")
    assert status == 0, said
    words = ["--processes", "2", "--restarts", "30", "--steps", "400", "--seconds", "0.05"]
    process, chance, kills = command(tmp_path / "wild", *words), random.Random(0), 0
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < 1800:
        time.sleep(chance.uniform(5, 15))
        if kills < 20 and (alive := children(process)):
            os.kill(chance.choice(alive), signal.SIGKILL)
            kills += 1
    assert process.wait() == 0 and kills == 20
    assert digest(tmp_path / "wild", 400) == digest(tmp_path / "calm", 400)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes(tmp_path: Path) -> None:
    """Three processes, of which one dies; then two. The losses are those of one process."""
    status, said = finished(tmp_path / "run", "--processes", "3", "--fault", "die")
    assert status == 1 and "Process 1" in said
    status, said = finished(tmp_path / "other", "--processes", "3")
    assert status == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("die", "Process 1 "),
        ("hang", "Process 1 of 2 (counted from 0) did not answer within the time limit, at step 8"),
        ("fail", "Process 1 of 2 (counted from 0): There is no file 'part-1.bin'."),
        ("other data", "Process 1 has not what the first one has: data toys → others."),
    ],
)
def test_the_first_process_says_what_is_wrong(fault: str, sentence: str, tmp_path: Path) -> None:
    limit = "30" if fault == "hang" else "300"
    status, said = finished(tmp_path, "--processes", "2", "--fault", fault, "--mesh.time-limit", limit)
    assert status != 0 and sentence in said, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--processes", "3", "--mesh.shard", "2"], "The mesh does not fit"),
        (["--processes", "2", "--mesh.pods", "4"], "The mesh does not fit"),
        (["--processes", "0"], "--processes"),
        (["--mesh.tensr", "2"], "--mesh.tensor"),
    ],
)
def test_a_wrong_mesh_is_refused_before_anything_starts(words: list[str], sentence: str, tmp_path: Path) -> None:
    status, said = finished(tmp_path, *words)
    assert status == 2 and sentence in said and said.count("\n") == 1

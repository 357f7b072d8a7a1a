"""Processes that die, hang or differ: the run goes on from its last state, or the first process says why it ends."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    status, said = finished(tmp_path, "--processes", "2", "--fault", fault, "--mesh.time-limit", "15")
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

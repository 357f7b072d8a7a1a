"""A run in a process of its own, which is killed at a file operation or at a moment; its clocks stand still."""

import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it when they are made: here it is imported once

from keifu import cli
from keifu.recipes.images import latent_diffusion
from keifu.training import loop, pace, recorder
from keifu.training.hardware import cost
from keifu.training.settings import as_chosen

PROCESSES = get_context("forkserver")  # forks from a process that has imported all this and computed nothing
PROCESSES.set_forkserver_preload([
    "killing", "keifu.commands.train", "keifu.recipes.assistant.ppo", "keifu.recipes.images.clip",
    "keifu.recipes.language.gpt", "keifu.models.qwen3", "matplotlib.figure", "matplotlib.backends.backend_svg", "tyro",
])  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"}


@dataclass
class Fault:
    """Kills this process before its file operation of this number, counted from 1, in a folder."""

    folder: str
    at: int | None
    count: int = 0

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count Python's file operations before they happen."""
        if event in EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            self.operation(arguments[0])

    def operation(self, path: Any) -> None:
        if isinstance(path, str | Path) and str(path).startswith(self.folder):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def hold_clocks() -> None:
    """Hold what is written of seconds and of free memory the same in every run."""
    pace.Clock.lap = lambda self: 1.0
    pace.Clock.paused = lambda self, name=None: nullcontext()  # pyright: ignore
    pace.time = type("Clock", (), {"perf_counter": staticmethod(float)})  # pyright: ignore
    recorder.peak = lambda device, dtype: 1e12
    every = {"log_every": 2, "evaluate_every": 2, "sample_every": 2, "save_every": 1}
    loop.as_chosen = lambda settings: replace(as_chosen(settings), **every)
    latent_diffusion.STEPS = 2
    estimate = cost.estimate
    cost.estimate = lambda *given: estimate(*given)._replace(available=2**30, step_seconds=1.0)


def work(words: list[str], folder: str, at: int | None, output: Path) -> None:
    """Run `keifu` in this process, and write the number of its file operations."""
    sys.stdout = sys.stderr = output.open("a")  # open to the end: an error of this function is written there too
    torch.set_num_threads(1)
    hold_clocks()
    fault, fsync = Fault(folder, at), os.fsync
    sys.addaudithook(fault.hook)

    def counted(descriptor: int) -> None:
        fault.operation(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    os.fsync = counted
    try:
        cli.main(words)
    finally:
        output.with_suffix(".count").write_text(str(fault.count))


def run(words: list[str], folder: Path, at: int | None = None, seconds: float | None = None) -> int | None:
    """Return the exit code of `keifu` with these words, killed before operation number `at`, or after `seconds`."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the process that forks, which does not get it otherwise
    process = PROCESSES.Process(target=work, args=(words, str(folder), at, folder.parent / "output"))
    process.start()
    process.join(seconds)
    if process.is_alive() and seconds is not None:
        process.kill()
    process.join()
    return process.exitcode


def operations(folder: Path) -> int:
    """Return the number of file operations of the last process that ended by itself."""
    return int((folder.parent / "output.count").read_text())


def files(folder: Path) -> dict[str, str]:
    """Return the hash of every file."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in found}


def to_the_end(words: list[str], folder: Path) -> None:
    """Go on with a run that was killed, or begins it again where nothing of it was written."""
    resumed = ["train", "--resume", str(folder)] if (folder / "recipe.json").exists() else words
    code = run(resumed, folder)
    assert code == 0, (folder.parent / "output").read_text()[-2000:]


def timed(words: list[str], folder: Path) -> float:
    """Return the seconds of a complete run."""
    shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    code = run(words, folder)
    assert code == 0, (folder.parent / "output").read_text()[-2000:]
    return time.monotonic() - start

"""A recipe of a user's file that trains a toy, slowly enough to be killed in, and fails as the test asks."""

import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from group_toys import KINDS, ToyData

from keifu.distributed.checkpoint import HashedFile
from keifu.processes import current
from keifu.training import setup
from keifu.training.job import RUN_FOLDER, Job, Jobs, RunFacts
from keifu.training.protocols import Batch
from keifu.training.run import checkpoint
from keifu.training.run.run_directory import last_step
from keifu.training.settings import Settings


@dataclass(frozen=True)
class Recipe:
    """Options of the run; fault: what is wrong with process 1 of a new run, or happens to it at step 7, or to process 0
    as it ends a state ("no room"); "cut off": process 1 dies in the state of step 6. until: a file that the last step
    waits for."""

    kind: str = "gpt2"
    steps: int = 12
    seconds: float = 0.0
    fault: str = ""
    until: Path | None = None


@dataclass(frozen=True)
class FaultyData(ToyData):
    """Batches that take their time, with a fault on process 1."""

    seconds: float = 0.0
    fault: str = ""
    last: int = 0
    until: Path | None = None

    @property
    def apart(self) -> str:
        """The fault of this process."""
        return self.fault if current().rank == 1 else ""

    def batch(self, step: int) -> Batch:
        time.sleep(self.seconds)
        while step == self.last and self.until and not self.until.exists():
            time.sleep(0.05)
        if step == 7 and self.apart == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 7 and self.apart == "hang":
            time.sleep(3600)
        if step == 7 and self.apart == "fail":
            raise FileNotFoundError(2, "gone", "part-1.bin")
        return super().batch(step)


def commit(directory: Path, step: int, *rest: Any, write: Any = checkpoint.commit, **more: Any) -> None:
    """Commit a state, or fail at step 4 as if the disk was full."""
    if step == 4:
        raise OSError(28, "No space left on device")
    write(directory, step, *rest, **more)


def cut_off(file: Any, data: Any, write: Any = HashedFile.write) -> int:
    """Write a part of a state, or die in the state of step 6 behind the other process."""
    folder = Path(file.name).parent
    while "00000006" in folder.name:
        if [path for path in folder.glob("shard-00001-*") if path.stat().st_size]:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
    return write(file, data)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training. Only a new run has faults."""
    begun = last_step((yield RUN_FOLDER)) is not None
    torch.manual_seed(0)
    build, objective, _ = KINDS[recipe.kind]
    end = {"last": recipe.steps - 1, "until": recipe.until}
    data = FaultyData(recipe.kind, 6, seconds=recipe.seconds, fault="" if begun else recipe.fault, **end)
    if data.apart == "other data":
        object.__setattr__(data, "fingerprint", "others")
    if data.apart == "other version":
        setup.__version__ = "0.0.1"
    if data.fault == "no room":
        checkpoint.commit = commit
    if data.apart == "cut off":
        HashedFile.write = cut_off
    if data.apart == "full disk":  # no file may have more than a byte
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    settings = Settings(
        steps=recipe.steps, batch_size=6, micro_batch=6, precision="float32", log_every=1, save_every=2,
        evaluate_every=0, learning_rate=1e-3,
    )  # fmt: skip
    yield Job(
        model=build().train(), objective=objective, data=data, settings=settings, facts=RunFacts(title="toy"),
        save=lambda folder: None,
    )  # fmt: skip

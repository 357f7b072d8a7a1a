"""The figures of a run: a line of JSON each time, and the same to TensorBoard and Weights & Biases; knows no loop."""

import errno
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from keifu.errors import UserError
from keifu.files import write_atomic

FILE = "metrics.jsonl"


class Sink(Protocol):
    """Where figures go beside the file."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Takes the figures of a step."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


class Metrics:
    """Appends to metrics.jsonl and to the sinks; a reader always sees whole lines.

    When the disk is full, lines wait in memory until there is room: `waiting` counts them.
    """

    def __init__(self, directory: Path, sinks: list[Sink], resumed_step: int | None = None):
        self.path, self.sinks = directory / FILE, sinks
        lines = [] if resumed_step is None else [line for line in read(directory) if line["step"] <= resumed_step]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        self.file = self.path.open("ab", buffering=0)
        self.pending = b""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One line for a step."""
        self.pending += json.dumps({"step": step, **figures}).encode() + b"\n"
        for sink in self.sinks:
            sink.write(step, figures)
        whole = self.file.tell()
        try:
            self.pending = self.pending[self.file.write(self.pending) or 0 :]
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.file.truncate(whole)

    @property
    def waiting(self) -> bool:
        """Whether lines could not be written yet."""
        return bool(self.pending)

    def close(self) -> None:
        """Closes the file and the sinks."""
        self.file.close()
        for sink in self.sinks:
            sink.close()


def read(directory: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl; a last line that was cut off by a crash is left out."""
    path = directory / FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class TensorBoard:
    """Events for TensorBoard in the folder `tensorboard` of the run."""

    def __init__(self, directory: Path):
        _package("tensorboard")
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(str(directory / "tensorboard"))

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of the project keifu; the package's own environment variables choose the account, or offline use."""

    def __init__(self, directory: Path, described: dict[str, Any]):
        wandb = _package("wandb")
        self.run = wandb.init(project="keifu", name=directory.name, dir=str(directory), config=described)

    def write(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


def sinks(directory: Path, tensorboard: bool, wandb: bool, described: dict[str, Any]) -> list[Sink]:
    """The sinks that were asked for; a missing package is a `UserError` before training starts."""
    wanted: list[Sink] = []
    if tensorboard:
        wanted.append(TensorBoard(directory))
    if wandb:
        wanted.append(WeightsAndBiases(directory, described))
    return wanted


def _package(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        raise UserError(f"{name}=True needs the package {name}: pip install 'keifu[logging]', or leave it out.") from None

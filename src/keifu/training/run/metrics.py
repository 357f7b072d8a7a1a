"""Metrics of a run: JSON lines in metrics.jsonl, and optionally TensorBoard and Weights & Biases."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from keifu.errors import UserError, install
from keifu.files import FULL, write_atomic
from keifu.processes import current
from keifu.untrusted import plain_file

FILE = "metrics.jsonl"


class Sink(NamedTuple):
    """A destination of metrics other than the file: a function that writes the figures of a step, and one that closes
    it.
    """

    write: Callable[[int, dict[str, float | int]], Any]
    close: Callable[[], Any]


class RunMetrics:
    """Writer of metrics.jsonl and of the sinks. A reader always sees complete lines.

    After resuming, lines later than the loaded state (of `step` steps, with `skipped` batches skipped in rewinds) are
    removed. Only rank 0 writes. If the disk is full, lines stay in memory until there is space.

    damaged: the numbers of lines that cannot be read. latest: the latest value of every figure before the run was
    resumed. validated: the step of the last validation before that.
    """

    def __init__(self, directory: Path, sinks: Sequence[Sink], step: int, skipped: int = 0):
        self.path, self.sinks = directory / FILE, sinks
        lines, self.damaged = read_lines(directory)
        before = [line for line in lines if (line.get("skipped", 0), line["step"]) <= (skipped, step)]
        self.latest = {name: value for line in before for name, value in line.items() if name != "step"}
        self.validated = max((line["step"] for line in before if "validation_loss" in line), default=None)
        if current().is_main:
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in before))
        self.file = (self.path if current().is_main else Path(os.devnull)).open("ab", buffering=0)
        self.pending = b""

    def write(self, step: int, figures: dict[str, float | int]) -> None:
        """Write a line for a step."""
        self.pending += json.dumps({"step": step, **figures}).encode() + b"\n"
        for sink in self.sinks:
            sink.write(step, figures)
        size_before = self.file.tell()
        try:
            if current().is_main and not self.path.exists():  # the folder was removed: create it again
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file, size_before = self.path.open("ab", buffering=0), 0
            self.pending = self.pending[self.file.write(self.pending) or 0 :]
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.file.truncate(size_before)

    def close(self) -> None:
        """Close the file and the sinks."""
        self.file.close()
        for sink in self.sinks:
            sink.close()


def read(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, without damaged lines and an incomplete last line after a crash."""
    return read_lines(directory)[0]


def read_lines(directory: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the readable lines of metrics.jsonl, and the numbers of damaged ones, counted from 1."""
    path = directory / FILE
    texts = plain_file(path).read_bytes().splitlines(keepends=True) if path.exists() else []
    lines = [_line(text) for text in texts if text.endswith(b"\n")]
    return [line for line in lines if line], [number for number, line in enumerate(lines, 1) if not line]


def _line(text: bytes) -> dict[str, Any] | None:
    """Return a line's figures; None if it is not JSON, has no step, or has a figure that is not a number."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    numbers = isinstance(line, dict) and all(isinstance(value, int | float) for value in line.values())
    return line if numbers and isinstance(line.get("step"), int) else None


def last_metrics(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the lines without those of steps that were undone by a rewind."""
    remaining_lines: list[Mapping[str, Any]] = []
    for line in lines:
        if "rewound_from" in line:
            remaining_lines = [earlier for earlier in remaining_lines if earlier["step"] <= line["step"]]
        remaining_lines.append(line)
    return remaining_lines


def sinks(directory: Path, tensorboard: bool, wandb: bool, described: dict[str, Any]) -> list[Sink]:
    """Open the destinations that the settings request. Raises UserError if a package is missing."""
    opened = list[Sink]()
    if tensorboard and current().is_main:  # events are in the run's folder `tensorboard`
        _package("tensorboard")
        writer = import_module("torch.utils.tensorboard").SummaryWriter(str(directory / "tensorboard"))

        def write(step: int, figures: dict[str, float | int]) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)

        opened.append(Sink(write, writer.close))
    if wandb and current().is_main:  # the package's environment variables choose the account, or offline use
        run = _package("wandb").init(project="keifu", name=directory.name, dir=str(directory), config=described)
        opened.append(Sink(lambda step, figures: run.log(figures, step=step), run.finish))
    return opened


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        advice = f"run {install('logging')}, or leave it out"
        raise UserError(f"{name}=True needs the Python package {name}: {advice}.") from None

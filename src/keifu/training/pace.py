"""Timing of a run: time per step, time left, and how many steps fit into a given time."""

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

CHECK = 0.02  # the share of a time budget between two checks of the pace
TOLERANCE = 0.02  # the relative change of the number of steps below which the plan stays


def busy() -> str:
    """Return a phrase about the load of the machine if there is more work than processors; else an empty string."""
    count = os.cpu_count() or 1
    load = os.getloadavg()[0] if sys.platform != "win32" else 0.0
    return f" (the machine is busy: a load of {load:.1f} on {count} processors)" if load > 1.5 * count else ""


class Pace:
    """A stopwatch for training alone, without validation, samples and checkpoints.

    `seconds`: training time up to the last lap, including the time before a run was resumed. `lasted`: the seconds of
    the last validation, sample and checkpoint, by name.
    """

    def __init__(self, seconds: float = 0.0, passed: float = 0.0, lasted: Mapping[str, float] | None = None):
        self.seconds, self.lap_seconds, self.since = seconds, 0.0, time.perf_counter()
        self.start = self.since - passed
        self.lasted = dict(lasted or {})

    @property
    def passed(self) -> float:
        """Seconds of the whole run so far, including everything beside training and the time before it was resumed."""
        return time.perf_counter() - self.start

    @property
    def trained(self) -> float:
        """Seconds of training so far."""
        self._read()
        return self.seconds + self.lap_seconds

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Measures a block and stores its seconds in `lasted` under the name."""
        start = time.perf_counter()
        yield
        self.lasted[name] = time.perf_counter() - start

    def lap(self) -> float:
        """Seconds of training since the last lap."""
        self._read()
        lap, self.lap_seconds = self.lap_seconds, 0.0
        self.seconds += lap
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run a block whose time does not count as training."""
        self._read()
        yield
        self.since = time.perf_counter()

    def _read(self) -> None:
        now = time.perf_counter()
        self.lap_seconds += now - self.since
        self.since = now


class TimeLeft:
    """The time left at the mean speed of all steps so far, everything included; steps with smaller batches count as
    fractions."""

    def __init__(self, first: float, total: float):
        self.first, self.total, self.start = first, total, time.perf_counter()

    def seconds(self, done: float) -> float:
        """Seconds from now to the end."""
        return (time.perf_counter() - self.start) / max(1, done - self.first) * (self.total - done)


class Budget:
    """The time that the rest of a run takes, and the number of steps that fit into `seconds` (None: no limit).

    Validation, samples and checkpoints are included once each has been measured: `every` is the number of steps between
    them, by their names in `Pace.lasted`. Each comes once more at the end.
    """

    def __init__(self, seconds: float | None, pace: Pace, step: int, every: Mapping[str, int]):
        self.seconds, self.pace, self.every = seconds, pace, every
        self.step, self.trained, self.looked = step, pace.trained, pace.passed
        self.step_seconds: float | None = None

    def steps(self, step: int, planned: int) -> int:
        """Return the number of steps of the whole run at the current pace, at least one more; the planned number where
        it still fits, or where the last check was a moment ago."""
        if self.seconds is None or self.pace.passed - self.looked < CHECK * self.seconds:
            return planned
        lasted = self.pace.lasted
        between = math.fsum(seconds / self.every[name] for name, seconds in lasted.items() if self.every[name])
        each, after = self._step_seconds(step) + between, math.fsum(lasted.values())
        fitting = step + max(1, int((self.seconds - self.pace.passed - after) / each))
        return planned if abs(fitting - planned) <= TOLERANCE * planned else fitting

    def left(self, step: int, steps: int) -> float:
        """Seconds that the rest takes at the current pace; before the first step, those beside the steps."""
        times = {name: (steps - 1) // every - step // every if every else 0 for name, every in self.every.items()}
        between = math.fsum(seconds * (times[name] + 1) for name, seconds in self.pace.lasted.items())
        return (steps - step) * self._step_seconds(step) + between

    def _step_seconds(self, step: int) -> float:
        """Seconds per step at the current pace; 0 before the first one."""
        trained = self.pace.trained
        if step > self.step:
            recent = (trained - self.trained) / (step - self.step)
            self.step_seconds = recent if self.step_seconds is None else (self.step_seconds + recent) / 2
            self.step, self.trained, self.looked = step, trained, self.pace.passed
        return self.step_seconds or 0.0

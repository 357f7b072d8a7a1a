"""The clock of a run: its training time, the time left, and the number of steps that fit into a time limit."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

CHECK = 0.02  # the share of a time limit between two checks of the pace
SHARE = 0.1  # the share of a time limit that all samples, all validations, and all checkpoints may each take
TOLERANCE = 0.02  # the plan is kept if its number of steps changes relatively by less


def busy() -> str:
    """Return a phrase about the load of the machine if it has more work than CPUs; otherwise ""."""
    count = os.cpu_count() or 1
    load = os.getloadavg()[0] if sys.platform != "win32" else 0.0
    return f" (the machine is busy: a load of {load:.1f} on {count} processors)" if load > 1.5 * count else ""


class Clock:
    """Clock of a run, which measures training separately from validations, samples and checkpoints.

    seconds: training time up to the last lap, in all parts of a resumed run. passed: time of the whole run. lasted:
    seconds of the last validation, sample and checkpoint, by name.
    """

    def __init__(self, seconds: float = 0.0, passed: float = 0.0, lasted: Mapping[str, float] | None = None):
        self.seconds, self.before = seconds, passed
        self.lasted = dict(lasted or {})
        self.start(0, {})

    def start(
        self, step: int, every: Mapping[str, int], limit: float | None = None, count: Callable[[int], float] = float
    ) -> None:
        """Start the measurement at a step.

        every: steps between validations, samples and checkpoints. limit: seconds of the whole run. count: returns the
        number of steps before a step, with a smaller batch counted as a fraction.
        """
        self.since = time.perf_counter()
        self.begun = self.since - self.before
        self.lap_seconds = 0.0
        self.every, self.limit, self.count = every, limit, count
        self.step, self.trained, self.looked = step, self.seconds, self.passed
        self.step_seconds: float | None = None

    @property
    def passed(self) -> float:
        """Seconds of the whole run so far, including everything that is not training."""
        return time.perf_counter() - self.begun

    def facts(self) -> dict[str, Any]:
        """Return the constructor's arguments, for a checkpoint."""
        return {"seconds": self.seconds, "passed": self.passed, "lasted": dict(self.lasted)}

    @contextmanager
    def paused(self, name: str | None = None) -> Iterator[None]:
        """Run a block whose time does not count as training. Store its seconds in `lasted` under `name`."""
        self._read()
        start = self.since
        yield
        self.since = time.perf_counter()
        if name:
            self.lasted[name] = self.since - start

    def lap(self) -> float:
        """Return the seconds of training since the last lap."""
        self._read()
        lap, self.lap_seconds = self.lap_seconds, 0.0
        self.seconds += lap
        return lap

    def steps(self, step: int, planned: int) -> int:
        """Return the number of steps of the whole run that fit into the limit at the current pace, at least one more.

        Return `planned` if it still fits, and until some time has passed since the last check.
        """
        if self.limit is None or self.passed - self.looked < CHECK * self.limit:
            return planned
        self.looked = self.passed
        fitting = self.fitting(step, planned, self._pace(step))
        return planned if abs(fitting - planned) <= TOLERANCE * planned else fitting

    def fitting(self, step: int, planned: int, pace: float) -> int:
        """Return the number of steps of the whole run that fit into the time limit if a step takes `pace` seconds. At
        least one more step fits.
        """
        between = sum(t / (self.interval(name, planned) or math.inf) for name, t in self.lasted.items())
        limit = self.limit or math.inf
        remaining = limit - self.passed - sum(t for name, t in self.lasted.items() if not self.skips(name))
        return step + max(1, int(min(remaining / max(pace + between, 1e-9), 1e12)))

    def skips(self, name: str) -> bool:
        """Return whether a sample takes too much of a time limit to be repeated at the end."""
        return name == "sample" and self.limit is not None and self.lasted.get(name, 0.0) > SHARE * self.limit

    def interval(self, name: str, steps: int) -> int:
        """Return the number of steps between two validations, samples or checkpoints (`name`) in a run of `steps`
        steps; 0: none.

        With a time limit it grows until all of them together take at most their share of it.
        """
        every, lasted = self.every[name], self.lasted.get(name, 0.0)
        if self.limit is None or not every:
            return every
        return every * max(1, math.ceil(lasted * steps / every / (SHARE * self.limit)))

    def left(self, step: int, steps: int) -> float:
        """Return the seconds that the remaining steps take at the current pace (0 before the first step), with
        validations, samples and checkpoints.

        Each of these is included after it has been measured once. Each comes once more at the end.
        """
        intervals = {name: self.interval(name, steps) for name in self.every}
        times = {name: (steps - 1) // every - step // every if every else 0 for name, every in intervals.items()}
        between = math.fsum(seconds * (times[name] + 1) for name, seconds in self.lasted.items())
        return (self.count(steps) - self.count(step)) * self._pace(step) + between

    def _pace(self, step: int) -> float:
        """Return the seconds per step, the mean of recent and earlier ones; 0 before the first step."""
        self._read()
        if step > self.step:
            trained = self.seconds + self.lap_seconds
            recent = (trained - self.trained) / (self.count(step) - self.count(self.step))
            self.step_seconds = recent if self.step_seconds is None else (self.step_seconds + recent) / 2
            self.step, self.trained = step, trained
        return self.step_seconds or 0.0

    def _read(self) -> None:
        now = time.perf_counter()
        self.lap_seconds += now - self.since
        self.since = now

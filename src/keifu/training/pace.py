"""How fast a run goes, and how many steps fit in its minutes while the pace changes; knows no model and no loop."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

CHECK, TOLERANCE = 0.02, 0.02  # shares of a budget: time between looks at the pace, steps not worth a change


class Pace:
    """A stopwatch of training alone: `seconds` is its sum at the last lap, earlier parts of a resumed run included.

    `lasted` has the seconds of the last validation, sample and saving, by name.
    """

    def __init__(self, seconds: float = 0.0, passed: float = 0.0):
        self.seconds, self.lap_seconds, self.since = seconds, 0.0, time.perf_counter()
        self.start = self.since - passed
        self.lasted: dict[str, float] = {}

    @property
    def passed(self) -> float:
        """Seconds of the whole run, everything counted, earlier parts of a resumed one included."""
        return time.perf_counter() - self.start

    @property
    def trained(self) -> float:
        """Seconds of training until now."""
        self._read()
        return self.seconds + self.lap_seconds

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """How long this block takes is noted under the name."""
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
        """Time in this block does not count."""
        self._read()
        yield
        self.since = time.perf_counter()

    def _read(self) -> None:
        now = time.perf_counter()
        self.lap_seconds += now - self.since
        self.since = now


class TimeLeft:
    """How long the rest takes at the speed of all steps so far, everything counted; smaller steps are fractions."""

    def __init__(self, first: float, total: float):
        self.first, self.total, self.start = first, total, time.perf_counter()

    def seconds(self, done: float) -> float:
        """Seconds from now to the end."""
        return (time.perf_counter() - self.start) / max(1, done - self.first) * (self.total - done)


@dataclass(frozen=True)
class Plan:
    """How many steps a run makes, and how its learning rate follows where that number is changed on the way.

    The rate is a function of the position in the schedule of `scheduled` steps. From step `since` on, at `position`, it
    goes on evenly to the schedule's end at `steps`.
    """

    steps: int
    scheduled: int
    since: int = 0
    position: float = 0.0

    def ahead(self, step: int) -> float:
        """The position of a step in the schedule minus its number: 0 in a run whose number of steps never changed."""
        stride = (self.scheduled - self.position) / max(1, self.steps - self.since)
        return self.position + (step - self.since) * stride - step

    def changed(self, step: int, steps: int) -> "Plan":
        """From this step on, another number of steps."""
        return replace(self, steps=steps, since=step, position=step + self.ahead(step))


class Budget:
    """What the rest of a run takes, and how many steps fit where it has so many `seconds`.

    Validations, samples and saving are included, once each was seen: `every` has the steps between them, by their names
    in `Pace.lasted`. Each comes once more at the end.
    """

    def __init__(self, seconds: float | None, pace: Pace, step: int, every: Mapping[str, int]):
        self.seconds, self.pace, self.every = seconds, pace, every
        self.step, self.trained, self.looked = step, pace.trained, pace.passed
        self.step_seconds: float | None = None

    def steps(self, step: int, planned: int) -> int:
        """The steps of the whole run at the present pace, at least one more; or those that were planned, where they
        still fit or the last look was a moment ago."""
        if self.seconds is None or self.pace.passed - self.looked < CHECK * self.seconds:
            return planned
        each, after = self._costs(step)
        fitting = step + max(1, int((self.seconds - self.pace.passed - after) / each))
        return planned if abs(fitting - planned) <= TOLERANCE * planned else fitting

    def left(self, step: int, steps: int) -> float:
        """Seconds that the rest takes at the present pace."""
        each, after = self._costs(step)
        return (steps - step) * each + after

    def _costs(self, step: int) -> tuple[float, float]:
        """Seconds of a step, with its share of what comes between steps, and of what comes after the last one."""
        trained, lasted = self.pace.trained, self.pace.lasted
        if step > self.step:
            recent = (trained - self.trained) / (step - self.step)
            self.step_seconds = recent if self.step_seconds is None else (self.step_seconds + recent) / 2
            self.step, self.trained, self.looked = step, trained, self.pace.passed
        between = math.fsum(seconds / self.every[name] for name, seconds in lasted.items() if self.every[name])
        return (self.step_seconds or 0.0) + between, math.fsum(lasted.values())

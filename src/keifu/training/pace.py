"""How fast a run goes, validation, samples and saving not counted; knows no model and no loop."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """A stopwatch of training alone: `seconds` is its sum at the last lap, earlier parts of a resumed run included."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.lap_seconds, self.since = seconds, 0.0, time.perf_counter()

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

"""The progress display of a run, and formats of figures."""

import time
from typing import Any

from keifu.data.progress import ProgressBar

PLAIN_SECONDS = 10.0  # seconds between plain lines


class Display(ProgressBar):
    """Progress bar of a run, with its latest figures."""

    def __init__(self, total: int, unit: str):
        super().__init__("step", total)
        self.unit, self.total, self.done, self.figures, self.last_line = unit, total, 0, "", 0.0

    def advance(self, done: int) -> None:
        """Set the number of steps done."""
        self.done = done
        self.update(done, f"{done:,}/{self.total:,}  {self.figures}")

    def expect(self, total: int) -> None:
        """Set the total number of steps."""
        self.total = total
        self.live.update(self.task, total=total)

    def show(self, figures: dict[str, Any]) -> None:
        """Show the main ones of the latest figures; without a terminal, at most one line in ten seconds."""
        words = {
            "loss": lambda x: f"loss {x:.4g}",
            f"{self.unit}_per_second": lambda x: f"{x:,.0f} {self.unit}/s",
            "flops_utilisation": lambda x: f"{x:.0%} of peak",
            "seconds_left": lambda x: f"{format_seconds(x)} left",
        }
        self.figures = "  ".join(write(figures[name]) for name, write in words.items() if name in figures)
        self.advance(self.done)
        if not self.is_shown and time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.note(f"step {self.done:,}/{self.total:,}  {self.figures}")
            self.last_line = time.monotonic()


def format_seconds(seconds: float | int) -> str:
    """Return a duration as text: 42 s, 3:07 min, 2:30 h, 3 d 4 h."""
    whole_seconds = round(seconds)
    if whole_seconds < 100:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole_seconds} s"
    if whole_seconds < 6000:
        return f"{whole_seconds // 60}:{whole_seconds % 60:02d} min"
    minutes = whole_seconds // 60
    if minutes < 48 * 60:
        return f"{minutes // 60}:{minutes % 60:02d} h"
    return f"{minutes // 1440} d {minutes // 60 % 24} h"


def format_bytes(n_bytes: float | int) -> str:
    """Return an amount of memory with three digits: 512 MB, 1.25 GB (powers of 1000)."""
    value, unit = float(n_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"


def number(amount: int, unit: str) -> str:
    """Return a whole number and its unit: 1 step, 2,000 steps."""
    return f"{amount:,} {unit}{'' if amount == 1 else 's'}"


def format_count(number: float | int) -> str:
    """Return a number with three digits: 950, 1.31 M, 7 B."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * scale:  # three digits round up to the unit
            return f"{number / scale:.3g} {letter}"
    return f"{number:g}"

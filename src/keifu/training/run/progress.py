"""The progress display of a run: a progress bar on a terminal, plain lines otherwise; and formats of figures."""

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

PLAIN_SECONDS = 10.0  # between plain lines


class Display:
    """Shows the progress of a run, as a context manager. Notes are printed above the bar and stay."""

    def __init__(self, total: int, unit: str):
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.console.on_broken_pipe = lambda: None  # rich's own ends the process
        self.unit, self.last_line = unit, 0.0
        figures = TextColumn("{task.description}")
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), figures)
        self.live = Progress(*columns, console=self.console, refresh_per_second=4, disable=not self.console.is_terminal)
        self.task = self.live.add_task("", total=total)

    def __enter__(self) -> "Display":
        self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):
            self.live.stop()

    def advance(self, done: int) -> None:
        """Set the number of steps done."""
        self.live.update(self.task, completed=done)

    def expect(self, total: int) -> None:
        """Set the total number of steps."""
        self.live.update(self.task, total=total)

    def show(self, figures: dict[str, Any]) -> None:
        """Show the latest figures; without a terminal at most one line in ten seconds."""
        text = format_figures(figures, self.unit)
        self.live.update(self.task, description=escape(text))
        if self.live.disable and time.monotonic() - self.last_line >= PLAIN_SECONDS:
            [task] = self.live.tasks
            self.note(f"step {task.completed:,}/{task.total:,}  {text}")
            self.last_line = time.monotonic()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        with suppress(OSError):  # a terminal or a pipe that was closed is no reason to lose a run
            self.console.print(text, markup=False)


def format_figures(figures: dict[str, Any], unit: str) -> str:
    """Return the main figures of a step as a short text."""
    words = {
        "loss": lambda x: f"loss {x:.4g}",
        f"{unit}_per_second": lambda x: f"{x:,.0f} {unit}/s",
        "flops_utilisation": lambda x: f"{x:.0%} of peak",
        "seconds_left": lambda x: f"{format_seconds(x)} left",
    }
    return "  ".join(write(figures[name]) for name, write in words.items() if name in figures)


def format_seconds(seconds: float | int) -> str:
    """Return a duration as text: 42 s, 3:07 min, 2:30 h, 3 d 4 h."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 6000:
        return f"{whole // 60}:{whole % 60:02d} min"
    minutes = whole // 60
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
        if number >= 0.9995 * scale:  # which three digits round up to it
            return f"{number / scale:.3g} {letter}"
    return f"{number:g}"

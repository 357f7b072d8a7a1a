"""Progress on standard error: a bar in a terminal, otherwise a few plain lines."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from keifu.errors import printable

Item = TypeVar("Item")
Advance = Callable[[int], None]


class ProgressBar:
    """Progress bar, as a context manager. Notes are printed above the bar and remain on the screen."""

    def __init__(self, label: str, total: int | None, *columns: Any):
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.console.on_broken_pipe = lambda: None  # rich's handler ends the process
        self.is_shown = self.console.is_terminal
        bar = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")
        self.live = Progress(*bar, *columns, console=self.console, refresh_per_second=4, disable=not self.is_shown)
        self.task = self.live.add_task(label, total=total, text="")

    def __enter__(self) -> Any:
        self.live.start()
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):
            self.live.stop()

    def update(self, done: int, text: str) -> None:
        """Set the amount that is done, and the text after the bar."""
        self.live.update(self.task, completed=done, text=escape(text))

    def note(self, text: str) -> None:
        """Print a line above the bar. It may contain text of data or of a model: see `printable`."""
        with suppress(OSError):  # a closed terminal or pipe must not stop the work
            self.console.print(printable(text), markup=False)


def counted(label: str, items: Sequence[Item], unit: str) -> Iterator[Item]:
    """Yield the items, and show how many are done."""
    with counting(label, len(items), unit) as advance:
        for number, item in enumerate(items, 1):
            yield item
            advance(number)


@contextmanager
def counting(label: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
    """Show the progress of a task. Yield the function that reports it.

    The function takes the amount reached so far, not the difference. In a terminal there is a bar. Otherwise a line is
    printed at each tenth of the total (without a total: every ten seconds) and at the end.
    """
    shown_tenths, started, last = 0, time.monotonic(), 0
    with ProgressBar(label, total, TimeElapsedColumn(), TimeRemainingColumn()) as bar:

        def advance(reached: int) -> None:
            nonlocal shown_tenths, last
            last = reached
            bar.update(reached, _amount(reached, total, unit))
            tenths = 10 * reached // total if total else int(time.monotonic() - started) // 10
            if tenths > shown_tenths and not bar.is_shown:
                bar.note(f"{label}: {_amount(reached, total, unit)}")
            shown_tenths = max(shown_tenths, tenths)

        yield advance
        if not bar.is_shown:
            bar.note(f"{label}: done, {_amount(last, None, unit)} in {time.monotonic() - started:.1f} s")


def _amount(reached: int, total: int | None, unit: str) -> str:
    """Format both amounts with one prefix, `1.2 of 4.5 MB`. Counts are integers, `8 of 63 windows`."""
    largest = max(reached, total or 0)
    if unit != "B":
        return f"{reached:,}{f' of {total:,}' if total else ''} {unit}"
    scale, prefix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e3 else (1, "")
    of = f" of {total / scale:.1f}" if total else ""
    return f"{reached / scale:.1f}{of} {prefix}B"

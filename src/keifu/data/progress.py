"""A progress bar on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], None]


@contextmanager
def counting(label: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
    """Show the progress of a piece of work; yield the function that reports it.

    The function takes the amount reached so far, not the difference. A terminal gets a bar; a pipe or a file gets one
    line at each tenth of the total (without a total: every ten seconds) and one at the end.
    """
    with (_bar if sys.stderr.isatty() else _lines)(label, total, unit) as advance:
        yield advance


@contextmanager
def _bar(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}")
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, amount="")
        yield lambda reached: progress.update(task, completed=reached, amount=_amount(reached, total, unit))


@contextmanager
def _lines(label: str, total: int | None, unit: str) -> Iterator[Advance]:
    shown, started, reached_last = 0, time.monotonic(), 0

    def advance(reached: int) -> None:
        nonlocal shown, reached_last
        reached_last = reached
        tenths = 10 * reached // total if total else int(time.monotonic() - started) // 10
        if tenths > shown:
            shown = tenths
            print(f"{label}: {_amount(reached, total, unit)}", file=sys.stderr, flush=True)

    yield advance
    seconds = time.monotonic() - started
    print(f"{label}: done, {_amount(reached_last, None, unit)} in {seconds:.1f} s", file=sys.stderr, flush=True)


def _amount(reached: int, total: int | None, unit: str) -> str:
    """Both numbers with one prefix, `1.2 of 4.5 MB`; what is counted and not measured is whole, `8 of 63 windows`."""
    largest = max(reached, total or 0)
    if unit != "B":
        return f"{reached:,}{f' of {total:,}' if total else ''} {unit}"
    scale, prefix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e3 else (1, "")
    of = f" of {total / scale:.1f}" if total else ""
    return f"{reached / scale:.1f}{of} {prefix}B"

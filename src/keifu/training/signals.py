"""Signal handling: Ctrl-C, SIGTERM and SIGHUP set a flag that the training loop reads between micro-batches. Work that
changes no state, such as a validation, is left at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

# Windows has only two of them
SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]


class Interrupted(KeyboardInterrupt):
    """Exception: a run was stopped on request. The message says what is saved, and the command to resume it.
    number: the signal's number."""

    def __init__(self, text: str = "", number: int = signal.SIGINT):
        super().__init__(text)
        self.number = number


class LeftAtOnce(Interrupted):
    """Exception: a stop was requested in a block that may be left at any point. The run itself handles it."""


class StopRequest:
    """Context manager in which the first Ctrl-C (SIGTERM, SIGHUP) sets `wanted`, and the second one stops at once, as
    usual.

    SIGHUP stays ignored if it was ignored, as under nohup. Outside the main thread, where Python allows no signal
    handlers, this does nothing. notify: shows a message.
    """

    def __init__(self, notify: Callable[[str], None]):
        self.notify = notify
        self.wanted = False
        self.has_come = self.may_leave = False
        self.number: int = signal.SIGINT
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self._first)
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
        if isinstance(error, Interrupted):
            error.number = self.number

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Run a block that a stop request leaves at once, by raising `LeftAtOnce`. The block must not change the state
        of the run."""
        if self.has_come:
            raise LeftAtOnce(number=self.number)
        self.may_leave = True
        try:
            yield
        finally:
            self.may_leave = False

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self.number = number
        self._restore()
        self.notify("Stopping and saving the state; once more stops at once, without saving.")
        self.has_come = True
        if self.may_leave:
            raise LeftAtOnce(number=self.number)

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

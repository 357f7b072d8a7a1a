"""Signal handling: Ctrl-C and SIGTERM set a flag that the training loop reads between micro-batches."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run was stopped on request and its state is saved; the message names the command to resume it."""


class StopRequest:
    """A context in which the first Ctrl-C (or SIGTERM) sets `wanted`, and the second one stops at once, as usual.

    Outside the main thread, where Python allows no signal handlers, it does nothing. `notify` shows a message.
    """

    def __init__(self, notify: Callable[[str], None]):
        self.notify = notify
        self.wanted = False
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._first) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self._restore()
        self.notify("Stopping and saving the state; once more stops at once, without saving.")

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}

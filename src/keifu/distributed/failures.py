"""What is said when one of several processes fails, hangs or dies: one sentence, by the first process.

Each process gives a sign of life twice a second. One that fails leaves its sentence in the store. One that only sees
that another has gone waits for that one's sentence, or finds out which gives no more signs.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from torch import distributed

from keifu.errors import UserError
from keifu.processes import Processes

BEAT = 0.5  # seconds between signs of life
GRACE = 5.0  # seconds that another process has to say why it failed
ENDED = "ended"  # the last sign of life of a process that has done its work
DEAD = 60.0  # seconds without a sign of life after which a process counts as dead
FAILED, SHOWN = "failed", "shown"


@contextmanager
def explained(group: Processes, store: Any, explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """Run a block that all processes run: where one fails, the first one says which and why, and all end.

    explain: an exception as a sentence; None where it is no error of the user's.
    """
    signs = Signs(group.rank, group.world_size, store.clone())
    signs.thread.start()
    try:
        yield
    except Exception as error:
        signs.ended.set()
        if group.is_main and exchange_failed(error):
            raise UserError(signs.reason()) from error
        if group.is_main:
            raise
        signs.leave(error, explain)
        raise SystemExit(1) from error
    finally:
        signs.ended.set()
        if group.is_main:
            signs.store.set(SHOWN, "")


def exchange_failed(error: BaseException | None) -> bool:
    """Return whether an exception says that another process could not be reached."""
    while error is not None:
        named = isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Gloo"))
        if named or isinstance(error, distributed.DistError):
            return True
        error = error.__cause__ or error.__context__
    return False


class Signs:
    """The signs of life of the processes, in a thread with its own connection to the store, until `ended`. The first
    process's also looks whether another one has failed."""

    def __init__(self, number: int, count: int, store: Any):
        self.number, self.count, self.store = number, count, store
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="keifu-signs", daemon=True)

    def leave(self, error: Exception, explain: Callable[[Exception], str | None]) -> None:
        """Store the error sentence of this process, and wait until the first process has shown it."""
        if not exchange_failed(error):
            text = explain(error) or "".join(traceback.format_exception(error))
            self.store.set(FAILED, json.dumps([self.number, text]))
        with suppress(distributed.DistError):
            self.store.wait([SHOWN], timedelta(seconds=2 * GRACE))

    def reason(self) -> str:
        """Say why the exchange with other processes failed."""
        before, end = self._counts(), time.monotonic() + GRACE
        while time.monotonic() < end:
            if self.store.check([FAILED]):
                return self._sentence()
            time.sleep(BEAT / 5)
        others = range(1, self.count)
        gone = [n for n, beats in enumerate(self._counts()) if n in others and beats == before[n]]
        steps = [int(self._text(f"step/{n}") or -1) for n in range(self.count)]
        late = gone or [n for n in others if steps[n] < max(steps)] or [*others]
        what = "has died or stands still" if gone else "did not answer within the time limit"
        return self._gone(late, what)

    def dead(self, since: dict[int, tuple[str, float]], now: float) -> list[int]:
        """Return the other processes without a sign of life for `DEAD` seconds.

        since: the last sign of each process and when it came, which this updates.
        """
        for rank, sign in enumerate(self._counts()):
            if since.get(rank, ("", 0.0))[0] != sign:
                since[rank] = sign, now
        silent = [rank for rank, (sign, seen) in since.items() if sign != ENDED and now - seen > DEAD]
        return [rank for rank in silent if rank != self.number]

    def _beat(self) -> None:
        beats = 0
        since: dict[int, tuple[str, float]] = {}
        with suppress(distributed.DistError):  # the store goes with the process that holds it
            while not self.ended.wait(BEAT):
                beats += 1
                self.store.set(f"alive/{self.number}", str(beats))
                if self.number == 0 and self.store.check([FAILED]) and not self.ended.wait(GRACE):
                    print(self._sentence(), file=sys.stderr, flush=True)
                    self.store.set(SHOWN, "")
                    os._exit(1)  # the main thread waits for a process that will not come
                if self.number == 0 and (gone := self.dead(since, time.monotonic())):
                    # NCCL raises no exception for it: its watchdog would abort this process without a sentence
                    print(self._gone(gone, "has died"), file=sys.stderr, flush=True)
                    self.store.set(SHOWN, "")
                    os._exit(1)
            self.store.set(f"alive/{self.number}", ENDED)

    def _gone(self, ranks: list[int], what: str) -> str:
        step = max(int(self._text(f"step/{rank}") or -1) for rank in range(self.count))
        return (
            f"Process {', '.join(map(str, ranks))} of {self.count} (counted from 0) {what}, at step {step + 1:,}: "
            "start again with --resume, or let torchrun do so (--max-restarts)."
        )

    def _counts(self) -> list[str]:
        return [self._text(f"alive/{number}") for number in range(self.count)]

    def _text(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _sentence(self) -> str:
        number, text = json.loads(self.store.get(FAILED))
        return f"Process {number} of {self.count} (counted from 0): {text}"

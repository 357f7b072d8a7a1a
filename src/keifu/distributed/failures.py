"""Report of a process that fails, hangs or dies: rank 0 prints one sentence for all ranks.

Each rank writes a heartbeat to the store twice a second. A rank that fails stores its error sentence. If a rank only
notices that another rank is gone, it waits for that rank's sentence, or finds the ranks without heartbeats.
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

BEAT = 0.5  # seconds between heartbeats
GRACE = 5.0  # seconds to wait for the error sentence of another rank
ENDED = "ended"  # the last heartbeat of a rank that has finished
DEAD = 60.0  # seconds without a heartbeat after which a rank counts as dead
FAILED, SHOWN = "failed", "shown"


@contextmanager
def explained(group: Processes, store: Any, explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """Run a block that all ranks run. If one fails, rank 0 reports the rank and the reason, and all end.

    explain: converts an exception to a sentence; returns None if the user did not cause the exception.
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
        names_backend = isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL", "Gloo"))
        if names_backend or isinstance(error, distributed.DistError):
            return True
        error = error.__cause__ or error.__context__
    return False


class Signs:
    """Heartbeats of the ranks, sent by a thread with its own store connection until `ended` is set. On rank 0 the
    thread also looks for failed ranks.
    """

    def __init__(self, number: int, count: int, store: Any):
        self.number, self.count, self.store = number, count, store
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="keifu-signs", daemon=True)

    def leave(self, error: Exception, explain: Callable[[Exception], str | None]) -> None:
        """Store this rank's error sentence, and wait until rank 0 has printed it."""
        if not exchange_failed(error):
            text = explain(error) or "".join(traceback.format_exception(error))
            self.store.set(FAILED, json.dumps([self.number, text]))
        with suppress(distributed.DistError):
            self.store.wait([SHOWN], timedelta(seconds=2 * GRACE))

    def reason(self) -> str:
        """Return a sentence that says why the communication with other ranks failed."""
        before, end = self._counts(), time.monotonic() + GRACE
        while time.monotonic() < end:
            if self.store.check([FAILED]):
                return self._sentence()
            time.sleep(BEAT / 5)
        other_ranks = range(1, self.count)
        gone = [n for n, beats in enumerate(self._counts()) if n in other_ranks and beats == before[n]]
        steps = [int(self._text(f"step/{n}") or -1) for n in range(self.count)]
        late = gone or [n for n in other_ranks if steps[n] < max(steps)] or [*other_ranks]
        what = "has died or makes no progress" if gone else "did not answer within the time limit"
        return self._gone(late, what)

    def dead(self, since: dict[int, tuple[str, float]], now: float) -> list[int]:
        """Return the other ranks without a heartbeat for `DEAD` seconds.

        since: the last heartbeat of each rank and its time. This method updates it.
        """
        for rank, sign in enumerate(self._counts()):
            if since.get(rank, ("", 0.0))[0] != sign:
                since[rank] = sign, now
        silent = [rank for rank, (sign, seen_at) in since.items() if sign != ENDED and now - seen_at > DEAD]
        return [rank for rank in silent if rank != self.number]

    def _beat(self) -> None:
        beats = 0
        since: dict[int, tuple[str, float]] = {}
        with suppress(distributed.DistError):  # the store disappears with the process that hosts it
            while not self.ended.wait(BEAT):
                beats += 1
                self.store.set(f"alive/{self.number}", str(beats))
                if self.number == 0 and self.store.check([FAILED]) and not self.ended.wait(GRACE):
                    print(self._sentence(), file=sys.stderr, flush=True)
                    self.store.set(SHOWN, "")
                    os._exit(1)  # the main thread waits for a rank that is dead
                if self.number == 0 and (gone := self.dead(since, time.monotonic())):
                    # NCCL raises no exception for a dead rank: its watchdog would abort this process without a message
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

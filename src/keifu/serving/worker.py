"""Thread that owns a model. Requests arrive in a queue, and pieces of text are sent to asyncio.

Only this thread computes with the model, so nothing needs a lock. Other work runs between two steps of its engine.
"""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from torch import nn

from keifu.errors import UserError
from keifu.inference.text.draft import Draft
from keifu.inference.text.engine import Engine
from keifu.inference.text.paged.folder import CacheFolder
from keifu.inference.text.request import Piece, Request
from keifu.inference.text.runner import runner_of
from keifu.native.compiler import Unavailable
from keifu.native.library import is_open, open_library
from keifu.serving.errors import ApiError, of_exception
from keifu.serving.metrics import Metrics

LOG = logging.getLogger("keifu.serving")
Result = TypeVar("Result")
Pieces = list[tuple[int, Piece]]
Loaded = tuple[nn.Module, Any]  # model and tokenizer
NATIVE_SECONDS = 3.0  # to wait for the native step; if compiling takes longer, PyTorch answers meanwhile
GoOn = Callable[..., None]  # raises if nobody waits any more; takes the arguments of any progress function


@dataclass(frozen=True)
class Limits:
    """Limits of a model's thread.

    slots: maximal requests that are generated at once. queue: maximal waiting requests. timeout: seconds after which an
    answer is aborted. cache: bytes for keys and values; None: a quarter of the free memory. keep_alive: seconds without
    requests after which a model is unloaded; None: never. guesses: number of guessed tokens; None: as many as are
    worthwhile. pictures: folder of files that a message may use; None: none. folder: keeps keys and values for later
    runs of the server; None: none.
    """

    slots: int = 16
    queue: int = 128
    timeout: float = 600.0
    cache: int | None = None
    keep_alive: float | None = None
    guesses: int | Draft | None = None
    pictures: Path | None = None
    folder: CacheFolder | None = None


@dataclass(eq=False)
class QueuedJob:
    """Requests of one answer, and the queue of their pieces."""

    requests: Sequence[Request]
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[Pieces | Exception] = field(default_factory=asyncio.Queue)
    began: float = field(default_factory=time.monotonic)
    started: bool = False

    def put(self, item: Pieces | Exception) -> None:
        """Send pieces to the event loop that reads them. Do nothing if the loop is closed."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.out.put_nowait, item)


def _native_is_ready() -> bool:
    """Return whether the native step is compiled or known to be missing. If neither, start compiling in a thread."""

    def open_once() -> None:
        with suppress(Unavailable, UserError):  # raised again at first use
            open_library()

    if not is_open():
        opening = threading.Thread(target=open_once, name="keifu native", daemon=True)
        opening.start()
        opening.join(NATIVE_SECONDS)
    return is_open()


class Worker:
    """Thread that loads a model and computes with it until it is closed.

    load: returns the model and its tokenizer. If loading fails, the request that needed it gets the error, and the next
    request tries again. interim: returns the same for PyTorch only, to answer while the native step is compiled.
    """

    def __init__(
        self, name: str, load: Callable[[], Loaded], limits: Limits, metrics: Metrics,
        interim: Callable[[], Loaded] | None = None,
    ):  # fmt: skip
        self.name, self.limits, self.metrics = name, limits, metrics
        self._interim, self._is_interim = interim, False
        self._engine: Engine | None = None
        self.pending = 0  # running and waiting answers; changed only in the loop's thread
        self._load, self._commands = load, SimpleQueue[Callable[[], None] | None]()
        self.model: Loaded | None = None  # set once it is loaded
        self._jobs: dict[int, tuple[QueuedJob, int]] = {}
        self._guesses = 0, 0  # made and right guesses that the metrics contain
        self._mean_seconds = 1.0
        self._thread = threading.Thread(target=self._run, name=f"keifu {name}", daemon=True)
        self._thread.start()

    async def call(self, work: Callable[[nn.Module, Any, GoOn], Result]) -> Result:
        """Run `work` on the model and its tokenizer in the model's thread. Return its result.

        `work` must call its third argument between batches or steps. It raises an `ApiError` if nobody waits for the
        result.
        """
        self.check_room(1)
        future, client_left = Future[Result](), threading.Event()

        def go_on(*_: object) -> None:
            if client_left.is_set():
                raise ApiError(499, "The client has left.")

        def command() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(*self._loaded(), go_on))
                except Exception as error:
                    future.set_exception(error)

        self.pending += 1
        try:
            self._commands.put(command)
            async with asyncio.timeout(self.limits.timeout):
                return await asyncio.wrap_future(future)
        finally:
            client_left.set()
            self.pending -= 1

    def check_room(self, count: int) -> None:
        """Raise an error if the queue has no room for `count` more requests."""
        room = self.limits.slots + self.limits.queue
        if count > room:
            raise ApiError(400, f"{count} texts were asked for at a time; this server writes at most {room}.", "n")
        if self.pending + count > room:
            wait = max(1, min(60, round(self._mean_seconds)))
            text = f"{self.pending} requests are being answered or wait for {self.name}: try again."
            raise ApiError(429, text, code="queue_full", retry=wait)

    async def generate(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield the generated pieces of all requests, each with the index of its request.

        Closing the iterator frees the memory of the requests within a step.
        """
        job = QueuedJob(requests, asyncio.get_running_loop())
        self.pending += len(requests)
        going = len(requests)
        try:
            self._commands.put(lambda: self._add(job))
            while going:
                # `wait_for` of Python 3.11 loses a cancellation that comes together with an item
                async with asyncio.timeout(job.began + self.limits.timeout - time.monotonic()):
                    await asyncio.sleep(0)  # otherwise `timeout` never ends a job whose pieces are waiting
                    item = await job.out.get()
                if isinstance(item, Exception):
                    raise item
                for index, piece in item:
                    going -= piece.finish_reason is not None
                    yield index, piece
        finally:
            self.pending -= len(requests)
            if going:
                self._commands.put(lambda: self._abort(job))
            self._mean_seconds += (time.monotonic() - job.began - self._mean_seconds) / 8

    def end(self) -> None:
        """End the thread after its pending work, and free the model's memory."""
        self._commands.put(None)

    async def close(self) -> None:
        """End the thread, and wait for it."""
        self.end()
        await asyncio.to_thread(self._thread.join)

    # The following methods run in the model's thread.

    def _run(self) -> None:
        closing = False
        while not closing or self._jobs:
            closing = not self._obey() or closing
            if self._jobs:
                self._step()

    def _obey(self) -> bool:
        """Do the queued work. If nothing is running, wait for some. Return False at the end."""
        try:
            command = self._commands.get(block=not self._jobs)
            while command is not None:
                try:
                    command()
                except Exception as error:  # the thread continues for other requests
                    of_exception(error)
                command = self._commands.get(block=False)
        except Empty:
            return True
        return False

    def _loaded(self) -> Loaded:
        if self._is_interim and not self._jobs and is_open():
            self.model, self._engine, self._is_interim = None, None, False
        if self.model is None:
            began = time.monotonic()
            self._is_interim = self._interim is not None and not _native_is_ready()
            self.model = (self._interim if self._interim and self._is_interim else self._load)()
            how = ", by PyTorch until the native step is compiled" if self._is_interim else ""
            LOG.info("%s was loaded in %.1f s%s.", self.name, time.monotonic() - began, how)
        return self.model

    def _started(self) -> Engine:
        """Return the engine of the model; load the model if necessary."""
        model, tokenizer = self._loaded()
        if self._engine is None:  # a cached property would make all workers wait for one load
            limits, folder = self.limits, None if self._is_interim else self.limits.folder
            runner = runner_of(model, limits.cache, native=not self._is_interim)
            self._engine = Engine(model, tokenizer, runner, limits.slots, guesses=limits.guesses, folder=folder)
            self._guesses = 0, 0
        return self._engine

    def _add(self, job: QueuedJob) -> None:
        try:
            engine = self._started()
            for index, request in enumerate(job.requests):
                self._jobs[engine.add(request)] = job, index
        except Exception as error:
            self._abort(job)
            job.put(error)

    def _abort(self, job: QueuedJob) -> None:
        engine = self._engine  # `_started` might create a new one
        for number in [number for number, (other, _) in self._jobs.items() if other is job]:
            del self._jobs[number]
            if engine is not None:
                engine.abort(number)
                self._count(engine)

    def _step(self) -> None:
        """Do one step of the engine. If it fails, every request in it gets the error."""
        engine = self._started()
        try:
            new_pieces = engine.step()
        except Exception as error:
            for job in {job for job, _ in self._jobs.values()}:
                self._abort(job)
                job.put(ApiError(500, str(error)) if isinstance(error, UserError) else error)
            return
        pieces: dict[QueuedJob, Pieces] = {}
        for piece in new_pieces:
            job, index = self._jobs[piece.index]
            pieces.setdefault(job, []).append((index, piece))
            if piece.finish_reason is not None:
                del self._jobs[piece.index]
        for job, job_pieces in pieces.items():
            if not job.started:
                self.metrics.first_token.labels(self.name).observe(time.monotonic() - job.began)
                job.started = True
                self.metrics.cached.labels(self.name).inc(sum(request.cached for request in job.requests))
            job.put(job_pieces)
        self.metrics.generated.labels(self.name).inc(len(new_pieces))
        counts = engine.guessed, engine.accepted
        metrics = self.metrics.guessed, self.metrics.accepted
        for metric, now, before in zip(metrics, counts, self._guesses, strict=True):
            metric.labels(self.name).inc(now - before)
        self._guesses = counts
        self._count(engine)

    def _count(self, engine: Engine) -> None:
        waiting, running = engine.counts
        self.metrics.waiting.labels(self.name).set(waiting)
        self.metrics.running.labels(self.name).set(running)
        blocks = engine.scheduler.blocks
        self.metrics.cache_used.labels(self.name).set(1 - blocks.free / blocks.n_blocks)

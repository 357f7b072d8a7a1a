"""The thread that owns a model: requests come in by a queue, pieces of text go out to asyncio.

A model computes in its thread alone, between two steps of its engine, so nothing needs a lock.
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
from keifu.generation.draft import Draft
from keifu.generation.text.engine import Engine
from keifu.generation.text.request import Piece, Request
from keifu.generation.text.runner import runner_of
from keifu.native.build import Unavailable
from keifu.native.library import is_open, open_library
from keifu.serving.errors import ApiError, of_exception
from keifu.serving.metrics import Metrics

LOG = logging.getLogger("keifu.serving")
Result = TypeVar("Result")
Pieces = list[tuple[int, Piece]]
Loaded = tuple[nn.Module, Any]  # a model and its tokenizer
NATIVE_SECONDS = 3.0  # to wait for the native step; PyTorch answers while it is compiled for longer
GoOn = Callable[..., None]  # raises where nobody waits any more; any arguments, so that it can stand for a progress


@dataclass(frozen=True)
class Limits:
    """Limits of a model's thread.

    slots: requests that are written at the same time. queue: requests that may wait. timeout: seconds after which an
    answer is given up. cache: bytes of a model's keys and values; None for a quarter of the free memory. keep_alive:
    seconds after which a model that nothing asks is unloaded; None for never. guesses: tokens that are guessed; None
    for as many as are worth it. pictures: the folder whose files a message may show; None for none.
    """

    slots: int = 16
    queue: int = 128
    timeout: float = 600.0
    cache: int | None = None
    keep_alive: float | None = None
    guesses: int | Draft | None = None
    pictures: Path | None = None


@dataclass(eq=False)
class Job:
    """Requests of one answer, and the queue of their pieces."""

    requests: Sequence[Request]
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[Pieces | Exception] = field(default_factory=asyncio.Queue)
    began: float = field(default_factory=time.monotonic)
    started: bool = False

    def put(self, item: Pieces | Exception) -> None:
        """Pass pieces to the event loop that reads them. Do nothing if the loop is closed."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.out.put_nowait, item)


def _native_is_ready() -> bool:
    """Return whether the native step is there or known to be missing; begin to compile it in a thread if not."""

    def open_once() -> None:
        with suppress(Unavailable, UserError):  # they are raised again by what uses it
            open_library()

    if not is_open():
        opening = threading.Thread(target=open_once, name="keifu native", daemon=True)
        opening.start()
        opening.join(NATIVE_SECONDS)
    return is_open()


class Worker:
    """Thread that loads a model and computes with it until it is closed.

    load: gives the model and its tokenizer. The request that caused the load gets its error; the next one tries again.
    interim: gives the same for PyTorch alone, which answers while the native step is compiled.
    """

    def __init__(
        self, name: str, load: Callable[[], Loaded], limits: Limits, metrics: Metrics,
        interim: Callable[[], Loaded] | None = None,
    ):  # fmt: skip
        self.name, self.limits, self.metrics = name, limits, metrics
        self._interim, self._is_interim = interim, False
        self._engine: Engine | None = None
        self.pending = 0  # answers that are being computed or wait, counted in the loop's thread
        self._load, self._commands = load, SimpleQueue[Callable[[], None] | None]()
        self.model: Loaded | None = None  # and its tokenizer, once it is loaded
        self._jobs: dict[int, tuple[Job, int]] = {}
        self._guesses = 0, 0  # made, and right, as far as the metrics know
        self._mean_seconds = 1.0
        self._thread = threading.Thread(target=self._run, name=f"keifu {name}", daemon=True)
        self._thread.start()

    async def call(self, work: Callable[[nn.Module, Any, GoOn], Result]) -> Result:
        """Return the result of `work` on the model and its tokenizer, in the model's thread.

        `work` calls its third argument between its batches or steps: that ends the work, by an `ApiError`, if nobody
        waits for it any more.
        """
        self.check_room(1)
        future, left = Future[Result](), threading.Event()

        def go_on(*_: object) -> None:
            if left.is_set():
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
            left.set()
            self.pending -= 1

    def check_room(self, count: int) -> None:
        """Refuse that many more requests if the queue has no room for them."""
        room = self.limits.slots + self.limits.queue
        if count > room:
            raise ApiError(400, f"{count} texts were asked for at a time; this server writes at most {room}.", "n")
        if self.pending + count > room:
            wait = max(1, min(60, round(self._mean_seconds)))
            text = f"{self.pending} requests are being answered or wait for {self.name}: try again."
            raise ApiError(429, text, code="queue_full", retry=wait)

    async def generate(self, requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield the pieces of all requests as they are written, each with the index of its request.

        Closing the iterator frees the memory of the requests within a step.
        """
        job = Job(requests, asyncio.get_running_loop())
        self.pending += len(requests)
        going = len(requests)
        try:
            self._commands.put(lambda: self._add(job))
            while going:
                # `wait_for` of Python 3.11 loses a cancellation as an item comes
                async with asyncio.timeout(job.began + self.limits.timeout - time.monotonic()):
                    await asyncio.sleep(0)  # or `timeout` never ends a job whose pieces wait
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
            seconds = time.monotonic() - job.began
            self._mean_seconds += (seconds - self._mean_seconds) / 8

    def end(self) -> None:
        """End the thread, and free the model's memory, after the work that was asked before."""
        self._commands.put(None)

    async def close(self) -> None:
        """End the thread, and wait for it."""
        self.end()
        await asyncio.to_thread(self._thread.join)

    # What follows runs in the model's thread.

    def _run(self) -> None:
        closing = False
        while not closing or self._jobs:
            closing = not self._obey() or closing
            if self._jobs:
                self._step()

    def _obey(self) -> bool:
        """Do the work that was queued since the last step; wait for some if nothing runs. Return False at the end."""
        try:
            command = self._commands.get(block=not self._jobs)
            while command is not None:
                try:
                    command()
                except Exception as error:  # the thread lives on for the others
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
        """Return the engine of the model, which is loaded if necessary."""
        model, tokenizer = self._loaded()
        if self._engine is None:  # a cached property would have all workers' models wait for one's load
            runner = runner_of(model, self.limits.cache, native=not self._is_interim)
            self._engine = Engine(model, tokenizer, runner, self.limits.slots, guesses=self.limits.guesses)
            self._guesses = 0, 0
        return self._engine

    def _add(self, job: Job) -> None:
        try:
            engine = self._started()
            for index, request in enumerate(job.requests):
                self._jobs[engine.add(request)] = job, index
        except Exception as error:
            self._abort(job)
            job.put(error)

    def _abort(self, job: Job) -> None:
        engine = self._engine  # not a new one, which `_started` might make
        for number in [number for number, (other, _) in self._jobs.items() if other is job]:
            del self._jobs[number]
            if engine is not None:
                engine.abort(number)
                self._count(engine)

    def _step(self) -> None:
        """Do one step of the engine; if it fails, every request in it gets the error."""
        engine = self._started()
        try:
            written = engine.step()
        except Exception as error:
            reported = error if not isinstance(error, UserError) else ApiError(500, str(error))
            for job in {job for job, _ in self._jobs.values()}:
                self._abort(job)
                job.put(reported)
            return
        pieces: dict[Job, Pieces] = {}
        for piece in written:
            job, index = self._jobs[piece.index]
            pieces.setdefault(job, []).append((index, piece))
            if piece.finish_reason is not None:
                del self._jobs[piece.index]
        for job, each in pieces.items():
            if not job.started:
                self.metrics.first_token.labels(self.name).observe(time.monotonic() - job.began)
                job.started = True
                self.metrics.cached.labels(self.name).inc(sum(request.cached for request in job.requests))
            job.put(each)
        self.metrics.generated.labels(self.name).inc(len(written))
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

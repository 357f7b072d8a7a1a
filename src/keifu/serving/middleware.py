"""Limits on the body of every request, the end of its work when the client leaves, and the access log.

These are plain ASGI middleware, so that streams pass through without delay.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keifu.serving.errors import ApiError, of_exception
from keifu.serving.facts import Facts, begin, current
from keifu.serving.metrics import Metrics

ACCESS = logging.getLogger("keifu.serving.access")
BODY_SECONDS, BODY_RATE = 10.0, 1000  # time limit for a body in seconds, and bytes for which another second is added
LEFT = 499  # status of nginx: the client has left
MOST_LOGGED = 200  # maximal characters of a reason


class Refused(Exception):
    """Exception that ends the application when a request is refused while its body is read."""


class BodyLimit:
    """Middleware that refuses bodies of more than `limit` bytes, by their header or during reading, and slow bodies.

    It also ends the work for an answer when the client leaves.
    """

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = int(Headers(scope=scope).get("content-length", "0"))  # uvicorn has refused values that are not numbers
        reader = BodyReader(receive, send, self.limit)
        client_left = False
        if length <= self.limit:
            with suppress(Refused):
                client_left = await reader.cancel_if_left(self.app(scope, reader.receive, reader.send))
        else:
            reader.error = reader.too_large()
        if reader.error is not None and not reader.began:
            await reader.error.response()(scope, receive, send)
        elif client_left and not reader.began:
            await Response(status_code=LEFT)(scope, receive, send)


class BodyReader:
    """The two ASGI channels of a request, for the application. error: the refusal, or None."""

    def __init__(self, receive: Receive, send: Send, limit: int):
        self._receive, self._send, self.limit = receive, send, limit
        self.facts, self.start = current(), time.monotonic()
        self.error: ApiError | None = None
        self.began, self.complete = False, asyncio.Event()

    def too_large(self) -> ApiError:
        """Return the error for a body that is too large."""
        return ApiError(413, f"The body has more than the {self.limit:,} bytes that this server reads: send less.")

    async def receive(self) -> Message:
        """Return the next part of the body, within the time limit."""
        if self.complete.is_set():
            return await self._receive()
        try:
            async with asyncio.timeout(self.start + BODY_SECONDS + self.facts.size / BODY_RATE - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            self.error = ApiError(408, "The body of the request did not come in time: send it faster.", close=True)
            raise Refused from None
        self.facts.size += len(message.get("body", b""))
        if not message.get("more_body", False):
            self.complete.set()
        if self.facts.size > self.limit:
            self.error = self.too_large()
            raise Refused
        return message

    async def cancel_if_left(self, work: Awaitable[None]) -> bool:
        """Do the work. If the client leaves after its body was read, cancel the work and return True."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
            return not task.done()
        finally:
            for waiting in (task, gone):
                waiting.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _disconnected(self) -> None:
        await self.complete.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def send(self, message: Message) -> None:
        """Send a part of the answer, unless it is the application's reaction to `Refused`."""
        if self.began or self.error is None:
            self.began = True
            await self._send(message)


class JsonBodies:
    """Middleware that reads the bodies at ollama's paths as JSON, as ollama does: its clients declare them as a form,
    or not at all.

    The scope keeps its identity, because `Requests` reads the route from it for the log and the metrics.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] == "http" and scope["path"].startswith("/api/"):
            other_headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            scope["headers"] = [*other_headers, (b"content-type", b"application/json")]
        await self.app(scope, receive, send)


class Requests:
    """Middleware that assigns an id to every request, counts its answer, and writes a line of JSON to the access log.

    The line contains no text of the request or the answer. strict: see `Facts`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, strict: bool):
        self.app, self.metrics, self.strict = app, metrics, strict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, size, begun = time.monotonic(), 500, 0, False
        facts = begin(Headers(scope=scope).get("x-request-id", ""), self.strict, scope["path"])

        async def watched(message: Message) -> None:
            nonlocal status, size, begun
            status, begun = message.get("status", status), True
            size += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                _add_headers(message, facts)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            response = of_exception(error).response()
            if not begun:
                await response(scope, receive, watched)
        finally:
            path = scope["route"].path if "route" in scope else "(none)"
            seconds = time.monotonic() - start
            self.metrics.answers.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path, str(status)).observe(seconds)
            figures = {"status": status, "ms": round(1000 * seconds, 1), "bytes": size}
            ACCESS.info(json.dumps(_line(scope, facts) | figures))


def _add_headers(message: Message, facts: Facts) -> None:
    headers = MutableHeaders(scope=message)
    headers["X-Request-Id"] = facts.id
    if facts.ignored:
        headers["X-Keifu-Ignored"] = ", ".join(dict.fromkeys(facts.ignored))


def _line(scope: Scope, facts: Facts) -> dict[str, Any]:
    """Return the log fields for client and path. An unknown path is left out: it may be a key sent by mistake."""
    path = scope["route"].path if "route" in scope else "(none)"
    client = (scope.get("client") or ("",))[0]
    line = {"time": round(time.time(), 3), "id": facts.id, "client": client, "method": scope["method"], "path": path}
    counts = {"prompt_tokens": facts.prompt_tokens, "completion_tokens": facts.completion_tokens}
    about = {"model": facts.model, **counts, "reason": facts.reason[:MOST_LOGGED]}
    return line | {name: value for name, value in about.items() if value}

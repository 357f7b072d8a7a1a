"""What every request goes through: its key, the size of its body, and a line about it in the access log.

These are plain ASGI middleware, so that a stream passes through them as it comes.
"""

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from keifu.serving.errors import ApiError
from keifu.serving.metrics import Metrics

ACCESS = logging.getLogger("keifu.serving.access")
GUARDED = ("/v1/", "/metrics")


class ApiKeys:
    """Refuses what has none of the keys, in a time that does not tell how much of a key was right."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self.app = app
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http" or not scope["path"].startswith(GUARDED) or not self.digests or self._knows(scope):
            await self.app(scope, receive, send)
            return
        text = "This server needs a key: send the header Authorization: Bearer KEY."
        await ApiError(401, text, code="invalid_api_key").response()(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        found = [hmac.compare_digest(digest, known) for known in self.digests]
        return any(found) and kind.lower() == "bearer"


class TooLarge(Exception):
    """The body is larger than the limit."""


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, by their header or as soon as so many have come."""

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0")
        told = ApiError(413, f"The body has more than the {self.limit:,} bytes that this server reads: send less.")
        if int(length) > self.limit:  # uvicorn has refused what is no number
            await told.response()(scope, receive, send)
            return
        came, began = 0, False

        async def limited() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.limit:
                raise TooLarge
            return message

        async def watched(message: Message) -> None:
            nonlocal began
            if began or came <= self.limit:  # otherwise it is what the application makes of TooLarge
                began = True
                await send(message)

        with suppress(TooLarge):
            await self.app(scope, limited, watched)
        if not began:
            await told.response()(scope, receive, send)


class AccessLog:
    """Counts every answer and writes a line of JSON about it, which holds nothing of what was asked or answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, size = time.monotonic(), 500, 0

        async def watched(message: Message) -> None:
            nonlocal status, size
            status = message.get("status", status)
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            path = getattr(scope.get("route"), "path", "(none)")
            seconds = time.monotonic() - began
            self.metrics.answers.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path, str(status)).observe(seconds)
            client = (scope.get("client") or ("",))[0]
            line = {"time": round(time.time(), 3), "client": client, "method": scope["method"], "path": path}
            ACCESS.info(json.dumps({**line, "status": status, "ms": round(1000 * seconds, 1), "bytes": size}))

"""Answers in JSON: whole ones, and streams of server-sent events."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from keifu.serving.errors import of_exception

STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}  # also possible instead of JSON


def json_response(content: Any) -> Response:
    """Return a JSON response. Half a surrogate pair in a text becomes the replacement character."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), media_type="application/json")


class EventStream(Response):
    """Server-sent events, each a JSON object. An error becomes the last event.

    A client that has not read everything `timeout` seconds after the start is disconnected.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], timeout: float, names_events: bool = False):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.events, self.timeout, self.names_events = events, timeout, names_events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        with suppress(TimeoutError):
            async with aclosing(self.events), asyncio.timeout(self.timeout + 5):
                await self._send_events(send)

    async def _send_events(self, send: Send) -> None:
        try:
            async for event in self.events:
                await send({"type": "http.response.body", "body": self._framed(event), "more_body": True})
        except Exception as error:
            body = of_exception(error).body()
            await send({"type": "http.response.body", "body": self._framed(body), "more_body": True})
        last = b"" if self.names_events else b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _framed(self, event: dict[str, Any]) -> bytes:
        name = f"event: {event.get('type', 'error')}\n" if self.names_events else ""
        return f"{name}data: {json.dumps(event, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


class LineStream(EventStream):
    """JSON objects, one on each line, as streamed by ollama."""

    media_type = "application/x-ndjson"

    def _framed(self, event: dict[str, Any]) -> bytes:
        return f"{json.dumps(event, ensure_ascii=False)}\n".encode("utf-8", "replace")

"""Access control: host names of the server, origins of web pages, and API keys.

These are plain ASGI middleware, so that streams pass through without delay.
"""

import hashlib
import hmac
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from keifu.serving.errors import ApiError

GUARDED = ("/v1/", "/api/", "/metrics", "/rerank")
LOCAL = ("localhost", "127.0.0.1", "[::1]")  # on these, other programs of this machine may serve pages too
NETLOC = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:@/?#\[\]]+)(?::\d*)?")
READING = ("GET", "HEAD", "OPTIONS")


class Gate:
    """Middleware that passes a request on unless `refusal` returns an error."""

    def __init__(self, app: ASGIApp):
        self.app = app

    def refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Return an error for the request, or None to pass it on."""
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        error = self.refusal(scope, Headers(scope=scope)) if scope["type"] == "http" else None
        await (self.app if error is None else error.response())(scope, receive, send)


class Hosts(Gate):
    """Gate that refuses requests for other hosts than `names`. "*" is any name, "*.x" any name that ends in ".x"."""

    def __init__(self, app: ASGIApp, names: Sequence[str]):
        super().__init__(app)
        self.names = [name.lower() for name in names]

    def refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Return an error, with the option to use, for a host name that is not in `names`."""
        name = host_name(headers.get("host", ""))
        if any(host in ("*", name) or (host[:2] == "*." and name.endswith(host[1:])) for host in self.names):
            return None
        short_name = name[:100] or "(none)"
        text = f"This server does not answer to the host name {short_name!r}: start it with --allowed-host NAME."
        return ApiError(400, text, code="unknown_host")


class Origins(Gate):
    """Gate that refuses web pages of other servers, which could otherwise send forms without a preflight request.

    origins: pages that may send requests (--cors). hosts: names of this server behind a proxy.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], hosts: Sequence[str]):
        super().__init__(app)
        self.origins, self.hosts = origins, {host.lower() for host in hosts} - {*LOCAL}

    def refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Return an error, with the option to use, for a request from another origin that changes something."""
        origin = headers.get("origin")
        if origin is None or scope["method"] in READING or {"*", origin} & {*self.origins}:
            return None
        netloc = urlsplit(origin).netloc.lower() if origin.startswith(("http://", "https://")) else ""
        is_same = bool(netloc) and (netloc == headers.get("host", "").lower() or host_name(netloc) in self.hosts)
        if is_same or headers.get("sec-fetch-site") == "same-origin":
            return None
        text = f"Pages of {origin[:100]!r} may not ask this server: start it with --cors ORIGIN to permit them."
        return ApiError(403, text, code="unknown_origin")


class ApiKeys(Gate):
    """Gate that refuses requests without a valid key. Its duration does not depend on the key."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        super().__init__(app)
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        """Return an error, with the header to use, for a guarded path without a valid key."""
        if not scope["path"].startswith(GUARDED) or not self.digests or self._knows(headers):
            return None
        text = "This server needs a key: send the header Authorization: Bearer KEY."
        return ApiError(401, text, code="invalid_api_key")

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")  # sent by Anthropic's clients
        digest = hashlib.sha256(key.strip().encode("utf-8", "replace")).digest()
        return any([hmac.compare_digest(digest, key_digest) for key_digest in self.digests])  # in constant time


def host_name(netloc: str) -> str:
    """Return the host name without the port, in lower case: "[::1]:8000" gives "[::1]". It is "" if there is more than
    a name and a port."""
    match = NETLOC.fullmatch(netloc)
    return match[1].lower() if match else ""

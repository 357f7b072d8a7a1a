"""Server: its socket, its logs, and uvicorn, which finishes running answers before it stops."""

import asyncio
import errno
import logging
import math
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from keifu.errors import UserError

BACKLOG = 128  # connections that asyncio accepts at once
HEAD_SECONDS = 10.0  # time limit for the head of a request, from its first byte or from the connection
FEWEST, MOST = 64, 4096  # connections


@dataclass(frozen=True)
class Address:
    """Address of the server: a host and a port (0: any that is free), or the path of a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 8000
    path: Path | None = None

    def __post_init__(self) -> None:
        if not self.host.strip() and self.path is None:
            raise UserError("--host is empty: give 127.0.0.1 for this machine alone, or 0.0.0.0 for every network.")

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the address."""
        with suppress(ValueError):
            return self.path is not None or self.host == "localhost" or ip_address(self.host).is_loopback
        return False

    def open(self) -> socket.socket:
        """Return the bound socket. Raises `UserError`, with the name of the process that uses the address, if it is
        taken."""
        return self._open_unix(self.path) if self.path is not None else self._open_port()

    def check(self) -> None:
        """Raise the `UserError` of `open`, before models are read. The address is free again afterwards."""
        self.open().close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _open_port(self) -> socket.socket:
        listening = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((self.host, self.port))
        except OSError as error:
            listening.close()
            if error.errno == errno.EADDRINUSE:
                ways = "choose another with --port, or end that one"
                raise UserError(f"Port {self.port} is in use{_user_of(self.port)}: {ways}.") from error
            raise UserError(f"{self.host}:{self.port} cannot be listened at: {error.strerror or error}.") from error
        return listening

    @staticmethod
    def _open_unix(path: Path) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX)
        if path.is_socket():
            with suppress(ConnectionRefusedError):  # socket file of a dead process
                listening.connect(str(path))
                raise UserError(f"A server listens at {path} already: choose another --socket, or end that one.")
            path.unlink()
            listening.close()
            listening = socket.socket(socket.AF_UNIX)
        elif path.exists():
            kind = "a folder" if path.is_dir() else "a file"
            raise UserError(f"--socket is {path}, which is {kind} and no socket: choose a path that is free.")
        try:
            listening.bind(str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be listened at: {error.strerror or error}.") from error
        return listening


def _user_of(port: int) -> str:
    """Return the process that listens at a port, as part of a sentence; "" if unknown."""
    with suppress(OSError, ValueError):
        tables = [path.read_text().splitlines()[1:] for path in Path("/proc/net").glob("tcp*")]
        rows = [line.split() for lines in tables for line in lines]
        inodes = {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                for file in (process / "fd").iterdir():
                    if os.readlink(file)[8:-1] in inodes:
                        return f" by process {process.name} ({(process / 'comm').read_text().strip()})"
    return ""


def most_connections() -> int:
    """Return the maximal number of open connections: half of the files that this process may open."""
    if sys.platform == "win32":
        return MOST
    import resource

    return max(FEWEST, min(MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


class Connection(H11Protocol):
    """Connection that is closed if a request's head is late. If too many connections are open, the one that waits
    longest is closed."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._since = math.inf  # when it began to wait for a request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first request."""
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            idle = [other for other in self.connections if isinstance(other, Connection) and other._since < math.inf]
            oldest = min(idle, key=lambda connection: connection._since, default=self)
            oldest._forget()
            oldest.transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Receive a part of a request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection from the list."""
        super().connection_lost(exc)
        self._forget()

    def _watch(self) -> None:
        """Set the time limit if no request is being answered, else remove it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._deadline is None:
            self._since = self.loop.time()
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline, self._since = None, math.inf


def server_of(app: FastAPI) -> uvicorn.Server:
    """Return the server, which is not started yet."""
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "lifespan": "on"}
    return uvicorn.Server(uvicorn.Config(app, http=Connection, backlog=BACKLOG, **options))


def serve(app: FastAPI, address: Address, access_log: bool = True) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish running answers and refuse new requests."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("keifu.serving").setLevel(logging.INFO)
    logging.getLogger("keifu.serving.access").setLevel(logging.INFO if access_log else logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again at its end
    listening = address.open()
    listening.listen(BACKLOG)
    where = f"the socket {address.path}" if address.path else f"http://{address.host}:{listening.getsockname()[1]}/"
    print(f"Listening at {where} (Ctrl-C ends).", flush=True)
    try:
        server_of(app).run(sockets=[listening])
    finally:
        if address.path is not None:
            address.path.unlink(missing_ok=True)

"""The running server: its socket, its logs, and uvicorn, which finishes what runs when it is told to stop."""

import errno
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from keifu.errors import UserError

BACKLOG = 2048


@dataclass(frozen=True)
class Address:
    """Where the server listens: a host and a port (0: any that is free), or the path of a Unix socket."""

    host: str = "127.0.0.1"
    port: int = 8000
    path: Path | None = None

    @property
    def local(self) -> bool:
        """Whether this machine alone can reach it."""
        return self.path is not None or self.host in ("127.0.0.1", "localhost", "::1")

    def open(self) -> socket.socket:
        """The socket, bound; where something else has the address, a `UserError` that says what."""
        return self._open_unix(self.path) if self.path is not None else self._open_port()

    def _open_port(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        found = socket.socket(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((self.host, self.port))
        except OSError as error:
            found.close()
            if error.errno == errno.EADDRINUSE:
                raise UserError(
                    f"Port {self.port} is in use{_user_of(self.port)}: choose another with --port, or end that one."
                ) from error
            raise UserError(f"{self.host}:{self.port} cannot be listened at: {error.strerror or error}.") from error
        return found

    @staticmethod
    def _open_unix(path: Path) -> socket.socket:
        found = socket.socket(socket.AF_UNIX)
        if path.is_socket():
            with suppress(ConnectionRefusedError):  # one that was left behind
                found.connect(str(path))
                raise UserError(f"A server listens at {path} already: choose another --socket, or end that one.")
            path.unlink()
            found.close()
            found = socket.socket(socket.AF_UNIX)
        try:
            found.bind(str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be listened at: {error.strerror or error}.") from error
        return found


def _user_of(port: int) -> str:
    """The process that listens at a port, as the middle of a sentence, where the system tells it."""
    with suppress(OSError, ValueError):
        tables = [path.read_text().splitlines()[1:] for path in Path("/proc/net").glob("tcp*")]
        rows = [line.split() for lines in tables for line in lines]
        inodes = {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                for each in (process / "fd").iterdir():
                    if os.readlink(each)[8:-1] in inodes:
                        return f" by process {process.name} ({(process / 'comm').read_text().strip()})"
    return ""


def server_of(app: FastAPI) -> uvicorn.Server:
    """The server, not yet begun."""
    return uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, server_header=False, lifespan="on"))


def serve(app: FastAPI, address: Address, access_log: bool = True) -> None:
    """Serves until SIGTERM or Ctrl-C; what runs then is finished, and what comes is refused."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("keifu.serving").setLevel(logging.INFO)
    logging.getLogger("keifu.serving.access").setLevel(logging.INFO if access_log else logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it once more at its end
    listening = address.open()
    listening.listen(BACKLOG)
    place = f"the socket {address.path}" if address.path else f"http://{address.host}:{listening.getsockname()[1]}/"
    print(f"Listening at {place} (Ctrl-C ends).", flush=True)
    try:
        server_of(app).run(sockets=[listening])
    finally:
        if address.path is not None:
            address.path.unlink(missing_ok=True)

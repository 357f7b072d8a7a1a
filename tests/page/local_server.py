"""A server on this machine over a folder, for pages in a browser."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WAIT = 300_000.0  # milliseconds for what must come, however slow the machine is


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files of a folder, and says nothing."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript"}

    def log_message(self, *_: Any) -> None: ...


def serve(folder: Path) -> Iterator[str]:
    """Yield the address of a server over the folder."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()

"""Files: atomic writing (a crash leaves the old file or the new one, never a part), hashing, JSON, and the cache."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keifu.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; after the block it is synced to disk and renamed over `path`.

    On any error the temporary file is removed and `path` keeps its old content. A full disk is a `UserError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno == 28:  # ENOSPC
            raise UserError(
                f"The disk is full: {path} was not written and its old content is kept; free some space."
            ) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a whole file at once (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """A JSON file's content; one that is not JSON is a `UserError` that names the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is a `UserError`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} where a JSON object is needed.")
    return content


def cache() -> Path:
    """The folder for everything that is fetched or derived: `KEIFU_CACHE`, or ~/.cache/keifu."""
    return Path(os.environ.get("KEIFU_CACHE") or "~/.cache/keifu").expanduser()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds what is made at `path` for one process at a time; another one that waits says so."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for another process that is making {path.name}.", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def listed(value: Any) -> Any:
    """Tuples as the lists that JSON makes of them."""
    return [listed(inner) for inner in value] if isinstance(value, tuple) else value

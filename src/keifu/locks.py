"""Locks between processes: for creating a file or folder, for a run's directory, and for writing checkpoints in
turn."""

import errno
import hashlib
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from keifu.errors import UserError
from keifu.files import WINDOWS
from keifu.folders import cache

LOCK = ".lock"  # lock file in a run's directory
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # errors of network file systems without flock
FAR = 2**30  # Windows locks this byte of the lock file: a locked byte cannot be read, and the name at the start must be
_HELD: set[Path] = set()  # run directories locked by this process


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time create `path`. A process that waits prints a message."""
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


@contextmanager
def hold(directory: Path) -> Iterator[bool]:
    """Lock a run's directory for this process. Yield whether the process did not hold the lock already.

    If another process holds it, a `UserError` names that process. The system releases the lock (flock) of a dead
    process.
    """
    path = directory.resolve()
    if path in _HELD:
        yield False
        return
    path.mkdir(parents=True, exist_ok=True)
    file = _locked_file(path / LOCK)
    _HELD.add(path)
    try:
        yield True
    finally:
        _HELD.discard(path)
        if WINDOWS:
            file.close()
        with suppress(OSError):
            (path / LOCK).unlink()
            path.rmdir()  # if nothing was written
        file.close()


@contextmanager
def writing_alone(directory: Path) -> Iterator[None]:
    """Wait until no other process writes a checkpoint into the directory, and lock it for the block. No file
    remains."""
    directory.mkdir(parents=True, exist_ok=True)
    if WINDOWS:
        name = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
        with locked(cache() / "writing" / name):
            yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(ImportError, OSError):  # some network file systems have no flock
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _locked_file(path: Path) -> Any:
    """Return the lock file, open and locked. It contains the name of this process."""
    while True:
        file = path.open("a+")
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise UserError(f"{path.parent} is in use by {holder}: wait for its end, or take another folder.") from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # the process that had the lock has just removed the file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
    file.flush()
    return file


def _lock(file: Any) -> None:
    """Lock a file without waiting. Raises `BlockingIOError` if it is locked."""
    if WINDOWS:
        import msvcrt

        os.lseek(file.fileno(), FAR, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        except OSError as error:
            raise BlockingIOError(error.errno, "the file is locked") from error
        return
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise

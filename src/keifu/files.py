"""Writing files atomically: a crash leaves the old file or the new one, never a part. Also syncing and hashing."""

import errno
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from keifu.errors import UserError

FULL = {errno.ENOSPC: "disk", errno.EDQUOT: "quota"}  # system error numbers of a full disk or quota
LEFT = re.compile(r"\..+\.\d+\.part|\.tmp\w{6}")  # temporary files of `replacing`, and of the package safetensors
ABANDONED = 600  # seconds
WINDOWS = os.name == "nt"  # cannot open folders, syncs only writable files, and locks open files


@contextmanager
def disk_space(what: str) -> Iterator[None]:
    """Turn a full disk or quota inside the block into a `UserError`. `what` is the end of its sentence: the state of
    the work."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"The {FULL[error.errno]} is full: {what}; free some space.") from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`. After the block, sync that file to disk and rename it to `path`.

    After an error the temporary file is removed and `path` keeps its old content. A full disk raises `UserError`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with disk_space(f"{path} was not written and its old content is kept"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode  # mode by the umask; some libraries create files with mode 0600
            yield temporary
            temporary.chmod(mode)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk."""
    if WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write tensors as a safetensors file with the usual mode. Errors of the system are raised as `OSError`, as for
    other files."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except SafetensorError as error:  # its message contains the system's error number
        match = re.search(r"os error (\d+)", str(error))
        number = int(match[1]) if match else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    path.chmod(mode)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file atomically (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal. It is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(parts: Iterable[str | bytes]) -> str:
    """Return the SHA-256 of all parts, concatenated, in hexadecimal. A text counts as its UTF-8."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def hash_buffers(buffers: Iterable[Any]) -> str:
    """Return the SHA-256 of the SHA-256 of each buffer, in hexadecimal. Several are hashed at the same time."""
    digest, remaining = hashlib.sha256(), iter(buffers)
    with ThreadPoolExecutor() as threads:
        while batch := [*islice(remaining, 8)]:  # buffers may be copies, which should not all be in memory
            for inner in threads.map(lambda buffer: hashlib.sha256(buffer).digest(), batch):
                digest.update(inner)
    return digest.hexdigest()


def check_output(path: Path, option: str, folder: bool) -> None:
    """Raise `UserError` if no file (or folder) could be written at `path`. Called before long work, not after it."""
    if path.exists() and path.is_dir() != folder:
        kinds = ("file", "folder") if folder else ("folder", "file")
        raise UserError(f"{option} {path} is a {kinds[0]}, and a {kinds[1]} is to be written: give another name.")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() and there != path:
        raise UserError(f"{option} {path} cannot be written: {there} is a file.")
    parent = there if there.is_dir() else there.parent
    try:
        with tempfile.TemporaryFile(dir=parent):  # permissions alone do not show whether the file system allows writing
            pass
    except OSError as error:
        reason = f"no file can be made in {parent} ({error.strerror})"
        raise UserError(f"{option} {path} cannot be written: {reason}.") from None


def remove_abandoned(directory: Path) -> None:
    """Remove temporary files of `replacing` in a folder into which other processes may write: those that no living
    process of this machine owns, and that have not grown for `ABANDONED` seconds (another machine may share the
    folder)."""
    for path in directory.glob(".*.part") if directory.is_dir() else ():
        match = LEFT.fullmatch(path.name)
        with suppress(OSError, OverflowError):
            if match and not _is_running(int(path.suffixes[-2][1:])) and time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def _is_running(process: int) -> bool:
    if WINDOWS:
        return True  # there, a signal would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove_left(directory: Path) -> None:
    """Remove temporary files that a dead process left in `directory` and its subfolders. No other process may write
    there."""
    for path in [*directory.rglob(".*")]:
        if LEFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)

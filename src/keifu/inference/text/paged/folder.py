"""Folder of files with keys and values, so that a long prompt is read once, also if the program starts again.

Several processes may use one folder. A file is written next to its final name, synced and renamed, so a process that is
killed leaves no part of it. It contains a hash of its tensors: a damaged file is recognised and ignored. The least
recently used files are removed first; the time of a file's last change is that of its last use.
"""

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from keifu.errors import UserError
from keifu.files import LEFT, check_output, remove_abandoned, replacing
from keifu.untrusted import reading

LOG = logging.getLogger("keifu.inference")
ENDING = ".cache.safetensors"
NAME = re.compile(rf"[0-9a-f]{{64}}{re.escape(ENDING)}")
HEADER = 2**20  # maximal bytes of a file in addition to its tensors
MOST_WAITING = 2**29  # bytes of tensors that wait to be written; further ones are not stored
PAUSE = 60.0  # seconds without writing after a file could not be written, for example because the disk is full
CHECKSUM = "checksum"  # name of a tensor
_WRITING = threading.Lock()  # temporary files are named by the process, so one thread of it writes at a time


class CacheFolder:
    """Folder that contains at most `limit` bytes of cached keys and values. Other files in it are not touched.

    One thread writes the files, so that engines do not wait for the disk. It has finished when the process ends.
    """

    def __init__(self, path: Path, limit: int):
        self.path, self.limit = path, limit
        check_output(path, "--cache-folder", folder=True)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        remove_abandoned(path)
        self._lock = threading.Lock()
        self._waiting: dict[str, int] = {}  # bytes of files that will be written, by name
        self._damaged: set[str] = set()
        self._room = self._paused_until = 0.0
        self._thread = ThreadPoolExecutor(1, "keifu cache folder")
        self._thread.submit(self._make_room, 0)

    def has(self, name: str) -> bool:
        """Return whether the file exists, or will be written."""
        return name in self._waiting or (name not in self._damaged and (self.path / name).is_file())

    def accepts(self, size: int) -> bool:
        """Return whether a file with `size` bytes of tensors would be written now."""
        with self._lock:
            waiting = sum(self._waiting.values())
        return waiting + size <= MOST_WAITING and time.monotonic() >= self._paused_until

    def write(self, name: str, tensors: Mapping[str, Tensor], used: int) -> None:
        """Write a file soon. used: time of the last use in nanoseconds."""
        with self._lock:
            self._waiting[name] = sum(x.nbytes for x in tensors.values())
        self._thread.submit(self._write, name, tensors, used)

    def mark_used(self, times: Sequence[tuple[str, int]]) -> None:
        """Set the times of last use of files, in nanoseconds."""
        self._thread.submit(self._set_times, times)

    def read(self, name: str, size: int) -> dict[str, Tensor] | None:
        """Return the tensors of a file, which have at most `size` bytes. Return None if it is missing; or damaged,
        which is logged."""
        path = self.path / name
        try:
            with reading(path):
                if path.stat().st_size > size + HEADER:
                    raise ValueError(f"more than {size:,} bytes of tensors")
                tensors = load(path.read_bytes())
                if bytes(tensors.pop(CHECKSUM).tolist()) != _checksum(tensors):
                    raise ValueError("the checksum is wrong")
            return tensors
        except FileNotFoundError:
            return None
        except (UserError, OSError) as error:
            self.ignore(name, str(error))
            return None

    def ignore(self, name: str, reason: str) -> None:
        """Log why a file is ignored. It will be replaced."""
        LOG.warning("A cache file is ignored, and will be replaced: %s", reason)
        self._damaged.add(name)

    def flush(self) -> None:
        """Wait until all files are written."""
        self._thread.submit(lambda: None).result()

    # The following methods run in the thread that writes.

    def _write(self, name: str, tensors: Mapping[str, Tensor], used: int) -> None:
        try:
            checksum = torch.frombuffer(bytearray(_checksum(tensors)), dtype=torch.uint8)
            data = save({**tensors, CHECKSUM: checksum})
            if len(data) > self.limit:
                return
            self._make_room(len(data))
            with _WRITING, replacing(self.path / name) as temporary:
                temporary.write_bytes(data)
                os.utime(temporary, ns=(used, used))
            self._damaged.discard(name)
        except (UserError, OSError) as error:
            self._paused_until = time.monotonic() + PAUSE
            LOG.warning("The cache folder stores nothing for the next %.0f seconds: %s", PAUSE, error)
        finally:
            with self._lock:
                self._waiting.pop(name, None)

    def _set_times(self, times: Sequence[tuple[str, int]]) -> None:
        for name, used in times:
            with suppress(OSError):  # another process has removed it
                os.utime(self.path / name, ns=(used, used))

    def _make_room(self, size: int) -> None:
        """Remove the files that were not used for the longest time, so that a file of `size` bytes fits."""
        if 0 < size <= self._room:
            self._room -= size
            return
        entries = [(entry, entry.stat()) for entry in os.scandir(self.path) if entry.is_file(follow_symlinks=False)]
        sizes = [(x.st_mtime_ns, x.st_size, entry.name) for entry, x in entries if NAME.fullmatch(entry.name)]
        total = sum(x.st_size for entry, x in entries if NAME.fullmatch(entry.name) or LEFT.fullmatch(entry.name))
        most = self.limit - size if total + size <= self.limit else max(0, self.limit * 7 // 8 - size)
        for _, bytes_of_file, name in sorted(sizes):
            if total <= most:
                break
            with suppress(OSError):  # another process has removed it, or Windows reads it
                (self.path / name).unlink()
            total -= bytes_of_file
        self._room = (self.limit - total - size) / 4  # without measuring again: other processes write too


def _checksum(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the SHA-256 of the names, types, shapes and data of tensors."""
    names = sorted(tensors)
    about = repr([(name, tensors[name].dtype, [*tensors[name].shape]) for name in names])
    digest = hashlib.sha256(about.encode())
    for name in names:
        data: Any = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(data)
    return digest.digest()

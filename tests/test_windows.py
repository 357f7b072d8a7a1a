"""Files, locks and the console as on Windows, simulated: no system call here is Windows' own."""

import errno
import fcntl
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import filelock  # noqa: F401 (before fcntl is missing)
import pytest

from keifu import cli, files, locks
from keifu.errors import UserError


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Act as Windows: folders cannot be opened, files that are only read cannot be synced, open ones cannot be
    removed."""
    real_open, real_sync, real_unlink = os.open, os.fsync, Path.unlink

    def open_file(path, flags: int, *more, **options) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, flags, *more, **options)

    def sync(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real_sync(descriptor)

    def locking(descriptor: int, mode: int, length: int) -> None:
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > 1000, "readers could not read the holder's name"
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            with path.open() as file:
                check_free(file.fileno())
        real_unlink(path, missing_ok)

    def check_free(descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "in use by another process") from None

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(locks, "WINDOWS", True)
    monkeypatch.setattr(cli, "WINDOWS", True)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))


def test_the_simulation_is_as_strict_as_windows(windows: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError):
        os.open(tmp_path, os.O_RDONLY)
    with (tmp_path / "file").open() as file, pytest.raises(OSError):
        os.fsync(file.fileno())


def test_a_file_is_written_at_once(windows: None, tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "folder/a.txt", "a")
    files.write_atomic(tmp_path / "folder/a.txt", "b")
    assert [path.read_text() for path in (tmp_path / "folder").iterdir()] == ["b"]


def test_a_folder_belongs_to_one_process(windows: None, tmp_path: Path) -> None:
    with locks.hold(tmp_path / "run"):
        locks._HELD.clear()  # as another process has it
        with (
            pytest.raises(UserError, match=rf"in use by process {os.getpid()} on"),
            locks.hold(tmp_path / "run"),
        ):
            pass
    assert not (tmp_path / "run").exists()
    with locks.hold(tmp_path / "run") as first:
        assert first


def test_writers_wait_for_one_another(windows: None, tmp_path: Path) -> None:
    with locks.writing_alone(tmp_path / "model"):
        files.write_atomic(tmp_path / "model/a", "a")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["a"]


def test_japanese_goes_through_a_pipe(windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    cli._open_standard_streams()
    print("猫が好きです。", flush=True)
    assert raw.getvalue().decode() == f"猫が好きです。{os.linesep}"

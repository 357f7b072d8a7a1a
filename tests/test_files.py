"""Files: what is written has the usual mode and comes whole, hashes are SHA-256, and only parts of the dead go."""

import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from keifu import files
from keifu.errors import UserError


def test_tensors_come_back_with_the_mode_of_the_umask(tmp_path: Path) -> None:
    """A transposed and a trained tensor, which safetensors refuses as they are. It makes files of mode 0600."""
    rows = torch.arange(6.0).reshape(2, 3)
    tensors = {"transposed": rows.T, "trained": rows.clone().requires_grad_()}
    before = os.umask(0o027)
    try:
        files.write_tensors(tensors, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


@pytest.mark.parametrize(
    ("message", "number"), [("I/O error: No space left on device (os error 28)", 28), ("unknown", errno.EIO)]
)
def test_an_error_of_safetensors_is_that_of_the_system(
    message: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError(message)

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="x.safetensors") as caught:
        files.write_tensors({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    assert (caught.value.errno, caught.value.strerror) == (number, os.strerror(number))
    assert caught.value.filename == str(tmp_path / "x.safetensors")


def test_hashes_are_of_all_bytes_and_of_all_parts(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert files.sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()
    assert files.hash_of(["a", b"\xff", "é"]) == hashlib.sha256(b"a\xff\xc3\xa9").hexdigest()


def test_a_failed_block_keeps_the_old_file_and_leaves_no_part(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "new/x", "old é")
    assert (tmp_path / "new/x").read_bytes() == "old é".encode()
    with pytest.raises(KeyboardInterrupt), files.replacing(tmp_path / "new/x") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "new/x").read_bytes() == "old é".encode()
    assert os.listdir(tmp_path / "new") == ["x"]
    files.write_atomic(tmp_path / "new/x", b"\xff")
    assert (tmp_path / "new/x").read_bytes() == b"\xff"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_other_errors_stay(number: int) -> None:
    name = {errno.ENOSPC: "disk", errno.EDQUOT: "quota"}[number]
    sentence = f"^The {name} is full: x was not written; free some space.$"
    with pytest.raises(UserError, match=sentence), files.disk_space("x was not written"):
        raise OSError(number, "full")
    with pytest.raises(PermissionError), files.disk_space("x was not written"):
        raise PermissionError(errno.EACCES, "no")


def test_an_output_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    for path, folder in (("file", False), ("new", True), ("new/deeper/x", False), (".", True)):
        files.check_output(Path(path), "--out", folder)
    assert os.listdir(tmp_path) == ["file"], "nothing is left of the check"
    refused = {
        ("file", True): "--out file is a file, and a folder is to be written: give another name.",
        (".", False): "--out . is a folder, and a file is to be written: give another name.",
        ("file/x/y", False): f"--out file/x/y cannot be written: {tmp_path / 'file'} is a file.",
    }
    for (path, folder), sentence in refused.items():
        with pytest.raises(UserError) as caught:
            files.check_output(Path(path), "--out", folder)
        assert str(caught.value) == sentence


def test_an_output_where_nothing_can_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(dir: Path) -> None:  # noqa: A002 (tempfile's own name)
        raise OSError(errno.EROFS, f"Read-only: {dir.name}")

    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    (tmp_path / "file").write_text("x")
    reason = f"no file can be made in {tmp_path} (Read-only: {tmp_path.name})"
    for name in ("file", "new", "new/x"):
        with pytest.raises(UserError) as caught:
            files.check_output(tmp_path / name, "--out", folder=False)
        assert str(caught.value) == f"--out {tmp_path / name} cannot be written: {reason}."


def test_only_old_parts_of_dead_processes_are_abandoned(tmp_path: Path) -> None:
    """A dead, a living and an unreadable process number; each part at both sides of ten minutes."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    ages = {
        f".dead.{ended.pid}.part": 660, f".new.{ended.pid}.part": 540, f".ours.{os.getpid()}.part": 660,
        f".large.{10**30}.part": 660, ".no-number.part": 660, f"shown.{ended.pid}.part": 660, ".tmpA1b2C3": 660,
    }  # fmt: skip
    for name, age in ages.items():
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    files.remove_abandoned(tmp_path)
    assert {*ages} - {*os.listdir(tmp_path)} == {f".dead.{ended.pid}.part"}
    files.remove_abandoned(tmp_path / "missing")


@pytest.mark.parametrize(("error", "stays"), [(ProcessLookupError, False), (PermissionError, True), (None, True)])
def test_a_process_of_another_user_is_alive(
    error: type[OSError] | None, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(process: int, signal: int) -> None:
        assert (process, signal) == (4711, 0), "a signal that asks, and does not end the process"
        if error:
            raise error

    monkeypatch.setattr(os, "kill", kill)
    part = tmp_path / ".x.4711.part"
    part.write_text("x")
    os.utime(part, (0, 0))
    files.remove_abandoned(tmp_path)
    assert part.exists() == stays


def test_what_a_dead_process_left_is_removed_in_all_folders_at_any_age(tmp_path: Path) -> None:
    (tmp_path / "state/.folder.1.part").mkdir(parents=True)
    left = [".x.1.part", "state/.y.22.part", "state/.tmpA1b2C3"]
    others = [".x.part", "x.1.part", "state/.tmpA1b2C34", "state/z"]
    for name in [*left, *others]:
        (tmp_path / name).write_text("x")
    files.remove_left(tmp_path)
    assert not any((tmp_path / name).exists() for name in left)
    assert all((tmp_path / name).exists() for name in [*others, "state/.folder.1.part"])


def test_a_folder_is_not_synced_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    (tmp_path / "x").write_text("x")
    for system, count in ((True, 1), (False, 2)):
        monkeypatch.setattr(files, "WINDOWS", system)
        synced.clear()
        files.sync(tmp_path)
        files.sync(tmp_path / "x")
        assert len(synced) == count
    for descriptor in synced:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)

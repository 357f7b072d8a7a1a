"""A run directory belongs to one process: locks, what a dead process left, signals, damaged states, full disks."""

import errno
import fcntl
import io
import json
import os
import shutil
import signal
import stat
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from training_toys import Sequences, finished, objective, run, settings, toy, train_slowly, trained

from keifu import cli, files
from keifu.errors import UserError
from keifu.locks import hold
from keifu.training.loop import train
from keifu.training.run import checkpoint, metrics, run_directory
from keifu.training.signals import Interrupted

PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["training_toys"])


def go_on(directory: Path):
    return train(toy(3), objective, Sequences(), settings(), run(directory, resume=True))


def names(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


class Doing(Sequences):
    """Does something when the batch of a step is made."""

    def __init__(self, at: int, do):
        super().__init__()
        self.at, self.do = at, do

    def batch(self, step: int):
        if step == self.at:
            self.at = -1
            self.do()
        return super().batch(step)


def test_a_file_system_without_locks_can_have_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_) -> None:
        raise OSError(errno.EOPNOTSUPP, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path / "run") as new:
        assert new
    refuse_all = OSError(errno.EIO, "broken")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(refuse_all))
    with pytest.raises(OSError, match="broken"), hold(tmp_path / "run"):
        pass


def test_a_second_run_in_the_same_folder_says_who_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(os.sys.path))  # pyright: ignore
    directory = tmp_path / "run"
    directory.with_suffix(".waits").touch()
    first = PROCESSES.Process(target=train_slowly, args=(directory, "adamw", tmp_path / "said"))
    first.start()
    while first.is_alive() and not checkpoint.steps(directory):
        time.sleep(0.01)
    with pytest.raises(UserError, match=f"{directory} is in use by process {first.pid} on .* since 2"):
        go_on(directory)
    first.kill()
    first.join()
    (lock,) = directory.glob(".lock")
    with hold(directory) as fresh:
        assert fresh and str(os.getpid()) in lock.read_text(), "a dead process holds nothing"
        with hold(directory) as again:
            assert not again
    assert not lock.exists()


def test_a_folder_that_was_only_held_is_gone(tmp_path: Path) -> None:
    with hold(tmp_path / "a/b"):
        pass
    assert not (tmp_path / "a/b").exists()


def test_a_start_removes_what_a_dead_process_left(tmp_path: Path) -> None:
    left = [".model.safetensors.4711.part", "state/.tmpA1b2C3", "state/step-00000013.safetensors", "samples/.a.1.part"]
    left += ["state/step-00000014/shard-00001.safetensors", "state/.step-00000015.part/shard-00001.safetensors"]
    before = names(finished(tmp_path))
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".notes.part").write_text("the user's own")
    go_on(tmp_path)
    assert names(tmp_path) == sorted([*before, ".notes.part"])


@pytest.mark.parametrize("moved", [["recipe.json"], ["recipe.json", "state"], ["metrics.jsonl", "state"]])
def test_a_run_that_was_being_replaced_when_its_successor_died_is_put_back(tmp_path: Path, moved: list[str]) -> None:
    before = {name: (finished(tmp_path) / name).read_bytes() for name in ["recipe.json"]}
    present = names(tmp_path)
    (tmp_path / run_directory.MOVING).mkdir()
    for name in moved:
        (tmp_path / name).rename(tmp_path / run_directory.MOVING / name)
    with run_directory.owned(tmp_path):
        assert names(tmp_path) == sorted([*present, ".lock"])
    assert (tmp_path / "recipe.json").read_bytes() == before["recipe.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_is_in_the_exit_status(tmp_path: Path, number: signal.Signals, monkeypatch, capsys) -> None:
    data = Doing(5, lambda: os.kill(os.getpid(), number))

    def work() -> None:
        train(toy(), objective, data, settings(), run(tmp_path))

    monkeypatch.setattr(cli, "parse", lambda words: work)
    before = signal.signal(number, signal.default_int_handler)  # these tests may run under nohup
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main(["train"])
    finally:
        signal.signal(number, before)
    assert stop.value.code == 128 + number
    assert "Stopped after step 5; the state is saved" in capsys.readouterr().err
    assert checkpoint.steps(tmp_path)[-1] == 5


def test_under_nohup_a_closed_terminal_stops_nothing(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        summary = train(toy(), objective, Doing(5, lambda: os.kill(os.getpid(), 1)), settings(), run(tmp_path))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert summary.steps == 12


def test_a_stopped_run_keeps_the_states_of_one_that_was_not(tmp_path: Path) -> None:
    whole, parts = finished(tmp_path / "whole"), tmp_path / "parts"
    data = Doing(10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(toy(), objective, data, settings(), run(parts))
    assert checkpoint.steps(parts) == [6, 9, 10]
    go_on(parts)
    assert checkpoint.steps(parts) == checkpoint.steps(whole) == [9, 12]
    for step in (9, 12):
        name = f"state/step-{step:08d}.safetensors"
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def change(path: Path, **fields) -> None:
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"step": ' + "[" * 5000),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b"\xff" + path.read_bytes()),
        lambda path: change(path, resolved={"precision": "bfloat16"}),
        lambda path: change(path, format="2"),
        lambda path: change(path, sha256=1),
        lambda path: path.rename(path.with_name("step-00000020.json")),
    ],
)
def test_with_a_damaged_state_the_one_before_is_used(tmp_path: Path, damage, capsys) -> None:
    damage(finished(tmp_path) / "state/step-00000012.json")
    assert go_on(tmp_path).steps == 12
    said = capsys.readouterr().err
    assert "Going on from the one before, of step 9" in said or "Going on from step 9" in said
    assert checkpoint.steps(tmp_path) == [9, 12]


def test_states_of_versions_with_another_format_are_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    file = tmp_path / "state/step-00000012.json"
    change(file, format=None, version=None, facts_sha256=None)
    with pytest.raises(UserError, match=r"step-00000012.json is damaged, or of keifu before 0.2, in a format"):
        checkpoint.read(tmp_path, 12)
    change(file, format=99, version="7.0")
    with pytest.raises(UserError, match=r"step-00000012.json is of keifu 7.0, .*: resume with that version"):
        checkpoint.read(tmp_path, 12)


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff\xfe", b'{"step": "3"}', b'{"step": 3, "loss": {}}', b"[" * 9000])
def test_a_damaged_line_of_metrics_is_left_out_and_named(tmp_path: Path, line: bytes, capsys) -> None:
    path = finished(tmp_path) / metrics.FILE
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:], b""]))
    go_on(tmp_path)
    assert "metrics.jsonl is damaged in line 2, which is left out" in capsys.readouterr().err
    assert path.read_bytes().splitlines() == lines


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        trained(tmp_path)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names(tmp_path)}
    assert modes == {0o640}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_nothing_stops_no_training(tmp_path: Path, number: int, monkeypatch, capsys) -> None:
    sync, wrong = files.sync, []

    def failing(path: Path) -> None:
        if "step-" in path.name and not wrong.append(path) and len(wrong) < 3:
            raise OSError(number, os.strerror(number), str(path))
        sync(path)

    monkeypatch.setattr(files, "sync", failing)
    assert trained(tmp_path)
    said = capsys.readouterr().err
    assert "The state of step 3 was not saved" in said and "Training goes on" in said
    assert not [name for name in names(tmp_path) if name.endswith(".part")]
    assert checkpoint.latest(tmp_path)[0].step == 12


class ClosedPipe(io.StringIO):
    """A standard stream whose reader has gone, as in `keifu train gpt 2>&1 | head`."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_a_closed_pipe_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", ClosedPipe())
    assert checkpoint.latest(trained(tmp_path))[0].step == 12


def test_a_folder_that_is_taken_away_is_written_anew(tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    train(toy(), objective, Doing(7, lambda: shutil.rmtree(out)), settings(), run(out))
    assert "was taken away while the run wrote there: it is written anew" in capsys.readouterr().err
    assert checkpoint.latest(out)[0].step == 12 and (out / "report.html").exists()
    assert metrics.read(out)[-1]["step"] == 12


def test_a_start_removes_states_whose_removal_a_kill_prevented(tmp_path: Path) -> None:
    directory = finished(tmp_path / "run")
    shutil.copytree(directory / "state", tmp_path / "kept")
    older = checkpoint.read(directory, 9)
    checkpoint.save(directory, 6, older.tensors, {**older.facts, "step": 6}, lambda step: None)
    shutil.copytree(tmp_path / "kept", directory / "state", dirs_exist_ok=True)
    assert checkpoint.steps(directory) == [6, 9, 12]
    go_on(directory)
    assert checkpoint.steps(directory) == [9, 12]

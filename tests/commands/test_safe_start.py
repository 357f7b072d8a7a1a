"""Modules of the current folder are never imported: not by `python -m keifu`, nor by the processes that it starts."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from keifu.commands.train import start

MARK = "with open({marker!r}, 'a') as file:\n    file.write(__name__ + ' ')\nraise SystemExit(9)\n"
MODULES = ("random", "torch", "pip", "json", "numpy", "tyro", "site", "logging", "safetensors", "typing", "shlex")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Return a folder with files named as modules, which write a marker when they are imported."""
    marker = str(tmp_path / "marker.txt")
    for name in MODULES:
        (tmp_path / f"{name}.py").write_text(MARK.format(marker=marker))
    return tmp_path


def run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the folder, without a path that tests may have added."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_python_m_keifu_imports_nothing_of_the_current_folder(hostile: Path) -> None:
    done = run(hostile, sys.executable, "-m", "keifu", "data", "list")
    assert not (hostile / "marker.txt").exists(), (hostile / "marker.txt").read_text()
    assert done.returncode == 0, done.stderr


@pytest.fixture
def hostile_keifu(hostile: Path) -> Path:
    """Return the same folder, with a module named keifu in it."""
    (hostile / "keifu").mkdir()
    (hostile / "keifu" / "__init__.py").write_text((hostile / "random.py").read_text())
    return hostile


@pytest.fixture
def logs() -> Iterator[None]:
    """Enable the log again after a test that starts processes, because that disables the log of this process."""
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("logs")
def test_started_processes_import_nothing_of_the_current_folder(
    hostile_keifu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a command that needs no torch; the next test trains."""
    monkeypatch.chdir(hostile_keifu)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
        monkeypatch.delenv(name, raising=False)
    start(2, 0, ["data", "list"])
    marker = hostile_keifu / "marker.txt"
    assert not marker.exists(), marker.read_text()


@pytest.mark.slow
def test_a_training_of_two_processes_imports_nothing_of_the_current_folder(hostile_keifu: Path) -> None:
    keifu = Path(sys.executable).parent / "keifu"
    words = ("train", "mlp", "--steps", "2", "--data", "xor", "--processes", "2", "--out", "run")
    done = run(hostile_keifu, sys.executable, "-P", str(keifu), *words)
    assert not (hostile_keifu / "marker.txt").exists(), (hostile_keifu / "marker.txt").read_text()
    assert done.returncode == 0, done.stderr

"""The reference is that of the program: the errors it shows are raised, the variables it lists are read."""

import re
import shlex
from pathlib import Path

import pytest

from keifu.cli import main

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs/reference"
SHOWN = re.findall(r"(?m)^\$ keifu (.*)\n(.*)$", (REFERENCE / "errors.md").read_text(encoding="utf-8"))
SETTINGS = re.compile(r"[\"'](KEIFU_[A-Z_]+)[\"']")


@pytest.mark.parametrize(("command", "sentence"), SHOWN)
def test_the_error_that_is_shown_is_raised(
    command: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command))
    beginning = sentence.removesuffix(" ...")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(beginning)
    assert last == beginning or sentence.endswith(" ...")
    assert stop.value.code in (1, 2)


def test_errors_are_shown() -> None:
    assert len(SHOWN) >= 6


def test_every_variable_that_the_program_reads_is_listed() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "src/keifu").rglob("*.py")]
    read = {name for text in texts for name in SETTINGS.findall(text)}
    page = (REFERENCE / "environment.md").read_text(encoding="utf-8")
    assert {"KEIFU_CACHE", "KEIFU_DEVICE"} <= read
    assert [name for name in sorted(read) if f"`{name}`" not in page] == []

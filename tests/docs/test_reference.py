"""The reference is that of the program: the errors it shows are raised, the variables it lists are read."""

import re
import shlex
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

from keifu.cli import main
from keifu.commands.shared.command_names import COMMANDS
from keifu.recipes.files import recipes

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


def test_the_page_for_those_who_come_from_elsewhere_names_options_that_there_are(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    page = (ROOT / "docs/guides/coming_from.md").read_text(encoding="utf-8")
    named = {option for option in re.findall(r"`(--[a-z.-]+)", page)}
    named |= {
        option for command in re.findall(r"`keifu ([^`]*)`", page) for option in re.findall(r"--[a-z.-]+", command)
    }
    for words in [[verb] for verb in COMMANDS] + [["train", name] for name in recipes()]:
        with suppress(SystemExit):
            main([*words, "--help"])
    told = capsys.readouterr().out
    told += told.replace("--[no-]", "--no-")  # as both are told together
    offered = set(re.findall(r"--[a-z][a-z.-]*", told))
    assert len(named) > 15
    assert named - offered == set()


def test_that_page_names_what_the_others_have() -> None:
    page = (ROOT / "docs/guides/coming_from.md").read_text(encoding="utf-8")
    for library, ending in (
        ("transformers", "Trainer|Auto[A-Za-z]+"),
        ("diffusers", "[A-Za-z0-9]+(?:Scheduler|Pipeline)"),
    ):
        part = page.split(f"## {library}\n")[1].split("\n## ")[0]
        names = set(re.findall(rf"`({ending})\b", part))
        assert names
        assert [name for name in names if not hasattr(import_module(library), name)] == []

"""Guides, and the pages on extending, run as they are written, with smaller numbers in their commands."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from keifu.cli import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)  # `text` is shown, and not run
SMALLER = [  # what keeps a command as it is and makes it short
    (r"--steps \d+", "--steps 2"),
    (r"--depth \d+", "--depth 1"),
    (r"--max-tokens \d+", "--max-tokens 3"),
    (r"--count \d+", "--count 2"),
    (r"--limit \d+", "--limit 4"),
    (
        r"^keifu train transformer.*",
        r"\g<0> --vocab-size 300 --model.dim 32 --model.n-layers 1 --model.n-decoder-layers 1",
    ),
    (r"^keifu train ddpm.*", r"\g<0> --dim 16 --multipliers 1 2 --attention 1 --batch-size 4"),
    (r"^keifu translate.*", r"\g<0> --max-tokens 3"),
    (r"^keifu evaluate runs/translator.*", r"\g<0> --limit 1"),
    (r"^keifu draw runs/ddpm.*", r"\g<0> --steps 2"),
    (r"^keifu evaluate runs/ddpm.*", r"\g<0> --steps 2"),
    (r"^keifu train sft --model smollm2.*", r"\g<0> --batch-size 1 --context-length 64"),
]
QUICK = [f"guides/{name}.md" for name in ("own_chat", "translator", "drawing", "search")]
QUICK += ["extending/model.md", "extending/pieces.md"]
SLOW = [
    f"guides/{name}.md" for name in ("finetuning", "attention", "evaluating")
]  # a published language model of 135 M parameters answers


def parts(page: str) -> list[tuple[str, str]]:
    """What a page asks to be run, in order: commands, one a line, and blocks of Python."""
    found = []
    for language, text in BLOCK.findall(page):
        if language == "python":
            found.append((language, text))
        elif not language:
            lines = text.replace("\\\n", " ").splitlines()
            found += [("command", line) for line in lines if line.startswith("keifu ")]
    return found


def smaller(command: str) -> str:
    """The command with small numbers, and without its remark."""
    command = shlex.join(shlex.split(command, comments=True))
    for pattern, replacement in SMALLER:
        command = re.sub(pattern, replacement, command)
    return command


def run(page: Path) -> int:
    """Runs a page in the current folder; how many parts it had."""
    names: dict = {"__name__": "guide"}
    found = parts(page.read_text(encoding="utf-8"))
    for kind, text in found:
        if kind == "python":
            exec(compile(text, str(page), "exec"), names)
        else:
            main(shlex.split(smaller(text))[1:])
    return len(found)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the guides read, into which they may write."""
    for name in ("examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


@pytest.mark.parametrize("page", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_guide_runs_as_it_is_written(page: str, checkout: Path) -> None:
    assert run(ROOT / "docs" / page) >= 2


def test_every_guide_with_commands_is_run() -> None:
    folders = [ROOT / "docs" / name for name in ("guides", "extending")]
    pages = [path for folder in folders for path in folder.glob("*.md") if not path.name.endswith(".ja.md")]
    run_here = {path for path in pages if parts(path.read_text(encoding="utf-8"))}
    assert {path.relative_to(ROOT / "docs").as_posix() for path in run_here} == {*QUICK, *SLOW}


def test_a_guide_that_does_not_run_would_be_seen(checkout: Path, capsys: pytest.CaptureFixture) -> None:
    page = checkout / "page.md"
    page.write_text("```\nkeifu data check nowhere/\n```\n")
    with pytest.raises(SystemExit):
        run(page)
    page.write_text("```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError):
        run(page)
    page.write_text("```text\nkeifu data check nowhere/\n```\n")
    assert run(page) == 0


def test_only_numbers_become_smaller() -> None:
    assert (
        smaller("keifu train gpt --depth 4 --data a/ --steps 200  # long")
        == "keifu train gpt --depth 1 --data a/ --steps 2"
    )

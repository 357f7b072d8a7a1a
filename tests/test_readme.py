"""What is written is true: the tree, the commands and the recipes that the pages name are the real ones."""

import re
import shlex
from pathlib import Path

import pytest

from keifu.cli import parse
from keifu.commands.shared.recipe_files import recipes
from keifu.errors import UserError

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """Every `keifu ...` line of the page's code blocks, and every `keifu VERB ...` between backquotes in its text."""
    blocks = [line for block in FENCE.findall(page) for line in block.replace("\\\n", " ").splitlines()]
    shown = [line.removeprefix("$ ").strip() for line in blocks]
    inline = re.findall(r"`(keifu [a-z][^`]*)`", FENCE.sub("", page))
    return [line for line in [*shown, *inline] if line.startswith("keifu ")]


def check(command: str) -> None:
    """Parses one command; a placeholder such as RECIPE is no word of it. `--help` leaves through SystemExit(0)."""
    words = shlex.split(command, comments=True)[1:]
    try:
        parse(words[: words.index("|")] if "|" in words else words)
    except SystemExit as stop:
        assert not stop.code


FOUND = [(page.name, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "command"), FOUND)
def test_command_is_one_that_the_command_line_takes(page: str, command: str, capsys: pytest.CaptureFixture) -> None:
    check(command)


@pytest.mark.parametrize("command", ["keifu chatt smollm2", "keifu chat smollm2 --sistem x", "keifu train gtp"])
def test_a_wrong_command_would_be_seen(command: str) -> None:
    assert commands(f"```\n{command}  # with a remark\n```\n") == [f"{command}  # with a remark"]
    with pytest.raises(UserError):
        check(command)


def test_the_pages_show_commands() -> None:
    assert len(FOUND) >= 8


RECIPES = sorted((ROOT / "src/keifu/recipes").rglob("[!_]*.py"))
SAID = [(p.stem, line) for p in RECIPES for line in re.findall(r"(?m)^Command: (keifu .*)$", p.read_text("utf-8"))]


@pytest.mark.parametrize(("recipe", "command"), SAID)
def test_the_command_that_a_recipe_names_is_one(recipe: str, command: str, capsys: pytest.CaptureFixture) -> None:
    check(command)


def test_every_recipe_that_a_recipe_names_exists() -> None:
    files = [path.read_text(encoding="utf-8") for path in (ROOT / "src/keifu/recipes").rglob("*.py")]
    named = {name for text in files for name in re.findall(r"keifu train ([a-z][\w-]*)", text)}
    assert named <= recipes().keys()


def test_tree_is_the_real_one() -> None:
    block = next(block for block in FENCE.findall((ROOT / "README.md").read_text()) if block.startswith("src/keifu/"))
    lines = [line for line in block.splitlines() if line.startswith("  ")]
    written = {line.split()[0].rstrip("/") for line in lines if len(line.split()) > 1}
    real = {path.parent.name for path in (ROOT / "src/keifu").glob("*/__init__.py")}
    assert written == real
    assert len(written) == len(lines)
    assert all((ROOT / line.split()[0]).is_dir() for line in block.splitlines() if not line.startswith(" "))

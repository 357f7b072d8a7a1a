"""The pages of results: a whole index, sections that recipes can name, commands that the benchmarks take."""

import argparse
import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if not path.name.endswith(".ja.md"))
RESULTS = sorted(path for path in (ROOT / "docs/results").glob("*.md") if not path.name.endswith(".ja.md"))
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
KEPT = ("action", "nargs", "required", "choices")  # of an option, what decides whether a command line is one


def sections(page: Path) -> list[str]:
    return re.findall(r"(?m)^## (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")))


def test_the_index_names_every_section() -> None:
    index = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    missing = [f"{page.name}: {title}" for page in RESULTS for title in sections(page) if f"[{title}](" not in index]
    assert missing == []


def test_recipes_name_sections_that_there_are() -> None:
    there = {title for page in RESULTS for title in sections(page)}
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "src/keifu").rglob("*.py")]
    named = [title for text in texts for title in re.findall(r'docs/results\.md, "([^"]+)"', text)]
    assert named
    assert set(named) <= there


def option_parser(file: Path) -> argparse.ArgumentParser:
    """A benchmark's parser of options, read from its source and not run: it imports what it compares with."""
    parser = argparse.ArgumentParser(exit_on_error=False, conflict_handler="resolve")
    nodes = [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    keys = {key.value for node in nodes if isinstance(node, ast.Dict) for key in node.keys if is_text(key)}
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        if ast.unparse(call.func) != "parser.add_argument":
            continue
        if isinstance(call.args[0], ast.JoinedStr):  # in a loop over a dictionary of names and defaults
            several = [[f"--{key}"] for key in sorted(keys) if re.fullmatch(r"[a-z-]+", key)]
        else:
            several = [[ast.literal_eval(each) for each in call.args]]
        for names in several:
            parser.add_argument(*names, **literal_keywords(call))
    return parser


def is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def literal_keywords(call: ast.Call) -> dict:
    """What decides whether words are taken, where it is written out."""
    given = {each.arg: each.value for each in call.keywords if each.arg in KEPT}
    return {name: ast.literal_eval(node) for name, node in given.items() if isinstance(node, ast.Constant | ast.Tuple)}


def commands(page: str) -> list[str]:
    """The lines of a page that run a benchmark, in blocks and in backquotes, which may go over a line's end."""
    blocks = [line for block in FENCE.findall(page) for line in block.replace("\\\n", " ").splitlines()]
    inline = [re.sub(r"\s+", " ", text) for text in re.findall(r"`([^`]*)`", FENCE.sub("", page))]
    shown = [text.removeprefix("$ ") for text in [*blocks, *inline]]
    return [text for text in shown if re.match(r"python benchmarks/\S+\.py", text)]


def check(command: str) -> None:
    _, file, *given = shlex.split(command, comments=True)
    assert (ROOT / file).is_file(), f"{file} is not there"
    option_parser(ROOT / file).parse_args(given)


FOUND = [(page.name, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "command"), FOUND)
def test_a_benchmark_takes_the_command(page: str, command: str) -> None:
    check(command)


@pytest.mark.parametrize("command", ["python benchmarks/mlp.py --nonsense", "python benchmarks/unet.py --rounds"])
def test_a_wrong_command_would_be_seen(command: str) -> None:
    assert commands(f"Made by `{command}`.") == commands(f"```\n$ {command}\n```\n") == [command]
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        check(command)

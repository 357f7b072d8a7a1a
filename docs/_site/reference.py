"""The reference of commands, recipes and the catalogue: the texts of the program itself, at a mark in a page."""

import io
import os
import textwrap
from collections.abc import Iterable
from contextlib import redirect_stdout

from keifu.cli import parse
from keifu.commands.shared.command_names import COMMANDS
from keifu.recipes.files import recipes

WIDTH = 100  # columns


def help_of(*words: str) -> str:
    """Return the help text of a command or recipe, 100 columns wide."""
    os.environ["COLUMNS"] = str(WIDTH)
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            parse([*words, "--help"])()
    except SystemExit:
        pass
    return aligned(text.getvalue().strip())


def aligned(text: str) -> str:
    """Return a text whose lines of two cells (a name, a tab, its description) are columns within the width."""
    lines = [line.partition("\t") for line in text.splitlines()]
    indent = " " * (2 + max((len(name) for name, tab, _ in lines if tab), default=0))
    return "\n".join(
        textwrap.fill(rest, WIDTH, initial_indent=name.ljust(len(indent)), subsequent_indent=indent) if tab else name
        for name, tab, rest in lines
    )


def catalogue() -> str:
    """Return the entries of `keifu data list` as a table, without the column about this computer."""
    text = io.StringIO()
    with redirect_stdout(text):
        parse(["data", "list"])()
    rows = [line.split("\t") for line in text.getvalue().strip().splitlines()]
    cells = [[name, *rest[:2], *rest[3:]] for name, *rest in rows if len(rest) > 3]
    lines = [f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]]]
    return "\n".join(lines)


def sections(commands: Iterable[list[str]]) -> str:
    """Return a heading for each command, and its help text below it."""
    return "\n\n".join(f"## {words[-1]}\n\n```{{.text .help}}\n{help_of(*words)}\n```" for words in commands)


def fill(page: str) -> str:
    """Return the page with `<!-- verbs -->`, `<!-- recipes -->` and `<!-- catalogue -->` replaced."""
    if "<!-- catalogue -->" in page:
        return page.replace("<!-- catalogue -->", catalogue())
    if "<!-- verbs -->" in page:
        return page.replace("<!-- verbs -->", sections([verb] for verb in COMMANDS))
    if "<!-- recipes -->" in page:
        return page.replace("<!-- recipes -->", sections(["train", name] for name in recipes()))
    return page

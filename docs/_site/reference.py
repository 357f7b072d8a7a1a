"""The reference of verbs and recipes: the help texts of the program itself, in place of a mark in a page."""

import io
import os
from collections.abc import Iterable
from contextlib import redirect_stdout

from keifu.cli import parse
from keifu.commands.shared.recipe_files import recipes
from keifu.commands.shared.verbs import VERBS


def help_of(*words: str) -> str:
    """The help text of a verb or recipe, 100 columns wide."""
    os.environ["COLUMNS"] = "100"
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            parse([*words, "--help"])()
    except SystemExit:
        pass
    return text.getvalue().strip()


def sections(commands: Iterable[list[str]]) -> str:
    """A heading for each command, and its help text below it."""
    return "\n\n".join(f"## {words[-1]}\n\n```text\n{help_of(*words)}\n```" for words in commands)


def fill(page: str) -> str:
    """The page with `<!-- verbs -->` and `<!-- recipes -->` replaced."""
    if "<!-- verbs -->" in page:
        return page.replace("<!-- verbs -->", sections([verb] for verb in VERBS))
    if "<!-- recipes -->" in page:
        return page.replace("<!-- recipes -->", sections(["train", name] for name in recipes()))
    return page

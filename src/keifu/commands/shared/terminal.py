"""Input at a terminal: a line, or a text of several lines."""

from contextlib import suppress
from typing import NoReturn

from keifu.errors import UserError

QUOTES = '"""'
MORE = "... "  # prompt for further lines of a text


def edit_lines() -> None:
    """Enable line editing and history for input() by readline. Windows has no readline, but its console edits lines."""
    with suppress(ImportError):
        import readline  # noqa: F401 (its import is what does it)


def ask(prompt: str, example: str) -> str:
    """Ask for a text. Raises `UserError`, with an example of a command, if nothing is entered."""
    edit_lines()
    with suppress(EOFError):
        if text := read_rest(input(prompt)).strip():
            return text
    no_text(example)


def no_text(example: str) -> NoReturn:
    """Raise the `UserError` for a missing text."""
    raise UserError(f"There is no text: write it after the model ({example}), pipe it in, or name a file with --file.")


def read_rest(line: str) -> str:
    """Return a text that begins with this line. Read its further lines.

    A text that begins with three quotation marks continues to the line that ends with three. Any other text continues
    after a line that ends with a backslash.
    """
    if line.startswith(QUOTES):
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(input(MORE))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(MORE))
    return "\n".join(lines)

"""Input at a terminal: a line, or a text of several lines."""

from contextlib import suppress
from typing import NoReturn

from keifu.errors import UserError

QUOTES = '"""'
MORE = "... "  # the prompt of a text's further lines


def edit_lines() -> None:
    """Give input() editing and a history, where Python has readline: on Windows the console has its own."""
    with suppress(ImportError):
        import readline  # noqa: F401 (its import is what does it)


def ask(prompt: str, example: str) -> str:
    """Ask for a text; none is a `UserError` that says how else to give one."""
    edit_lines()
    with suppress(EOFError):
        if text := read_rest(input(prompt)).strip():
            return text
    no_text(example)


def no_text(example: str) -> NoReturn:
    """Raise a `UserError`: no text was given."""
    raise UserError(f"There is no text: write it after the model ({example}), pipe it in, or name a file with --file.")


def read_rest(line: str) -> str:
    """Return the whole of a text that begins with this line, whose further lines are read.

    One that begins with three quotation marks goes on to the line that ends with them; a backslash at the end of a line
    continues any other.
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

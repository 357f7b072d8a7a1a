"""Output of text that keifu did not write: of models, and of data."""

import sys

from keifu.errors import printable


def for_terminal(text: object) -> str:
    """Return a text as standard output may get it. In a terminal, control characters other than newlines and tabs
    become escapes such as \\x1b, because the terminal would obey them. Files and pipes get the text unchanged."""
    return printable(str(text)) if sys.stdout.isatty() else str(text)


def say(text: object, end: str = "\n") -> None:
    """Print a text of a model or of data (see `for_terminal`)."""
    print(for_terminal(text), end=end, flush=True)

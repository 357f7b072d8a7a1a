"""Errors that the user can correct."""

import re
import shlex
from collections.abc import Collection, Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Error with one sentence: the value seen and what to do. The command line prints it and exits with status 1."""


def install(extra: str) -> str:
    """Return the command that installs the packages of an extra. It names the checkout, because keifu is on no package
    index, where somebody else could take its name."""
    return f"pip install '.[{extra}]' in keifu's checkout"


def printable(text: str) -> str:
    """Return the text without control characters. Names in files may contain some, and a terminal would obey them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda match: ascii(match[0])[1:-1], text)


def shell(*words: object) -> str:
    """Join words into a shell command, quoted where needed."""
    return shlex.join(map(str, words))


def unknown(kind: str, name: str, known_names: Iterable[str]) -> UserError:
    """Return the error for a name that does not exist. It suggests the nearest known name, and lists all if they are
    few."""
    names = sorted(known_names)
    folded = {known_names.casefold(): known_names for known_names in names}
    near = get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    guess = f" Did you mean {folded[near[0]]!r}?" if near else ""
    listing = f" Known: {', '.join(names)}." if len(names) <= 30 else f" There are {len(names)} known ones."
    return UserError(f"There is no {kind} {name!r}.{guess}{listing if names else ''}")


def require_known(kind: str, name: object, known_names: Collection[str]) -> None:
    """Raise the error `unknown` if `name` is not in `known_names`."""
    if name not in known_names:
        raise unknown(kind, str(name), known_names)

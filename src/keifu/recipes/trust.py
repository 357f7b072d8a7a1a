"""Protection against a foreign run folder. Its recipe.json may name code and files; they are used only if the user
names them too.

Code (a recipe file, a reward function) must be on the command line each time. Paths must be there too, unless this user
started the run (see `keifu.training.run.signature`).
"""

import glob
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from keifu.alignment.rewards import code_file
from keifu.errors import UserError, shell
from keifu.files import sha256
from keifu.folders import config
from keifu.recipes.options import by_option, to_json
from keifu.training.run.signature import KEY, is_signed

SHOWN = 12  # hash digits in messages


def given_options(words: Sequence[str]) -> set[str]:
    """Return the names of the options on a command line."""
    return {word.removeprefix("--").partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def code_hashes(name: str, recipe: Any) -> dict[str, str]:
    """Return the SHA-256 of each file whose code a run executes, by option name; "" names the recipe's file."""
    files = {"": Path(name)} if name.endswith(".py") else {}
    files |= {option: file for option, value in _values(recipe).items() if (file := _code(value))}
    return {option: sha256(file) for option, file in files.items() if file.is_file()}


def options_with_code(recipe: Any) -> dict[str, str]:
    """Return the options that execute code, with their values. A resumed run needs them on its command line."""
    return {option: shell(*_strings(value)) for option, value in _values(recipe).items() if _code(value)}


def refuse_recipe_file(out: Path, name: str, record: Mapping[str, Any]) -> None:
    """Refuse to execute a recipe file that only the run's folder names."""
    if name.endswith(".py"):
        raise UserError(
            f"The run in {out} was made by the recipe file {name}, and a folder never starts code by itself. If you "
            f"trust that file{_was(record, '')}, name it: keifu train {shell(name)} --resume {shell(out)}."
        )


def check_resumed(out: Path, record: Mapping[str, Any], recipe: Any, words: Sequence[str]) -> None:
    """Refuse options that only the folder gives: code in any run, and paths in a run that this user did not start."""
    options_on_line = given_options(words)
    values = _values(recipe)
    default_values = _values(type(recipe)())
    is_mine = is_signed(record)
    for option in sorted(values.keys() - options_on_line):
        value = values[option]
        named_again = f"keifu train --resume {shell(out)} --{option} {shell(*_strings(value))}"
        if code := _code(value):
            raise UserError(
                f"The run in {out} executes the code of {code} (--{option}), and a folder never starts code by itself. "
                f"If you trust that file{_was(record, option)}, name it: {named_again}."
            )
        if not is_mine and value != default_values.get(option) and (path := _path(value)):
            raise UserError(
                f"The run in {out} was not begun by you on this machine (or your key {config() / KEY} is gone), "
                f"and its options name {path}. If you trust that path, name it: {named_again}."
            )


def show_code(name: str, recipe: Any, record: Mapping[str, Any]) -> None:
    """Print the files whose code is executed, with hashes, and whether they have changed since the run began."""
    before = hashes(record)
    values = _values(recipe)
    for option, now in code_hashes(name, recipe).items():
        file = _code(values[option]) if option else Path(name)
        then = before.get(option, now)
        changed = "" if then == now else f"; it was {then[:SHOWN]} when the run began: other code is used from now on"
        print(f"The code of {file} is executed (SHA-256 {now[:SHOWN]}{changed}).", file=sys.stderr, flush=True)


def _was(record: Mapping[str, Any], option: str) -> str:
    then = hashes(record).get(option)
    return f" (its SHA-256 was {then[:SHOWN]})" if then else ""


def hashes(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes stored in a record. Values that are not strings are ignored."""
    recorded_hashes = record.get("code")
    pairs = recorded_hashes.items() if isinstance(recorded_hashes, dict) else ()
    return {name: value for name, value in pairs if isinstance(value, str)}


def _values(recipe: Any) -> dict[str, Any]:
    return by_option(type(recipe), to_json(recipe))


def _strings(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _code(value: Any) -> Path | None:
    return next((file for text in _strings(value) if (file := code_file(text))), None)


def _path(value: Any) -> str | None:
    """Return the first part of a value that names an existing file or folder, as the readers of data would understand
    it: in a comma-separated list, after `~`, as a pattern such as "notes/*.txt", or before a colon and a number."""
    for text in _strings(value):
        for part in filter(None, (text, *map(str.strip, text.split(",")), text.rpartition(":")[0])):
            with suppress(OSError, ValueError, RuntimeError):  # too long, with a zero byte, or without a home folder
                path = Path(part).expanduser()
                if path.exists() or next(glob.iglob(str(path), recursive=True), None):
                    return part
    return None

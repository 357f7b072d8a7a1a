"""`keifu eject`: print the single-file edition of a landmark."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from keifu.commands.shared import flags, tables
from keifu.errors import unknown
from keifu.files import packaged


@dataclass(frozen=True)
class Options:
    """Print one file with a landmark's model, training and result. It needs torch alone. Copy it and change it."""

    name: Annotated[
        tyro.conf.Positional[str | None],
        tyro.conf.arg(metavar="[NAME]", help="Name of the file, such as gpt2. Default: list the files."),
    ] = None


def editions() -> dict[str, Path]:
    """Return the path of each single-file edition by its name."""
    return {path.stem: path for path in sorted(packaged("examples/single").glob("*.py"))}


def run(options: Options) -> None:
    """Print the file, or list all files with their first sentence."""
    paths = editions()
    if options.name is None:
        texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
        tables.show(("name", "landmark"), [(name, text[3:].split(" in one file")[0]) for name, text in texts.items()])
    elif options.name not in paths:
        raise unknown("single-file edition", options.name, paths)
    else:
        print(paths[options.name].read_text(encoding="utf-8"), end="")


parse = flags.parser(Options, run, "keifu eject")

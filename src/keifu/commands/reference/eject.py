"""`keifu eject`: print the single-file edition of a landmark."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from keifu.commands.shared import tables
from keifu.errors import unknown
from keifu.folders import packaged

OTHER_NAMES = {"mlp": "neurons", "perceptron": "neurons", "seq2seq": "attention"}  # file names that differ


@dataclass(frozen=True)
class Options:
    """Print one file with a landmark's model, training and result. It needs only torch. Copy it and change it."""

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None
    """Landmark, such as gpt2. Default: list all."""


def run(options: Options) -> None:
    """Print the file, or list all files with their first sentence."""
    paths = {path.stem: path for path in sorted(packaged("examples/single").glob("*.py"))}
    name = options.name and OTHER_NAMES.get(options.name, options.name.replace("-", "_"))
    if name is None:
        texts = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
        tables.show(("name", "landmark"), [(name, text[3:].split(" in one file")[0]) for name, text in texts.items()])
    elif name not in paths:
        raise unknown("single-file edition", name, [*paths, *OTHER_NAMES])
    else:
        print(paths[name].read_text(encoding="utf-8"), end="")

"""`keifu train`: finds a recipe by its name and makes its fields options; knows no recipe and no loop."""

import re
from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from keifu.commands import flags, tables
from keifu.commands.recipe_files import path_of, recipe_module, recipe_options, recipes


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """Without a recipe, the list of them; otherwise the run that the recipe and its options describe."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return _list
    name, *rest = arguments
    path_of(name)
    return parse_recipe(name, rest, f"keifu train {name}")


def parse_recipe(name: str, arguments: Sequence[str], program: str) -> Callable[[], None]:
    """A recipe's run from its `Recipe` fields, `--out` and `--resume`."""
    if flags.asks_for_help(arguments):
        kind, about = recipe_options(name)
        flags.parse(with_folder(kind, name), arguments, program, re.sub(r"\n(?=[A-Z]\w+: )", "\n\n", about))
    module = recipe_module(name)
    options = flags.parse(with_folder(module.Recipe, name), arguments, program)
    return lambda: module.run(options.recipe, options.out, options.resume)


def with_folder(kind: type, name: str) -> Any:
    """A recipe's options and those of every run."""
    folder = field(default=Path("runs") / Path(name).stem)
    fields = [
        ("recipe", Annotated[kind, tyro.conf.arg(name="")]),
        ("out", Annotated[Path, tyro.conf.arg(help="Folder of the run.")], folder),
        ("resume", Annotated[bool, tyro.conf.arg(help="Go on with the run that stands in that folder.")], False),
    ]
    return make_dataclass("Train", fields, frozen=True)


def _list() -> None:
    print("Usage: keifu train RECIPE [OPTIONS]      keifu train RECIPE --help tells a recipe's options\n")
    tables.show(("recipe", "what it trains"), recipes().items())

"""`keifu train`: finds a recipe by its name and makes its fields options; knows no recipe and no loop."""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from keifu.commands import flags, tables
from keifu.errors import unknown

RECIPES = Path(__file__).parent.parent / "recipes"


def recipes() -> dict[str, str]:
    """Every recipe's name and the first line of its file's docstring, which is read and not run."""
    files = sorted(path for path in RECIPES.glob("*.py") if not path.name.startswith("_"))
    return {path.stem.replace("_", "-"): _first_line(path) for path in files}


def _first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """Without a recipe, the list of them; otherwise the run that the recipe and its options describe."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return _list
    name, *rest = arguments
    if name not in recipes():
        raise unknown("recipe", name, recipes())
    return parse_recipe(name, rest, f"keifu train {name}")


def parse_recipe(name: str, arguments: Sequence[str], program: str) -> Callable[[], None]:
    """A recipe's run from its `Recipe` fields, `--out` and `--resume`."""
    module = import_module(f"keifu.recipes.{name.replace('-', '_')}")
    fields = [
        ("recipe", Annotated[module.Recipe, tyro.conf.arg(name="")]),
        ("out", Annotated[Path, tyro.conf.arg(help="Folder of the run.")], field(default=Path("runs") / name)),
        ("resume", Annotated[bool, tyro.conf.arg(help="Go on with the run that stands in that folder.")], False),
    ]
    about = re.sub(r"\n(?=[A-Z]\w+: )", "\n\n", module.__doc__ or "")  # tyro keeps the line breaks of paragraphs alone
    options = flags.parse(make_dataclass("Train", fields, frozen=True), arguments, program, about)
    return lambda: module.run(options.recipe, options.out, options.resume)


def _list() -> None:
    print("Usage: keifu train RECIPE [OPTIONS]      keifu train RECIPE --help tells a recipe's options\n")
    tables.show(("recipe", "what it trains"), recipes().items())

"""Recipe files, keifu's or a user's: their paths, docstrings and modules. A file is executed only as a module."""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from keifu.errors import UserError, require_known
from keifu.recipes import RECIPES


def recipe_names() -> list[str]:
    """Return the names of keifu's recipes."""
    return sorted(RECIPES)


def recipes() -> dict[str, str]:
    """Return each recipe's name and the first line of its docstring. The files are parsed, not executed."""
    return {name: docstring(path_of(name)).partition("\n")[0] for name in recipe_names()}


def is_own(name: str) -> bool:
    """Return whether a recipe's name is the path of a user's file."""
    return name.endswith(".py")


def path_of(name: str) -> Path:
    """Return the path of a recipe's file. Raises `UserError`, with the nearest name, if it is unknown."""
    if is_own(name):
        if not Path(name).is_file():
            raise UserError(f"There is no file {name!r}: give a file with a class Recipe and a function jobs.")
        return Path(name)
    require_known("recipe", name, recipe_names())
    return Path(__file__).parent / f"{RECIPES[name].replace('.', '/')}.py"


def published_recipe(module: Any, recipe_of: object) -> Any | None:
    """Return the recipe with a paper's size and settings, if it is asked for and the module has one."""
    return vars(module).get("PUBLISHED") if recipe_of == "paper" else None


def recipe_module(name: str) -> Any:
    """Execute a recipe's file and return its module. `Recipe` has the options, and `jobs(recipe)` yields the jobs."""
    path = path_of(name)
    if not is_own(name):
        return import_module(f"keifu.recipes.{RECIPES[name]}")
    spec = spec_from_file_location(f"recipe {path.stem}", path)  # a name that no module can have
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the types of their fields here
    with _blaming(path):
        spec.loader.exec_module(module)
    if missing_names := [name for name in ("Recipe", "jobs") if name not in vars(module)]:
        older = ", and its function run is of an earlier version" if "run" in vars(module) else ""
        raise UserError(
            f"{path} is no recipe: it lacks {' and '.join(missing_names)}{older} (docs/python.md shows one)."
        )
    if not (isinstance(module.Recipe, type) and is_dataclass(module.Recipe)):
        raise UserError(f"{path} is no recipe: its Recipe is no dataclass (docs/python.md shows one).")
    return module


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn errors of a user's file into a `UserError` that names the file. A missing package is reported as usual."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}.") from error


def docstring(path: Path) -> str:
    """Return the docstring of a recipe's file. The file is parsed, not executed."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""

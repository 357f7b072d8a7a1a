"""Recipe files: keifu's own and a user's, and a recipe's options without running it.

A recipe's file imports what it trains with, and so torch, which takes longer than a help text may. For a help text only
the class of its options is therefore built, and from the files that it imports only what that class needs.
"""

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from keifu.errors import UserError, require_known
from keifu.recipes import RECIPES

SOURCE = Path(__file__).parent.parent.parent


def recipe_names() -> list[str]:
    """Return the names of keifu's own recipes."""
    return sorted(RECIPES)


def recipes() -> dict[str, str]:
    """Return every recipe's name and the first line of its file's docstring, which is read and not run."""
    return {name: _docstring(path_of(name)).partition("\n")[0] for name in recipe_names()}


def is_own(name: str) -> bool:
    """Return whether a recipe is a user's file."""
    return name.endswith(".py")


def path_of(name: str) -> Path:
    """Return a recipe's file; a name that is none is a `UserError` with the nearest one."""
    if is_own(name):
        if not Path(name).is_file():
            raise UserError(
                f"There is no file {name!r} with a recipe: give a file with a class Recipe and a function run."
            )
        return Path(name)
    require_known("recipe", name, recipe_names())
    return SOURCE / "recipes" / f"{RECIPES[name].replace('.', '/')}.py"


def recipe_module(name: str) -> Any:
    """Run a recipe's file and return its module: its `Recipe` are the options, `run(recipe, out, resume)` trains."""
    path = path_of(name)
    if not is_own(name):
        return import_module(f"keifu.recipes.{RECIPES[name]}")
    spec = spec_from_file_location(f"recipe {path.stem}", path)  # a name that no module has
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the types of their fields
    with _blaming(path):
        spec.loader.exec_module(module)
    missing = [part for part in ("Recipe", "run") if part not in vars(module)]
    if missing:
        raise UserError(f"{path} is no recipe: it lacks {' and '.join(missing)} (docs/python.md shows one).")
    _check(module.Recipe, path)
    return module


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn errors of a user's file into a `UserError` that names the file; missing packages are reported as
    elsewhere."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except (Exception, SystemExit) as error:
        if path.is_relative_to(SOURCE):
            raise
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}.") from error


def _check(kind: Any, path: Path) -> None:
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise UserError(f"{path} is no recipe: its Recipe is no dataclass (docs/python.md shows one).")


def recipe_options(name: str) -> tuple[type, str]:
    """Return the class of a recipe's options as a help text needs it, and the docstring of its file; no torch is
    imported."""
    path = path_of(name)
    with _blaming(path):
        kind = _part(path.stem if is_own(name) else f"keifu.recipes.{RECIPES[name]}", path).Recipe
        _check(kind, path)
        return kind, _docstring(path)


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


class _Part(ModuleType):
    """A file of which each name is made when it is asked for, from the statements that make it.

    Classes are made without their methods: they have the fields, and nothing that is done with them.
    """

    def __init__(self, name: str, path: Path):
        super().__init__(f"options of {name}")
        self.__file__ = str(path)
        sys.modules[self.__name__] = self  # where tyro looks for the text of a class, which has its fields' docstrings

    @cached_property
    def _statements(self) -> list[ast.stmt]:
        return ast.parse(Path(str(self.__file__)).read_text(encoding="utf-8")).body

    def __getattr__(self, name: str) -> Any:
        binding = [statement for statement in self._statements if name in _bound(statement)]
        if not binding or name.startswith("__"):
            raise AttributeError(f"{self.__file__} has no {name!r}")
        for statement in binding:
            if isinstance(statement, ast.ImportFrom) and (statement.module or "").partition(".")[0] == "keifu":
                original = next(a.name for a in statement.names if (a.asname or a.name) == name)
                vars(self)[name] = _imported(str(statement.module), original)
            else:
                self._run(statement)
        return vars(self)[name]

    def _run(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.ClassDef):
            statement.body = [part for part in statement.body if not isinstance(part, ast.FunctionDef)] or [ast.Pass()]
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            for name in _read(statement) - {*_bound(statement)} - vars(self).keys():
                if any(name in _bound(other) for other in self._statements):
                    getattr(self, name)
        exec(compile(ast.Module([statement], []), str(self.__file__), "exec"), vars(self))  # nosec B102


def _read(node: ast.AST) -> set[str]:
    """Return the names that a statement or expression reads."""
    names = [inner for inner in ast.walk(node) if isinstance(inner, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


def _bound(statement: ast.stmt) -> Iterator[str]:
    """Return the names that a statement at the head of a file makes."""
    match statement:
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in names)
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
            yield name
        case ast.Assign(targets=targets):
            yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)) | ast.AugAssign(target=ast.Name(id=name)):
            yield name


def _imported(module: str, name: str) -> Any:
    """Return the result of `from module import name` for keifu's modules: a part of a file, or a file with such
    parts."""
    inner = f"{module}.{name}".removeprefix("keifu.")
    path = SOURCE / f"{inner.replace('.', '/')}.py"
    if path.is_file():
        return _part(f"keifu.{inner}", path)
    outer = SOURCE / module.removeprefix("keifu").replace(".", "/").lstrip("/")
    file = outer / "__init__.py" if outer.is_dir() else outer.with_suffix(".py")
    return getattr(_part(module, file), name)


@cache
def _part(name: str, path: Path) -> Any:
    return _Part(name, path)

"""Rows of a table for options of commands: which function an option reaches, and as what. The functions are replaced by
recorders, so that no model is loaded and nothing is computed."""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from keifu import cli

STDOUT = "stdout"  # a target: the text that is printed
UNREACHED = object()


class ReachedError(BaseException):
    """End of a run at the function that a row names."""


@dataclass(frozen=True)
class Row:
    """Words that set an option, the function that it reaches ("module:name"), and an argument's value there.

    path: an argument (its name or number) and attributes, keys or numbers of items in it, with dots between; a function
    of the arguments; or empty, if the function is reached with the option alone. base: other words of the command than
    the table's.
    returns: further functions that are replaced, with what they return.
    """

    words: str
    target: str
    path: str | Callable[[Any], Any] = ""
    expected: Any = True
    base: str | None = None
    returns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows of one command by the names of its options, with words that every row shares."""

    base: str
    rows: Mapping[str, Row]
    returns: Mapping[str, Any] = field(default_factory=dict)


def passed(value: Any) -> Any:
    """Return the value: a target for what a stand-in of a model is given."""
    return value


def value_of(arguments: Any, path: str | Callable[[Any], Any]) -> Any:
    """Return what a path names among the arguments of a call."""
    if callable(path):
        return path(arguments)
    if not path:
        return True
    found = arguments.by_place if path[0].isdecimal() else arguments
    for name in path.split("."):
        if isinstance(found, Mapping):
            found = found[name]
        elif name.isdecimal():
            found = found[int(name)]
        else:
            found = getattr(found, name)
    return found


def _arguments(signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """Return the arguments of a call by their names; by_place has those without a name too."""
    if signature is None:
        return SimpleNamespace(by_place=args, **kwargs)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    named, by_place = dict[str, Any](), list[Any]()
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            by_place += value if kind is inspect.Parameter.VAR_POSITIONAL else [value]
            named[name] = value
    return SimpleNamespace(by_place=by_place, **named)


class Recorder:
    """Replaced functions, and the arguments of the last call of the one that a row names."""

    def __init__(self, patch: pytest.MonkeyPatch, target: str, returns: Mapping[str, Any]):
        self.arguments: Any = None
        self.patch = patch
        for name, value in returns.items():
            self._replace(name, value, name == target)
        if target != STDOUT and target not in returns:
            self._replace(target, ReachedError(), True)

    def _replace(self, name: str, value: Any, recorded: bool) -> None:
        module, _, function = name.partition(":")
        home = import_module(module)
        original = getattr(home, function)
        try:
            signature = inspect.signature(original)
        except ValueError:
            signature = None

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if recorded:
                self.arguments = _arguments(signature, args, kwargs)
            if isinstance(value, BaseException):
                raise value
            return value(*args, **kwargs) if callable(value) else value

        self.patch.setattr(home, function, replaced)


def reached(words: list[str], row: Row, returns: Mapping[str, Any], capsys: pytest.CaptureFixture) -> Any:
    """Run a command, and return the value that the row's path names; UNREACHED if its function was not called.

    What fails after that function was called is no matter: what it returned may be a stand-in.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        recorder = Recorder(patch, row.target, {**returns, **row.returns})
        capsys.readouterr()
        try:
            cli.parse(words)()
        except (Exception, ReachedError):
            if recorder.arguments is None:
                raise
        text = capsys.readouterr().out
    if row.target == STDOUT:
        return value_of(text, row.path)
    return UNREACHED if recorder.arguments is None else value_of(recorder.arguments, row.path)

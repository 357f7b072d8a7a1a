"""Types and shapes of every function's arguments and results, checked once for each combination that occurs.

jaxtyping's hook checks every call, which takes longer than most of the calls. A call whose arguments and result have
the types, shapes and dtypes of a call before it would get the same answer, so it is not checked again.
"""

import functools
import inspect
from collections.abc import Hashable, Iterator
from typing import Any, ForwardRef, get_args

import jaxtyping
from beartype import beartype
from torch import Tensor

ITEMS = 8  # of a longer list, the first and the last stand for all, as one item does for beartype
_check_every_call = jaxtyping.jaxtyped


def _signature(value: Any) -> Hashable:
    """What an annotation can see of a value: its type, a tensor's shape and dtype, the same of what it contains."""
    kind = type(value)
    if isinstance(value, Tensor):
        return kind, value.shape, value.dtype
    if isinstance(value, list | tuple):
        items = value if len(value) <= ITEMS or isinstance(value, tuple) else (value[0], value[-1])
        return kind, *map(_signature, items)
    if isinstance(value, dict):
        return kind, *((_signature(key), _signature(item)) for key, item in list(value.items())[:ITEMS])
    return (kind, value) if isinstance(value, str) else kind  # a Literal sees the letters


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it contains."""
    yield annotation
    for each in get_args(annotation):
        yield from _parts(each)


def check_once(function: Any = None, *, typechecker: Any) -> Any:
    """Stands for `jaxtyping.jaxtyped` in the import hook."""
    if function is None:
        return functools.partial(check_once, typechecker=typechecker)
    if not inspect.isfunction(function):
        return _check_every_call(function, typechecker=typechecker)
    parts = [part for annotation in function.__annotations__.values() for part in _parts(annotation)]
    if any(isinstance(part, str | ForwardRef) for part in parts):  # a name that may not be there when tests run
        return _check_every_call(function, typechecker=typechecker)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):  # as whoever calls it asks
        return beartype(function)
    if not any(getattr(part, "__module__", "") == "jaxtyping" for part in parts):
        return _check_types(function)
    seen: set[Hashable] = set()
    results: list[Any] = []

    @functools.cache  # checks are made when they are needed first: most functions are never called
    def check_of(checked: Any) -> Any:
        return _check_every_call(checked, typechecker=typechecker)

    @functools.wraps(function)
    def take_result(*args: Any, **kwargs: Any) -> Any:
        return results.pop()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = _signature(args), _signature(kwargs)
        if arguments not in seen:
            result = check_of(function)(*args, **kwargs)
            seen.update((arguments, (arguments, _signature(result))))
            return result
        result = function(*args, **kwargs)
        if (both := (arguments, _signature(result))) not in seen:
            results.append(result)
            check_of(take_result)(*args, **kwargs)
            seen.add(both)
        return result

    return call


def _check_types(function: Any) -> Any:
    """The types of each call, by a check that is made at the first one."""
    checked: list[Any] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not checked:
            checked.append(beartype(function))
        return checked[0](*args, **kwargs)

    return call


def install() -> None:
    """Has every module of keifu that is imported from now on checked."""
    jaxtyping.jaxtyped = check_once
    jaxtyping.install_import_hook("keifu", "beartype.beartype")

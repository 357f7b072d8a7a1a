"""Types and shapes of every function's arguments and results, checked once for each combination that occurs.

jaxtyping's hook checks every call, which takes longer than most of the calls. A call whose arguments and result have
the types, shapes and dtypes of a call before it would get the same answer, so it is not checked again.
"""

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any, ForwardRef, get_args

import jaxtyping
from beartype import beartype
from torch import Tensor

ITEMS = 8  # of a longer list, the first and the last stand for all, as one item does for beartype
_check_every_call = jaxtyping.jaxtyped


def _of_tensor(value: Tensor) -> Hashable:
    return type(value), value.shape, value.dtype


def _of_tuple(value: tuple) -> Hashable:
    return type(value), *map(_signature, value)


def _of_list(value: list) -> Hashable:
    return type(value), *map(_signature, value if len(value) <= ITEMS else (value[0], value[-1]))


def _of_dict(value: dict) -> Hashable:
    return type(value), *((_signature(key), _signature(item)) for key, item in list(value.items())[:ITEMS])


def _of_text(value: str) -> Hashable:
    return type(value), value  # a Literal sees the letters


READERS: dict[type, Callable[[Any], Hashable]] = {
    Tensor: _of_tensor, tuple: _of_tuple, list: _of_list, dict: _of_dict, str: _of_text,
}  # fmt: skip


@functools.cache
def _reader(kind: type) -> Callable[[Any], Hashable]:
    """What reads a type's values; of most, no annotation sees more than the type."""
    return next((read for base, read in READERS.items() if issubclass(kind, base)), type)


def _signature(value: Any) -> Hashable:
    """What an annotation can see of a value: its type, a tensor's shape and dtype, the same of what it contains."""
    return _reader(type(value))(value)


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
    named = any(isinstance(part, str | ForwardRef) for part in parts)  # by a name that is looked up at the first call
    if not named and (inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)):
        return beartype(function)  # as whoever calls it asks
    if not named and not any(getattr(part, "__module__", "") == "jaxtyping" for part in parts):
        return _check_types(function)
    seen: dict[Hashable, set[Hashable]] = {}  # the results of each kind of arguments
    results: list[Any] = []

    @functools.cache  # checks are made when they are needed first: most functions are never called
    def check_of(checked: Any) -> Any:
        return _check_every_call(checked, typechecker=typechecker)

    @functools.wraps(function)
    def take_result(*args: Any, **kwargs: Any) -> Any:
        return results.pop()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments: Hashable = _of_tuple(args)
        if kwargs:
            arguments = arguments, _of_dict(kwargs)
        known = seen.get(arguments)
        if known is None:
            result = check_of(function)(*args, **kwargs)
            seen.setdefault(arguments, set()).add(_signature(result))
            return result
        result = function(*args, **kwargs)
        if (found := _signature(result)) not in known:
            results.append(result)
            check_of(take_result)(*args, **kwargs)
            known.add(found)
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

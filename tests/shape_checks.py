"""Types and shapes of every function's arguments and results, checked once for each combination that occurs.

jaxtyping's hook checks every call, which takes longer than most of the calls. A call whose arguments and result have
the types, shapes and dtypes of a call before it would get the same answer, so it is not checked again. In one test, the
first `CALLS` calls of a function are looked at, and of the later ones every `LATER`-th: a loop repeats itself. To make
an instance of a dataclass is such a call. Where slow tests run too, `check_more` has more of them looked at.
"""

import dataclasses
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from types import CodeType, FunctionType
from typing import Any, ForwardRef, get_args

import jaxtyping
from beartype import beartype
from torch import Tensor

CALLS, LATER = 4, 64
MOST_COPIES = 2  # of a coroutine function that is made inside another, so many are checked
ITEMS = 8  # of a longer list, the first and the last stand for all, as one item does for beartype
_check_every_call = jaxtyping.jaxtyped
_test = 0  # the number of the test that runs


def check_more() -> None:
    """Look at the first 16 calls of a function in a test, and at every 16th after them."""
    global CALLS, LATER
    CALLS = LATER = 16


def begin_test() -> None:
    """Look at the first calls of every function from here on."""
    global _test
    _test += 1


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
    """Return the reader of a type's values. For most types an annotation sees only the type."""
    return next((read for base, read in READERS.items() if issubclass(kind, base)), type)


def _signature(value: Any) -> Hashable:
    """Return everything that an annotation can see of a value: type, shape and dtype, and the same of its contents."""
    return _reader(type(value))(value)


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all that it contains."""
    yield annotation
    for each in get_args(annotation):
        yield from _parts(each)


class Checks:
    """The checks of a function, and of every copy of one that is made inside another.

    A check is compiled, which takes longer than most functions: it is made when it is needed first, and once.
    """

    def __init__(self, function: Any, check: Callable[[Any], Any]):
        self.seen: dict[Hashable, set[Hashable]] = {}  # the results of each kind of arguments
        self.test, self.calls, self.skips = -1, 0, 0  # of the calls of all copies: as in `_check_shapes`
        self._here = threading.local()

        def run(*args: Any, **kwargs: Any) -> Any:
            return self._here.waiting.pop()(*args, **kwargs)

        # in the function's module, where the names of its annotations are looked up
        same = FunctionType(run.__code__, function.__globals__, function.__name__, None, run.__closure__)
        self._check: Callable[[], Any] = functools.cache(lambda: check(functools.wraps(function)(same)))

    def run(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call the function, or the source of its result, with arguments and result checked."""
        waiting = self._here.__dict__.setdefault("waiting", [])
        below = len(waiting)
        waiting.append(function)
        try:
            return self._check()(*args, **kwargs)
        finally:
            del waiting[below:]  # wrong arguments were refused before it ran


INNER: dict[CodeType, Checks] = {}  # of functions that are made inside others, at each call anew
COPIES: Counter[CodeType] = Counter()


def check_once(function: Any = None, *, typechecker: Any) -> Any:
    """Stand for `jaxtyping.jaxtyped` in the import hook."""
    if function is None:
        return functools.partial(check_once, typechecker=typechecker)
    again = functools.partial(check_once, typechecker=typechecker)
    if isinstance(function, property):
        return property(*(part and again(part) for part in (function.fget, function.fset, function.fdel)))
    if isinstance(function, classmethod | staticmethod):
        return type(function)(again(function.__func__))
    if dataclasses.is_dataclass(function):
        if inspect.isfunction(made := vars(function).get("__init__")) and not hasattr(made, "__wrapped__"):
            check = functools.partial(_check_every_call, typechecker=typechecker)
            function.__init__ = _check_shapes(made, Checks(made, check))
        return function
    if not inspect.isfunction(function):
        return _check_every_call(function, typechecker=typechecker)
    parts = [part for annotation in function.__annotations__.values() for part in _parts(annotation)]
    named = any(isinstance(part, str | ForwardRef) for part in parts)  # by a name that is looked up at the first call
    inner, code = "<locals>" in function.__qualname__, function.__code__
    if not named and (inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)):
        COPIES[code] += inner  # as whoever calls it asks
        return beartype(function) if COPIES[code] <= MOST_COPIES else function
    by_type = not named and not any(getattr(part, "__module__", "") == "jaxtyping" for part in parts)
    if by_type and not inner:
        return _check_types(function)
    check = beartype if by_type else functools.partial(_check_every_call, typechecker=typechecker)
    checks = INNER.setdefault(code, Checks(function, check)) if inner else Checks(function, check)
    return _check_copies(function, checks) if by_type else _check_shapes(function, checks)


def _check_shapes(function: Any, checks: Checks) -> Any:
    """Return the function with checks of types and shapes, for each call unlike those before it."""
    seen, test, calls, skips = checks.seen, -1, 0, 0  # the test of the last call, how many were looked at, and are not

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal test, calls, skips
        if skips and test == _test:
            skips -= 1
            return function(*args, **kwargs)
        calls = calls + 1 if test == _test else 1
        test, skips = _test, LATER - 1 if calls >= CALLS else 0
        arguments: Hashable = _of_tuple(args)
        if kwargs:
            arguments = arguments, _of_dict(kwargs)
        known = seen.get(arguments)
        if known is None:
            result = checks.run(function, args, kwargs)
            seen.setdefault(arguments, set()).add(_signature(result))
            return result
        result = function(*args, **kwargs)
        if (found := _signature(result)) not in known:
            checks.run(lambda *_, **__: result, args, kwargs)
            known.add(found)
        return result

    return call


def _check_types(function: Any) -> Any:
    """Return the function with a check of types, which is compiled at the first call."""
    checked: list[Any] = []
    test, calls, skips = -1, 0, 0

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal test, calls, skips
        if skips and test == _test:
            skips -= 1
            return function(*args, **kwargs)
        calls = calls + 1 if test == _test else 1
        test, skips = _test, LATER - 1 if calls >= CALLS else 0
        if not checked:
            checked.append(beartype(function))
        return checked[0](*args, **kwargs)

    return call


def _check_copies(function: Any, checks: Checks) -> Any:
    """Return the function with the check of types that all its copies share."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if checks.skips and checks.test == _test:
            checks.skips -= 1
            return function(*args, **kwargs)
        checks.calls = checks.calls + 1 if checks.test == _test else 1
        checks.test, checks.skips = _test, LATER - 1 if checks.calls >= CALLS else 0
        return checks.run(function, args, kwargs)

    return call


def install() -> None:
    """Have every module of keifu that is imported from now on checked."""
    jaxtyping.jaxtyped = check_once
    jaxtyping.install_import_hook("keifu", "beartype.beartype")

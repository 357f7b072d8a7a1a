"""Limits for chat templates, which are foreign programs: on computing time, on the length of their output, and on sizes
of values.

Nothing is computed while a template is compiled. While it renders, the time is checked at each line, and operations
that can create a large value at once (multiplication, powers, padding, replacement) are checked before they run.
"""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import unwrap
from types import BuiltinMethodType, FrameType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg

SECONDS = 5.0  # computing time of one rendering
LARGEST = 10_000_000  # characters of a text, entries of a list, and bits of a number
WIDE = re.compile(r"\d{7}")  # a width of at least 7 digits in a format
LONGEST_SOURCE = 1_000_000  # maximal characters of a template
GROWING = ("replace", "join", "indent", "wordwrap", "expandtabs", "translate")  # methods that insert text many times
WHOLE = (  # filters that accept lists; the others convert a list with all its content to text
    *("attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list"),
    *("map", "max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort"),
    "unique",
)


class LimitError(Exception):
    """A template exceeds the time or size limits."""


def _refuse_size() -> None:
    raise LimitError(f"it makes values of more than {LARGEST:,} characters or entries")


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1


def _check_text(value: Any) -> Any:
    """Return the value if its total size is within the limit. A list that occurs many times counts each time."""
    left, waiting = LARGEST, [value]
    while waiting and left > 0:
        part = waiting.pop()
        left -= len(part) if isinstance(part, str) else 16
        if isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            waiting += part
    return value if left > 0 else _refuse_size()


def _check_call(name: str, values: tuple[Any, ...]) -> None:
    """Raise `LimitError` for a call that could create a huge value: by a number, by a width, or by inserting text into
    text."""
    sizes = [_size(value) for value in values]
    texts = [value for value in values if isinstance(value, str)]
    wide = name in ("format", "format_map", "%") and any(map(WIDE.search, texts))
    numbers = [value for value in values if isinstance(value, int | float)]
    product = sizes[0] * max(sizes[1:], default=1) if name in GROWING and sizes else 0
    if wide or max(sizes, default=0) > LARGEST or product > 10 * LARGEST or any(abs(n) > LARGEST for n in numbers):
        _refuse_size()


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that it first checks its arguments. It takes the context, so it is never called during
    compilation."""
    passes = _PassArg.from_obj(function)

    @pass_context
    @wraps(function)
    def limited(context: Context, *given: Any, **named: Any) -> Any:
        _check_call(name, (*given, *named.values()))
        if name not in WHOLE:
            _check_text(given)
        first = {_PassArg.context: context, _PassArg.eval_context: context.eval_ctx, None: None}
        before = () if passes is None else (first.get(passes, context.environment),)
        return function(*before, *given, **named)

    vars(limited)["jinja_pass_arg"] = _PassArg.context  # `wraps` copied the function's value
    return limited


class _Generator(CodeGenerator):
    """Code generator that joins texts (`~`) by a function with limits."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:  # noqa: N802 (jinja2's name)
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def limit(self) -> None:
        """Wrap every existing filter with limits, and limit the output."""
        self.finalize = _check_text
        self.filters = {name: _limited_filter(name, function) for name, function in self.filters.items()}

    def join(self, parts: tuple[Any, ...]) -> str:
        """Join the parts to one text, within the limit."""
        return "".join(map(str, _check_text(parts)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_call(operator, (left, *right) if isinstance(right, tuple) else (left, right))
        sizes = (_size(left), _size(right))
        numbers = [value for value in (left, right) if isinstance(value, int | float)]
        grown = sum(sizes)  # size of a sum; for a product of numbers, its bits
        if operator == "*" and len(numbers) == 1:
            grown = max(sizes) * abs(numbers[0])
        elif operator == "**" and len(numbers) == 2:
            grown = sizes[0] * abs(numbers[1])
        if grown > LARGEST:
            _refuse_size()
        if operator == "%" and isinstance(left, str):
            _check_text(right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *given: Any, **named: Any) -> Any:
        inner = unwrap(function) if callable(function) else function  # the sandbox wraps `format`
        owner = (inner.__self__,) if isinstance(inner, BuiltinMethodType) else ()
        _check_call(inner.__name__ if owner else "", (*owner, *given, *named.values()))
        if owner and inner.__name__.startswith("format"):
            _check_text([*given, *named.values()])
        return super().call(context, function, *given, **named)


@contextmanager
def limited() -> Iterator[None]:
    """Limit rendering inside a block: each line of a template checks the computing time and its texts."""
    end, before = time.thread_time() + SECONDS, sys.gettrace()

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise LimitError(f"it takes more than {SECONDS:g} s")
        return line

    def call(frame: FrameType, event: str, argument: Any) -> Any:
        return line if frame.f_code.co_filename == "<template>" else None

    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)

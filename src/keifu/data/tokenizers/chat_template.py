"""Chat templates: messages are rendered to text in Jinja's sandbox, as in transformers. Also the loss mask of assistant
tokens.

The mask is exact for each token: markers in the rendered text show where each assistant turn begins and ends.

Templates are foreign programs, so they have limits: on computing time, on the length of their output, and on sizes of
values. Nothing is computed while a template is compiled. While it renders, the time is checked at each line, and
operations that can create a large value at once (multiplication, powers, padding, replacement) are checked before they
run.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache, wraps
from inspect import unwrap
from itertools import accumulate, pairwise
from pathlib import Path
from types import BuiltinMethodType, FrameType, TracebackType
from typing import Any

import tokenizers
from jinja2 import Template, TemplateError, meta, nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg

from keifu.errors import UserError

Messages = Sequence[Mapping[str, Any]]  # {"role": ..., "content": ...} each
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
    remaining, waiting = LARGEST, [value]
    while waiting and remaining > 0:
        part = waiting.pop()
        remaining -= len(part) if isinstance(part, str) else 16
        if isinstance(part, dict):
            waiting += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            waiting += part
    return value if remaining > 0 else _refuse_size()


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
    def limited(context: Context, *arguments: Any, **keywords: Any) -> Any:
        _check_call(name, (*arguments, *keywords.values()))
        if name not in WHOLE:
            _check_text(arguments)
        first = {_PassArg.context: context, _PassArg.eval_context: context.eval_ctx, None: None}
        before = () if passes is None else (first.get(passes, context.environment),)
        return function(*before, *arguments, **keywords)

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

    def call(self, context: Context, function: Any, /, *arguments: Any, **keywords: Any) -> Any:
        inner = unwrap(function) if callable(function) else function  # the sandbox wraps `format`
        owner = (inner.__self__,) if isinstance(inner, BuiltinMethodType) else ()
        _check_call(inner.__name__ if owner else "", (*owner, *arguments, *keywords.values()))
        if owner and inner.__name__.startswith("format"):
            _check_text([*arguments, *keywords.values()])
        return super().call(context, function, *arguments, **keywords)


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


# CHATML is for models that learn to chat; the tokenizer needs <|im_start|> and <|im_end|>. PLAIN is for models without
# tokens for turns: the end-of-text token ends an answer. PICTURES is for a model that sees.
FILES = ("chatml", "plain", "pictures")
CHATML, PLAIN, PICTURES = (Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8") for name in FILES)
TURN = ("turn_opening", "turn_closing")  # variables around an assistant turn; unset, they are empty


class _GenerationTag(Extension):
    """Tag `{% generation %}...{% endgeneration %}` that marks an assistant turn for training. It does not change the
    text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        words = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opening, closing = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in TURN)
        return [opening, *words, closing]


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """Write plain JSON. Jinja's filter would escape characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def compile_template(template: str) -> Template:
    """Compile a template; the result is cached. Raises `UserError`, with the line, for invalid Jinja."""
    extensions = ["jinja2.ext.loopcontrols", _GenerationTag]
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.limit()
    clock = {"strftime_now": lambda form: datetime.now().strftime(form)}
    environment.globals |= {"raise_exception": _raise_exception} | clock
    if len(template) > LONGEST_SOURCE:
        raise UserError(f"The chat template has {len(template):,} characters, and at most {LONGEST_SOURCE:,} are read.")
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        reason = str(error.message).rstrip(".")
        raise UserError(f"The chat template cannot be read, at its line {error.lineno}: {reason}.") from error
    except Exception as error:  # errors of Python's compiler: a break outside a loop, too deep nesting
        raise UserError(f"The chat template cannot be read: {error or type(error).__name__}.") from error


@lru_cache(maxsize=32)
def template_variables(template: str) -> frozenset[str]:
    """Return the names that a template reads and that neither the template nor Jinja defines."""
    return frozenset(meta.find_undeclared_variables(compile_template(template).environment.parse(template))) - {*TURN}


def render(template: str | None, messages: Messages, add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
    """Render messages to text.

    template: Jinja source; None is a `UserError` that says what to do.
    messages: mappings with at least a "role"; entries that are None are left out, as templates expect.
    variables: further values for the template: the special tokens by role, `tools`, `documents`, ...
    """
    if template is None:
        raise UserError(
            "This tokenizer has no chat template, so the model was probably not made to chat: give plain text to "
            "continue, or set one with tokenizer.with_chat_template(keifu.data.tokenizers.chat_template.CHATML)."
        )
    plain = [_plain(message, index) for index, message in enumerate(messages)]
    if not plain:
        raise UserError("There is no message to render: give at least one, like {'role': 'user', 'content': 'Hello'}.")
    all_variables = {"tools": None, "documents": None, **variables}
    ready = compile_template(template)
    try:
        with limited():
            pieces = ready.generate(messages=plain, add_generation_prompt=add_generation_prompt, **all_variables)
            return _within_limits(pieces)
    except Exception as error:  # a template is a program: report any error in it with its line
        reason = str(error).rstrip(".") or type(error).__name__
        line = _template_line(error.__traceback__)
        raise UserError(f"The chat template refuses this conversation, at its line {line}: {reason}.") from error


def _within_limits(pieces: Iterable[str]) -> str:
    pieces_so_far, length = list[str](), 0
    for piece in pieces:
        pieces_so_far.append(piece)
        length += len(piece)
        if length > LARGEST:
            raise LimitError(f"it writes more than {LARGEST:,} characters")
    return "".join(pieces_so_far)


def _plain(message: Any, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f"Message {index} is {message!r}: each must be like {{'role': 'user', 'content': 'Hello'}}.")
    return {key: value for key, value in message.items() if value is not None}


def _template_line(trace: TracebackType | None) -> int:
    """Return the line of the template where an error happened. Jinja's stack frames have the template's line
    numbers."""
    line = 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def render_marked(
    template: str | None, messages: Messages, variables: Mapping[str, Any], marks: str, special: Iterable[str]
) -> str:
    """Render a whole conversation with `marks`, two characters, around each assistant answer.

    If the template has `{% generation %}`, that block is the answer. Otherwise the answer is the text that its message
    adds to the prompt, without white space after the special token that ends the turn. Raises `UserError` if the
    template has no such block and changes earlier turns when later turns follow.
    """
    ends = tuple(special)
    full_text = render(template, messages, False, {**variables, **dict(zip(TURN, marks, strict=True))})
    if marks[0] in full_text:
        return full_text
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            question_text = render(template, messages[:index], True, variables)
            answered = render(template, messages[: index + 1], False, variables)
            if not (full_text.startswith(answered) and answered.startswith(question_text)):
                raise UserError(
                    f"This chat template writes a conversation otherwise once message {index} has been answered, so "
                    "the words of the assistant are not known: mark them in it with {% generation %}."
                )
            turn = answered.rstrip()
            spans.append((len(question_text), len(turn if turn.endswith(ends) else answered)))
    for start, end in reversed(spans):
        full_text = f"{full_text[:start]}{marks[0]}{full_text[start:end]}{marks[1]}{full_text[end:]}"
    return full_text


def encode_turns(backend: tokenizers.Tokenizer, text: str, marks: str) -> tuple[list[int], list[bool]]:
    """Return the token ids of a text without its marks, and for each id whether it is between two marks.

    A token with at least one character inside counts, as in transformers' assistant masks.
    """
    pieces = re.split(f"[{re.escape(marks)}]", text)
    spans = [*pairwise(accumulate(map(len, pieces), initial=0))][1::2]
    encoding = backend.encode("".join(pieces), add_special_tokens=False)
    mask, turn = [], 0
    for start, end in encoding.offsets:
        start = min(start, end - 1)  # trimming white space may have left an empty token
        while turn < len(spans) and start >= spans[turn][1]:
            turn += 1
        mask.append(turn < len(spans) and end > spans[turn][0])
    return encoding.ids, mask

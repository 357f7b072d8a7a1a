"""Chat templates: messages are rendered to text in Jinja's sandbox, as in transformers. Also the loss mask of assistant
tokens.

The mask is exact for each token: markers in the rendered text show where each assistant turn begins and ends.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import tokenizers
from jinja2 import Template, TemplateError, meta, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser

from keifu.data.tokenizers.template_limits import LARGEST, LONGEST_SOURCE, LimitedEnvironment, LimitError, limited
from keifu.errors import UserError

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


def render(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
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
    given = {"tools": None, "documents": None, **variables}
    ready = compile_template(template)
    try:
        with limited():
            pieces = ready.generate(messages=plain, add_generation_prompt=add_generation_prompt, **given)
            return _within_limits(pieces)
    except Exception as error:  # a template is a program: report any error in it with its line
        reason = str(error).rstrip(".") or type(error).__name__
        line = _template_line(error.__traceback__)
        raise UserError(f"The chat template refuses this conversation, at its line {line}: {reason}.") from error


def _within_limits(pieces: Iterable[str]) -> str:
    written, length = list[str](), 0
    for piece in pieces:
        written.append(piece)
        length += len(piece)
        if length > LARGEST:
            raise LimitError(f"it writes more than {LARGEST:,} characters")
    return "".join(written)


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
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    marks: str,
    special: Iterable[str],
) -> str:
    """Render a whole conversation with `marks`, two characters, around each assistant answer.

    If the template has `{% generation %}`, that block is the answer. Otherwise the answer is the text that its message
    adds to the prompt, without white space after the special token that ends the turn. Raises `UserError` if the
    template has no such block and changes earlier turns when later turns follow.
    """
    ends = tuple(special)
    whole = render(template, messages, False, {**variables, **dict(zip(TURN, marks, strict=True))})
    if marks[0] in whole:
        return whole
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = render(template, messages[:index], True, variables)
            answered = render(template, messages[: index + 1], False, variables)
            if not (whole.startswith(answered) and answered.startswith(asked)):
                raise UserError(
                    f"This chat template writes a conversation otherwise once message {index} has been answered, so it "
                    "cannot be told which words are the assistant's: mark them in it with {% generation %}."
                )
            turn = answered.rstrip()
            spans.append((len(asked), len(turn if turn.endswith(ends) else answered)))
    for start, end in reversed(spans):
        whole = f"{whole[:start]}{marks[0]}{whole[start:end]}{marks[1]}{whole[end:]}"
    return whole


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

"""Chat templates: messages to one text, in Jinja's sandbox, as transformers renders them; knows no token ids."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import TracebackType
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from keifu.errors import UserError

# A plain template, for models that are to be taught to chat; the tokenizer needs <|im_start|> and <|im_end|>.
CHATML = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words, for training; it changes no text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter would escape the characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def compiled(template: str) -> Template:
    """The template made ready, once. One that is not Jinja is a `UserError` with the line."""
    extensions = ["jinja2.ext.loopcontrols", _GenerationTag]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        reason = str(error.message).rstrip(".")
        raise UserError(f"The chat template cannot be read, at its line {error.lineno}: {reason}.") from error


def render(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    """The text that the template makes of the messages.

    template: Jinja source; None is a `UserError` that says what can be done.
    messages: mappings with at least a "role"; entries that are None are left out, as templates expect.
    variables: what else the template may use: the special tokens by role, `tools`, `documents`, ...
    """
    if template is None:
        raise UserError(
            "This tokenizer has no chat template, so the model was probably not made to chat: give plain text to "
            "continue, or set one with tokenizer.with_chat_template(keifu.data.chat.CHATML)."
        )
    plain = [_plain(message, place) for place, message in enumerate(messages)]
    if not plain:
        raise UserError("There is no message to render: give at least one, like {'role': 'user', 'content': 'Hello'}.")
    given = {"tools": None, "documents": None, **variables}
    ready = compiled(template)
    try:
        return ready.render(messages=plain, add_generation_prompt=add_generation_prompt, **given)
    except Exception as error:  # a template is a program: whatever goes wrong in it is told with its line
        reason = str(error).rstrip(".") or type(error).__name__
        line = _template_line(error.__traceback__)
        raise UserError(f"The chat template refuses this conversation, at its line {line}: {reason}.") from error


def _plain(message: Any, place: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f"Message {place} is {message!r}: each must be like {{'role': 'user', 'content': 'Hello'}}.")
    return {key: value for key, value in message.items() if value is not None}


def _template_line(trace: TracebackType | None) -> int:
    """The line of the template that was running: Jinja gives its frames the template's own line numbers."""
    line = 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line

"""Arguments as FunctionGemma and Gemma 4 write them: objects whose keys have no quotes, and strings between marks.

The mark (`<escape>`, `<|"|>`) is read off the chat template.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keifu.serving.openai.constraints import MOST_CHARACTERS
from keifu.serving.tool_parsers.tagged import KEYS, TaggedCall

INTEGER, NUMBER = "/-?(0|[1-9][0-9]{0,15})/", "/-?(0|[1-9][0-9]{0,15})([.][0-9]{1,10})?/"
SCALAR = re.compile(r"(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null)(?=[,}\]])")
KEY = re.compile(r"([^:,{}\[\]]*):")
DEPTH = 50  # objects in objects


@dataclass(frozen=True)
class UnquotedObject:
    """Notation of an object with keys without quotes. mark: before and after each string."""

    mark: str

    @property
    def marks(self) -> str:
        """The mark, to find the special tokens in it."""
        return self.mark

    def rules(self, name: str, schema: Mapping[str, Any], literal: Callable[[str], str]) -> Iterator[str]:
        """Yield the rules of a grammar for arguments that follow a schema, the required ones first.

        Only types and enumerated strings are followed inside; see `Tagged.rules` for the arguments.
        """
        mark = literal(self.mark)
        lazy = "" if mark.startswith("<[") else "[lazy]"  # a special token cannot be in the text before it
        yield f"{name}_text: {mark} {name}_rest"
        yield f"{name}_rest{lazy}: /(.|\\n){{0,{MOST_CHARACTERS}}}/ {mark}"
        yield f'{name}_key: /[^:,{{}}\\[\\]\\n<>"]+/ ":"'
        yield f'{name}_list: "[" ({name}_any ("," {name}_any)*)? "]"'
        yield f'{name}_object: "{{" ({name}_key {name}_any ("," {name}_key {name}_any)*)? "}}"'
        words = '"true" | "false"'
        yield f'{name}_any: {name}_text | {NUMBER} | {words} | "null" | {name}_list | {name}_object'
        kinds = {"string": f"{name}_text", "integer": INTEGER, "number": NUMBER, "boolean": f"({words})"}
        kinds |= {"array": f"{name}_list", "object": f"{name}_object", "null": '"null"'}
        properties = schema.get("properties")
        if not properties:
            yield f"{name}: " + ('"{" "}"' if properties == {} else f"{name}_object")
            return
        required = [key for key in properties if key in (schema.get("required") or ())]
        optional = [key for key in properties if key not in required]

        def argument(key: str) -> str:
            value = properties[key] if isinstance(properties[key], Mapping) else {}
            kind = value.get("type")
            choices = value.get("enum", [value["const"]] if "const" in value else [])
            if choices and all(isinstance(choice, str) for choice in choices):
                return f"{literal(key + ':' + self.mark)} ({' | '.join(map(literal, choices))}) {mark}"
            if choices and all(isinstance(choice, int | None) for choice in choices):
                return f"{literal(key + ':')} ({' | '.join(literal(json.dumps(choice)) for choice in choices)})"
            return f"{literal(key + ':')} {kinds.get(kind, f'{name}_any') if isinstance(kind, str) else f'{name}_any'}"

        def after(keys: Sequence[str]) -> str:
            return " ".join(f'("," {argument(key)})?' for key in keys)

        if required:
            inside = ' "," '.join(map(argument, required)) + " " + after(optional)
        else:
            begun = [f"{argument(key)} {after(optional[index + 1 :])}" for index, key in enumerate(optional)]
            inside = f"({' | '.join(begun)})?"
        yield f'{name}: "{{" {inside} "}}"'

    def read(
        self, text: str, middle: str, closing: str, functions: Mapping[str, Mapping[str, Any]]
    ) -> TaggedCall | None:
        """Return the call at the start of a text, or None if its end has not come. See `Tagged.read`."""
        at = text.find(middle + "{")
        if at < 0:
            return None
        try:
            value, end = self._value(text, at + len(middle), DEPTH)
        except ValueError:
            return None
        return (
            TaggedCall(text[:at], json.dumps(value, ensure_ascii=False), end) if text.startswith(closing, end) else None
        )

    def _value(self, text: str, at: int, depth: int) -> tuple[Any, int]:
        """Return the value at an index and the index of its end. Raises `ValueError` if there is no whole value."""
        if depth == 0:
            raise ValueError("nested too deeply")
        if text.startswith(self.mark, at):
            end = text.index(self.mark, at + len(self.mark))
            return text[at + len(self.mark) : end], end + len(self.mark)
        if scalar := SCALAR.match(text, at):
            return json.loads(scalar[1]), scalar.end()
        if text[at : at + 1] not in ("{", "["):
            raise ValueError("no value")
        keyed, close = (True, "}") if text[at] == "{" else (False, "]")
        entries, at = list[tuple[str, Any]](), at + 1
        while not text.startswith(close, at):
            if entries:
                at = text.index(",", at, at + 1) + 1
            key = KEY.match(text, at) if keyed else None
            if keyed and key is None:
                raise ValueError("no key")
            value, at = self._value(text, key.end() if key else at, depth - 1)
            entries.append((key[1].strip().removeprefix(self.mark).removesuffix(self.mark) if key else "", value))
        return (dict(entries) if keyed else [value for _, value in entries]), at + 1


def marked(answer: str, names: Sequence[str]) -> tuple[UnquotedObject, re.Match[str], re.Match[str], str] | None:
    """Return the notation of rendered calls, the matches of the first and the last call, and the text between a name
    and its arguments; None if their arguments are in another notation."""
    first, second = KEYS
    form = r"{0}(.*?)\{{{1}:(\S+?){0}\2,{2}:\2{0}\2\}}"
    calls = [re.search(form.format(name, first, second), answer, re.DOTALL) for name in names]
    begin, end = calls[0], calls[-1]
    if begin is None or end is None or begin.groups() != end.groups() or begin[2] == '"':
        return None
    return UnquotedObject(begin[2]), begin, end, begin[1]

"""Arguments between tags, as Qwen3-Coder (`<parameter=KEY>`) and GLM (`<arg_key>`, `<arg_value>`) write them.

A string is written as it is, and any other value as JSON. The tags are read off the chat template.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from keifu.serving.openai.constraints import COMBINED, LAYOUT, MOST_CHARACTERS

KEYS = ("first_key", "second_key")
WORDS = {"True": True, "False": False, "None": None}  # some templates write Python's words


class TaggedCall(NamedTuple):
    """Name of a call, its arguments as JSON, and the number of characters that were read."""

    name: str
    arguments: str
    length: int


@dataclass(frozen=True)
class Tagged:
    """Notation of arguments: before KEY middle VALUE after, for each of them."""

    before: str
    middle: str
    after: str

    @property
    def marks(self) -> str:
        """All tags, to find the special tokens among them."""
        return "\n".join((self.before, self.middle, self.after))

    def rules(self, name: str, schema: Mapping[str, Any], literal: Callable[[str], str]) -> Iterator[str]:
        """Yield the rules of a grammar for arguments that follow a schema, in the schema's order.

        Args:
            name: of the first rule.
            schema: of the arguments, checked.
            literal: returns a text in the grammar's notation.
        """
        if {"$ref", *COMBINED} & schema.keys():
            yield f"{name}: ({literal(self.before)} {name}_key {name}_value)*"
            yield f"{name}_key[lazy]: /[^<>\\n]+/ {literal(self.middle)}"
            yield f"{name}_value[lazy]: /(.|\\n){{0,{MOST_CHARACTERS}}}/ {literal(self.after)}"
            return
        required, parts = schema.get("required") or (), []
        for index, (key, value) in enumerate(schema.get("properties", {}).items()):
            rule = f"{name}_{index}"
            parts.append(f"({literal(self.before + key + self.middle)} {rule}){'' if key in required else '?'}")
            if words := _strings(value):
                yield f"{rule}: ({' | '.join(map(literal, words))}) {literal(self.after)}"
            elif _is_string(value):
                most = value.get("maxLength", MOST_CHARACTERS)
                yield f"{rule}[lazy]: /(.|\\n){{{value.get('minLength', 0)},{most}}}/ {literal(self.after)}"
            else:
                shared = {part: schema[part] for part in ("$defs", "definitions") if part in schema}
                inner = {**value, **shared, "x-guidance": LAYOUT} if isinstance(value, Mapping) else {}
                yield f"{rule}: %json {json.dumps(inner)} {literal(self.after)}"
        yield f"{name}: {' '.join(parts) or json.dumps('')}"

    def read(
        self, text: str, middle: str, closing: str, functions: Mapping[str, Mapping[str, Any]]
    ) -> TaggedCall | None:
        """Return the call at the start of a text, or None if its end has not come.

        Args:
            text: begins with the name of the function.
            middle: text between the name and the arguments.
            closing: text after the arguments.
            functions: schemas of the arguments, by function.
        """
        ends = [at for part in (self.before, closing) if (at := text.find(middle + part)) >= 0]
        if not ends:
            return None
        name, at = text[: min(ends)], min(ends) + len(middle)
        properties, arguments = functions.get(name, {}).get("properties") or {}, dict[str, Any]()
        ending = re.compile(f"{re.escape(self.after)}(?={re.escape(self.before)}|{re.escape(closing)})")
        while not text.startswith(closing, at):
            if not text.startswith(self.before, at):
                return None
            key, tag, _ = text[at + len(self.before) :].partition(self.middle)
            start = at + len(self.before + key + tag)
            end = ending.search(text, start)
            if not tag or end is None:
                return None
            arguments[key] = _value(text[start : end.start()], properties.get(key))
            at = end.end()
        return TaggedCall(name, json.dumps(arguments, ensure_ascii=False), at)


def tagged(answer: str, names: Sequence[str]) -> tuple[Tagged, re.Match[str], re.Match[str], str] | None:
    """Return the notation of rendered calls, the matches of the first and the last call, and the text between a name
    and its arguments; None if their arguments are not tagged.

    The arguments of each call are those of `probe_arguments`.
    """
    first, second = KEYS
    calls = [re.search(rf"{name}(.*?){first}(.*?){name}(.*?){second}\2{name}", answer, re.DOTALL) for name in names]
    begin, end = calls[0], calls[-1]
    if begin is None or end is None or begin.groups() != end.groups() or '"' in begin[2]:
        return None
    shared = next(
        n for n in range(min(len(begin[1]), len(begin[3])), -1, -1) if begin[1].endswith(begin[3][len(begin[3]) - n :])
    )
    before, after = begin[3][len(begin[3]) - shared :], begin[3][: len(begin[3]) - shared]
    if not before or not after or not begin[2]:
        return None
    return Tagged(before, begin[2], after), begin, end, begin[1][: len(begin[1]) - shared]


def probe_arguments(name: str) -> dict[str, str]:
    """Return the arguments that show the tags of a template."""
    return dict.fromkeys(KEYS, name)


def _strings(schema: Any) -> list[str]:
    """Return the strings that are the only values of a schema."""
    words = schema.get("enum", [schema["const"]] if "const" in schema else []) if isinstance(schema, Mapping) else []
    return words if all(isinstance(word, str) and word for word in words) else []


def _is_string(schema: Any) -> bool:
    return isinstance(schema, Mapping) and (schema.get("type") == "string" or bool(_strings(schema)))


def _value(text: str, schema: Any) -> Any:
    """Return an argument: a string if the schema says so, or if it is not JSON."""
    if _is_string(schema):
        return text
    if text in WORDS:
        return WORDS[text]
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
        return value
    return text

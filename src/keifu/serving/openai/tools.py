"""Tools: the format of function calls in a chat template, a grammar for answers, and a parser.

The format is found by rendering a call of a nonexistent function with the template. If a model's template does not
support tools, the system message describes them, and the model calls them in the format of Hermes and Qwen.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

from llguidance import LLMatcher

from keifu.data.chat.thoughts import ThoughtSplitter, template_options, thought_tokens
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.chat import prompts
from keifu.inference.chat.citations import Citation
from keifu.inference.chat.prompts import ImagePrompt
from keifu.serving.openai.constraints import COMBINED, LAYOUT, Grammar, checked, schema_grammar
from keifu.serving.tool_parsers import harmony
from keifu.serving.tool_parsers.gemma import UnquotedObject, marked
from keifu.serving.tool_parsers.harmony import HarmonySplitter, speaks_harmony
from keifu.serving.tool_parsers.tagged import Tagged, probe_arguments, tagged

Messages = Sequence[Mapping[str, Any]]
JSON = json.JSONDecoder()
THOUGHTLESS = re.compile(r"^\s*<think>\s*</think>\s*")  # GLM writes empty thoughts before a call
PROBES = ("first_probe", "second_probe")
THOUGHT = re.compile(
    r"(<think>\s*(</think>\s*)?|<\|channel>thought\n(<channel\|>)?)$"
)  # some templates open a thought for the answer only
TOLD = """\
You can call functions. These are their descriptions, one a line:
{functions}
To call one, answer in exactly this form:
<tool_call>
{{"name": NAME, "arguments": ARGUMENTS}}
</tool_call>"""


@dataclass(frozen=True)
class ToolFormat:
    """Format of calls: opening NAME middle ARGUMENTS, then between NAME middle ARGUMENTS for each further call, then
    closing.

    between: None if the template only writes one call at a time. native: whether the template supports tools.
    notation: of the arguments; None: JSON. objects: whether the template takes arguments as objects, not as JSON text.
    marks: further tokens of the template that an answer may have.
    """

    opening: str
    middle: str
    between: str | None
    closing: str
    native: bool = True
    notation: Tagged | UnquotedObject | None = None
    objects: bool = True
    marks: tuple[str, ...] = ()

    def trigger(self, tokenizer: Tokenizer) -> str:
        """Return the start of the opening, which distinguishes calls from text: one token, or everything before the
        JSON."""
        added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
        tokens = [token for token in added if self.opening.startswith(token)]
        return max(tokens, key=len, default="") or re.split(r"[{\[]", self.opening)[0].rstrip() or self.opening

    def special(self, tokenizer: Tokenizer) -> dict[str, int]:
        """Return the special tokens in the format with their ids."""
        marks = self.notation.marks if self.notation else ""
        all_marks = "\n".join((self.opening, self.middle, self.between or "", self.closing, marks, *self.marks))
        return {word: token for token in tokenizer.special_ids if (word := _token(tokenizer, token)) in all_marks}


HERMES = ToolFormat(
    '<tool_call>\n{"name": "', '", "arguments": ', '}\n</tool_call>\n<tool_call>\n{"name": "', "}\n</tool_call>", False
)

HARMONY = ToolFormat(
    f"{harmony.CHANNEL}commentary to=functions.", f" {harmony.CONSTRAIN}json{harmony.MESSAGE}", None, "",
    marks=harmony.MARKS,
)  # fmt: skip


def _token(tokenizer: Tokenizer, number: int) -> str:
    return tokenizer.backend.id_to_token(number) or ""


@lru_cache(maxsize=16)
def tool_format(tokenizer: Tokenizer) -> ToolFormat:
    """Return the format of calls in the tokenizer's template; Hermes' format if it writes no calls, or in a notation
    that is not known."""
    if speaks_harmony(tokenizer):
        return HARMONY
    for find in (_json_format, _tagged_format, _marked_format):
        for count, objects in ((2, True), (1, True), (2, False), (1, False)):
            with suppress(UserError):
                if tool_format := find(tokenizer, PROBES[:count], objects):
                    return tool_format
    return HERMES


def _rendered(
    tokenizer: Tokenizer, names: Sequence[str], objects: bool, arguments: Callable[[str], dict[str, str]]
) -> str | None:
    """Return a turn of calls to these functions as the template renders it; None if it shows no functions."""
    question = [{"role": "user", "content": "x"}]
    calls = [_call(name, json.dumps(arguments(name)), "000000000") for name in names]  # Mistral needs nine digits
    results = [{"role": "tool", "name": c["function"]["name"], "tool_call_id": c["id"], "content": "y"} for c in calls]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    tools = [{"type": "function", "function": {"name": name, "description": "", "parameters": {}}} for name in names]
    prompt = THOUGHT.sub("", tokenizer.chat_text(question, tools=tools))
    turns = [*question, turn, *results]
    full_text = tokenizer.chat_text(with_objects(turns) if objects else turns, tools=tools)
    if names[0] not in prompt or not full_text.startswith(prompt):
        return None
    return THOUGHTLESS.sub("", full_text[len(prompt) :])


def _json_format(tokenizer: Tokenizer, names: Sequence[str], objects: bool) -> ToolFormat | None:
    """Return the format of calls whose arguments are JSON."""
    answer = _rendered(tokenizer, names, objects, lambda name: {"probe": name})
    if answer is None:
        return None
    matches = [re.search(rf'{name}(.*?)\{{\s*"probe":\s*"{name}"\s*\}}', answer, re.DOTALL) for name in names]
    first, last = matches[0], matches[-1]
    if first is None or last is None or first[1] != last[1]:
        return None
    closing = _until_stop(tokenizer, answer, last.end())
    between = answer[first.end() : last.start()] if len(names) > 1 else None
    if closing is None:
        return None
    return ToolFormat(answer[: first.start()], first[1], between, closing, objects=objects)


def _tagged_format(tokenizer: Tokenizer, names: Sequence[str], objects: bool) -> ToolFormat | None:
    """Return the format of calls whose arguments are between tags."""
    answer = _rendered(tokenizer, names, objects, probe_arguments)
    form = tagged(answer, names) if answer else None
    if answer is None or form is None:
        return None
    notation, first, last, middle = form
    closing, after = _until_stop(tokenizer, answer, last.end()), notation.after
    if not closing or not closing.startswith(after) or len(closing.rstrip()) == len(after):
        return None
    between = answer[first.end() + len(after) : last.start()] if len(names) > 1 else None
    closing = closing[len(after) :].rstrip()
    return ToolFormat(answer[: first.start()], middle, between, closing, notation=notation, objects=objects)


def _marked_format(tokenizer: Tokenizer, names: Sequence[str], objects: bool) -> ToolFormat | None:
    """Return the format of calls whose arguments are Gemma's objects."""
    answer = _rendered(tokenizer, names, objects, probe_arguments)
    form = marked(answer, names) if answer else None
    if answer is None or form is None:
        return None
    notation, first, last, middle = form
    closing = _until_stop(tokenizer, answer, last.end())
    between = answer[first.end() : last.start()] if len(names) > 1 else None
    if not closing:
        return None
    return ToolFormat(answer[: first.start()], middle, between, closing, notation=notation, objects=objects)


def _until_stop(tokenizer: Tokenizer, answer: str, start: int) -> str | None:
    """Return the text up to the first token that ends an answer; None if there is no such token."""
    ends = [at for end in tokenizer.stop_ids if (at := answer.find(_token(tokenizer, end), start)) >= 0]
    return answer[start : min(ends)] if ends else None


def _call(name: str, arguments: str, number: str) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def with_objects(messages: Messages) -> list[dict[str, Any]]:
    """Return the messages with the arguments of calls as objects, as templates expect."""

    def with_object(call: Any) -> dict[str, Any]:
        return call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}

    calls = [[with_object(call) for call in message.get("tool_calls") or ()] for message in messages]
    return [{**message, "tool_calls": own_calls or None} for message, own_calls in zip(messages, calls, strict=True)]


def render(
    tokenizer: Tokenizer, messages: Messages, functions: Sequence[Mapping[str, Any]], config: Any = None, **options: Any
) -> list[int] | ImagePrompt:
    """Encode a conversation in which these functions may be called, and may have been called.

    If the last message is the assistant's, the answer continues it. config: of the model; decides whether it reads
    pictures. options: of the chat template.
    """
    options = template_options(tokenizer, options)
    if len(messages) > 1 and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        if messages[-1].get("images"):
            raise UserError("The answer to be continued has a picture, and a model writes text alone: leave it out.")
        begun = render(tokenizer, messages[:-1], functions, config, **options)
        final_tokens = tokenizer.encode(messages[-1]["content"])
        if speaks_harmony(tokenizer):
            final_tokens = tokenizer.encode(harmony.marked_final(""), allow_special=True) + final_tokens
        return (
            begun._replace(tokens=[*begun.tokens, *final_tokens])
            if isinstance(begun, ImagePrompt)
            else begun + final_tokens
        )
    if not functions and not any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
        return prompts.render(tokenizer, messages, config, **options)
    if any(message.get("images") for message in messages):
        raise UserError("Pictures and tools cannot be in one conversation: leave out one of them.")
    form = tool_format(tokenizer)
    if form.native:
        tools = [{"type": "function", "function": {"parameters": {}, **function}} for function in functions]
        turns = with_objects(messages) if form.objects else messages
        if form is HARMONY:
            turns = [_with_thinking(message) for message in turns]
        return prompts.render(tokenizer, turns, config, tools=tools or None, **options)
    return prompts.render(tokenizer, _in_words(messages, functions), config, **options)


def _with_thinking(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a message with the thoughts before its calls under the name that gpt-oss's template reads."""
    thoughts = message.get("reasoning_content") if message.get("tool_calls") and not message.get("content") else None
    return {**message, "thinking": thoughts} if thoughts else message


def _in_words(messages: Messages, functions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert a conversation for a template without support for tools.

    The system message describes the functions. Calls become text of the assistant, and results become text of the
    user.
    """
    described = TOLD.format(functions="\n".join(json.dumps(function, ensure_ascii=False) for function in functions))
    turns: list[dict[str, Any]] = [{"role": "system", "content": described}] if functions else []
    for message in messages:
        role, text = message["role"], message.get("content") or ""
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        for call in message.get("tool_calls") or ():
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            text += ("\n" if text else "") + HERMES.opening + name + HERMES.middle + arguments + HERMES.closing
        if turns and role == turns[-1]["role"]:
            both = [turns.pop()["content"], text]
            text = "\n\n".join(reversed(both) if role == "system" else both)
        turns.append({"role": role, "content": text})
    return turns


@dataclass(frozen=True)
class ToolUse:
    """Functions that an answer may call. choice: "auto", "required", or the name of the function that must be
    called."""

    functions: Sequence[Mapping[str, Any]]
    choice: str = "auto"
    parallel: bool = True

    def grammar(self, tokenizer: Tokenizer, schema: dict[str, Any] | None) -> Grammar:
        """Return the grammar of an answer: calls; with "auto" alternatively text, which may have to follow a schema."""
        form = tool_format(tokenizer)
        special = form.special(tokenizer)

        def literal(text: str) -> str:
            parts = re.split(f"({'|'.join(map(re.escape, special)) or '(?!)'})", text)
            return " ".join(f"<[{special[part]}]>" if part in special else json.dumps(part) for part in parts if part)

        able = [function for function in self.functions if self.choice in ("auto", "required", function["name"])]
        calls = [f"{literal(function['name'] + form.middle)} a{index}" for index, function in enumerate(able)]
        further_calls = f"({literal(form.between)} call)*" if self.parallel and form.between else ""
        start = self._start(form, tokenizer, literal, schema)
        rules = [f"call: {' | '.join(calls)}", f"calls: call {further_calls} {literal(form.closing)}"]
        parameter_schemas = [tool.get("parameters") or {} for tool in able]
        empty = {"type": "object", "properties": {}}
        schemas = [part if {"$ref", *COMBINED} & part.keys() else {**empty, **part} for part in parameter_schemas]
        for index, parameters in enumerate(checked(schemas, "tools")):
            if form.notation:
                rules += form.notation.rules(f"a{index}", parameters, literal)
                continue
            rules.append(f"a{index}: %json {json.dumps(parameters | {'x-guidance': LAYOUT})}")
        field = "tools" if able else "response_format"
        return Grammar(LLMatcher.grammar_from_lark("\n".join([*start, *(rules if able else ())])), field)

    def _start(self, form: ToolFormat, tokenizer: Tokenizer, literal: Any, schema: Any) -> list[str]:
        if form is HARMONY:
            return self._in_channels(literal, schema)
        marks, any_text = thought_tokens(tokenizer), "TEXT: /(.|\\n)*/"
        thoughts = '({} "thought" TEXT {})? '.format(*(f"<[{mark}]>" for mark in marks.values())) if marks else ""
        if self.choice != "auto":
            return [f"start: {thoughts}{literal(form.opening)} calls", *([any_text] if marks else ())]
        if schema is not None:
            (narrow,) = checked([schema], "response_format")
            text = f"text: %json {json.dumps(narrow | {'x-guidance': LAYOUT})}"
            return [f"start: {thoughts}(text | {literal(form.opening)} calls)", text, *([any_text] if marks else ())]
        trigger = form.trigger(tokenizer)
        trigger_end = literal(form.opening[len(trigger) :])
        before = "lead: TEXT" if trigger in form.special(tokenizer) else "lead[lazy]: /(.|\\n)*/"
        return [f"start: {thoughts}(TEXT | lead {trigger_end} calls)", any_text, f"{before} {literal(trigger)}"]

    def _in_channels(self, literal: Any, schema: Any) -> list[str]:
        """Return the rules of an answer of gpt-oss: any thoughts and announcements, then the text or a call."""
        ends = [f"{literal(HARMONY.opening)} calls"] if self.functions else []
        content = "TEXT"
        if schema is not None:
            (narrow,) = checked([schema], "response_format")
            content = f"%json {json.dumps(narrow | {'x-guidance': LAYOUT})}"
        ends += [f"{literal(harmony.marked_final(''))} content"] if self.choice == "auto" else []
        before = f'{literal(harmony.CHANNEL)} ("analysis" | "commentary") {literal(harmony.MESSAGE)} TEXT'
        after = f'{literal(harmony.END + harmony.START)} "assistant"'
        return [
            f"start: message* ({' | '.join(ends)})", f"message: {before} {after}", f"content: {content}",
            "TEXT: /(.|\\n)*/",
        ]  # fmt: skip


def answer_grammar(
    tokenizer: Tokenizer, tools: ToolUse | None, schema: dict[str, Any] | None, in_channels: bool
) -> Grammar | None:
    """Return the grammar of an answer that may call tools or must follow a schema; None for any text."""
    if tools or (schema is not None and in_channels):
        return (tools or ToolUse(())).grammar(tokenizer, schema)
    return None if schema is None else schema_grammar(schema)


THOUGHTS = -2  # value of the field `call` for thoughts


class Delta(NamedTuple):
    """Next part of a streamed answer: text, the name of call number `call`, the next part of its arguments, or a
    citation, whose mark is the text. end: number of characters of the answer so far, with marks."""

    content: str = ""
    call: int = -1
    name: str = ""
    arguments: str = ""
    citation: Citation | None = None
    end: int = 0


@dataclass
class Reply:
    """Growing answer, split into thoughts, text and calls.

    form: None if nothing may be called. thought: thoughts in the text of the last push. reasoning: all thoughts.
    finish_reason: the API's reason why the answer ended. functions: schemas of the arguments, by function.
    """

    form: ToolFormat | None = None
    trigger: str = ""
    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    splitter: ThoughtSplitter = field(default_factory=ThoughtSplitter)
    thought: str = ""
    reasoning: str = ""
    reasoning_tokens: int = 0
    finish_reason: str = "length"
    functions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    _pending_text: str = ""
    _opened: str = ""
    _state: str = "text"

    @property
    def unfinished(self) -> bool:
        """Whether the arguments of the last call are incomplete, for example after a stop string."""
        return self._state == "arguments"

    def push(self, text: str, last: bool = False) -> list[Delta]:
        """Add the text of a token. Return the parts that are now certain."""
        begun, (self.thought, text) = self.splitter.part, self.splitter(text)
        if last:
            self.thought, text = map("".join, zip((self.thought, text), self.splitter.end(), strict=True))
        self.reasoning += self.thought
        self.reasoning_tokens += "thoughts" in (begun, self.splitter.part)
        if self.form is None:
            self.text += text
            return [Delta(text)] if text else []
        self._pending_text += text
        steps = iter(partial(self._next, self.form, last), None)
        deltas = [step for step in steps if any((step.content, step.name, step.arguments))]
        if last and self._state == "name":  # a call that has not come to its arguments is text
            deltas.append(Delta(self._opened + self._cut(len(self._pending_text), "after").content))
        self.text += "".join(delta.content for delta in deltas)
        return deltas

    def _next(self, form: ToolFormat, last: bool) -> Delta | None:
        """Return the next part; None if more text is needed."""
        if self._state == "text":
            return self._plain(form, last)
        if form.notation and self._state == "name":
            return self._tagged(form, form.notation)
        if self._state == "whole":
            self._state = "after"
            return Delta(call=len(self.calls) - 1, arguments=self.calls[-1]["function"]["arguments"])
        if self._state == "name":
            name, middle, _ = self._pending_text.partition(form.middle)
            if not middle:
                return None
            self._cut(len(name + middle), "arguments")
            self.calls.append(_call(name, "", f"{secrets.randbits(36):09x}"))
            return Delta(call=len(self.calls) - 1, name=name)
        if self._state == "arguments":
            return self._arguments()
        between = form.between or form.closing
        if self._state == "after" and form.between and self._pending_text.startswith(between):
            self._opened = self._cut(len(between), "name").content
            return Delta()
        return None

    def _tagged(self, form: ToolFormat, notation: Tagged | UnquotedObject) -> Delta | None:
        """Return the name of a call with tagged arguments, once the whole call has come. Its arguments come next."""
        ends = [end for end in (form.closing, form.between) if end]
        call = next(
            filter(None, (notation.read(self._pending_text, form.middle, end, self.functions) for end in ends)), None
        )
        if call is None:
            return None
        self._cut(call.length, "whole")
        self.calls.append(_call(call.name, call.arguments, f"{secrets.randbits(36):09x}"))
        return Delta(call=len(self.calls) - 1, name=call.name)

    def _plain(self, form: ToolFormat, last: bool) -> Delta | None:
        start = self._pending_text.find(self.trigger)
        if start >= 0:
            if (
                not last
                and form.opening.startswith(self._pending_text[start:])
                and self._pending_text[start:] != form.opening
            ):
                return None if not start else self._cut(start, "text")
            if not self._pending_text.startswith(form.opening, start):  # the trigger was text
                return self._cut(start + len(self.trigger), "text")
            delta = Delta(self._pending_text[:start])
            self._opened = self._cut(start + len(form.opening), "name").content[start:]
            return delta
        most = min(len(self._pending_text), len(self.trigger) - 1)
        ends = (n for n in range(most, 0, -1) if self._pending_text.endswith(self.trigger[:n]))
        held_length = 0 if last else next(ends, 0)  # it may become the trigger
        return (
            self._cut(len(self._pending_text) - held_length, "text") if len(self._pending_text) > held_length else None
        )

    def _arguments(self) -> Delta | None:
        """Return the new part of the arguments. They end where their JSON ends."""
        if not self._pending_text:
            return None
        call, length, state = self.calls[-1]["function"], len(self._pending_text), "arguments"
        if "}" in self._pending_text:
            with suppress(ValueError, RecursionError):  # more is needed, or it is nested too deeply to be read
                _, end = JSON.raw_decode(call["arguments"] + self._pending_text)
                length, state = end - len(call["arguments"]), "after"
        part = self._cut(length, state).content
        call["arguments"] += part
        return Delta(call=len(self.calls) - 1, arguments=part)

    def _cut(self, length: int, state: str) -> Delta:
        """Remove `length` characters from the waiting text and return them as a delta; in the state text, unchanged."""
        text, self._pending_text, self._state = self._pending_text[:length], self._pending_text[length:], state
        return Delta(text)


@dataclass
class HarmonyReply(Reply):
    """Growing answer of gpt-oss, split by its channels. begun: the message that the prompt begins."""

    begun: str = ""

    def __post_init__(self) -> None:
        self._channels = HarmonySplitter(self.functions)
        for _ in self._channels(self.begun):
            pass  # the client has it

    @property
    def unfinished(self) -> bool:
        """Whether the arguments of the last call are incomplete, for example after a stop string."""
        if self.calls:
            with suppress(ValueError, RecursionError):
                json.loads(self.calls[-1]["function"]["arguments"])
                return False
        return bool(self.calls)

    def push(self, text: str, last: bool = False) -> list[Delta]:
        """Add the text of a token. Return the parts that are now certain."""
        self.thought, deltas, begun = "", [], self._channels.kind
        for part in self._channels(text, last):
            if part.kind == "thoughts":
                self.thought += part.text
            elif part.kind == "text":
                self.text += part.text
                deltas.append(Delta(part.text))
            elif part.name:
                self.calls.append(_call(part.name, "", f"{secrets.randbits(36):09x}"))
                deltas.append(Delta(call=len(self.calls) - 1, name=part.name))
            else:
                self.calls[-1]["function"]["arguments"] += part.text
                deltas.append(Delta(call=len(self.calls) - 1, arguments=part.text))
        self.reasoning += self.thought
        self.reasoning_tokens += "thoughts" in (begun, self._channels.kind)
        return deltas

"""Tools: whatever a model with random weights answers, its calls are those that the schemas allow, in the form of its
template, whole and streamed, by chat completions and by responses.
"""

import json
from collections.abc import Iterator
from itertools import product
from typing import Any

import openai
import pytest
import torch
from quick import quick
from serving_toys import SIZE, running, sharp
from tool_toys import FORMS, HEAD, TAGGED, TAIL, TURN, tokenizer_of

import keifu
from keifu.models import llama
from keifu.serving.app import Access
from keifu.serving.openai.tools import HERMES, Reply, ToolUse, render, tool_format
from keifu.serving.worker import Limits

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["東京", 'a "quoted\\" } city', "Paris"]}, "days": {"enum": [1, 10]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
CLOCK = {"name": "clock"}
TOOLS: Any = [{"type": "function", "function": each} for each in (WEATHER, CLOCK)]
ASK: Any = {"messages": [{"role": "user", "content": "The weather?"}], "tools": TOOLS, "max_tokens": 300}


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a server over a model of each form, and over one without tools, by name."""
    place = tmp_path_factory.mktemp("tooled")
    torch.manual_seed(2)
    size = SIZE | {"vocab_size": 263, "context_length": 2048}
    model = sharp(llama.build(llama.Config(**size, n_heads=4, head_dim=6, n_kv_heads=2)))
    for form in (*FORMS, None):
        keifu.save(model, tokenizer_of(form), place / str(form))
    with running([str(place / str(form)) for form in (*FORMS, None)], Limits(), Access()) as found:
        found.folder = place
        yield found


def name_of(tooled: Any, form: str | None) -> str:
    return str(tooled.folder / str(form))


def check_call(call: Any) -> None:
    assert call.function.name in ("get_weather", "clock") and call.id
    arguments = json.loads(call.function.arguments)
    if call.function.name == "clock":
        assert arguments == {}
    else:
        assert arguments["city"] in WEATHER["parameters"]["properties"]["city"]["enum"] and arguments["days"] in (1, 10)


CHOICES = ["required", {"type": "function", "function": {"name": "get_weather"}}]


@pytest.mark.parametrize(("form", "choice"), quick(product([*FORMS, None], CHOICES)))
def test_a_call_that_is_required_is_made_and_valid(tooled: Any, form: str | None, choice: Any) -> None:
    ask = {"model": name_of(tooled, form), **ASK, "tool_choice": choice, "n": 3, "temperature": 1.3, "seed": 4}
    found = tooled.openai.chat.completions.create(**ask, parallel_tool_calls=False)
    for place in found.choices:
        assert place.finish_reason == "tool_calls" and place.message.content is None
        assert len(place.message.tool_calls) == 1
        check_call(place.message.tool_calls[0])
        if choice != "required":
            assert place.message.tool_calls[0].function.name == "get_weather"


@pytest.mark.parametrize("form", [*FORMS, None])
def test_a_stream_makes_the_same_calls(tooled: Any, form: str | None) -> None:
    ask = {"model": name_of(tooled, form), **ASK, "tool_choice": "required", "temperature": 1, "seed": 6}
    whole = tooled.openai.chat.completions.create(**ask).choices[0].message.tool_calls
    found: list[dict[str, str]] = []
    for chunk in tooled.openai.chat.completions.create(**ask, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            if delta.id:
                assert delta.index == len(found) and delta.function.arguments == ""
                found.append({"name": delta.function.name, "arguments": ""})
            else:
                found[delta.index]["arguments"] += delta.function.arguments
    assert found == [{"name": call.function.name, "arguments": call.function.arguments} for call in whole]
    assert chunk.choices[0].finish_reason in ("tool_calls", "length")


@pytest.mark.parametrize("form", [*FORMS, None])
def test_an_answer_that_may_call_is_text_or_calls(tooled: Any, form: str | None) -> None:
    name = name_of(tooled, form)
    ask = {"model": name, **ASK, "temperature": 1, "max_tokens": 60, "seed": 1}
    free = tooled.openai.chat.completions.create(**ask, tool_choice="auto").choices[0]
    assert free.message.tool_calls is None and free.finish_reason in ("stop", "length")
    none = tooled.openai.chat.completions.create(**ask, tool_choice="none").choices[0].message
    assert none.tool_calls is None and none.content != free.message.content  # it was told of no tools


def written(text: str, form: str | None, step: int) -> tuple[str, list[tuple[str, str]]]:
    """Return the content and calls that the parser reads from an answer that comes `step` characters at a time."""
    found = tool_format(tokenizer_of(form))
    reply = Reply(found, found.trigger(tokenizer_of(form)))
    parts = [delta for at in range(0, len(text), step) for delta in reply.push(text[at : at + step])]
    parts += reply.push("", last=True)
    assert "".join(part.content for part in parts) == reply.text
    for place, call in enumerate(reply.calls):
        assert "".join(part.arguments for part in parts if part.call == place) == call["function"]["arguments"]
    return reply.text, [(call["function"]["name"], call["function"]["arguments"]) for call in reply.calls]


ARGUMENTS = '{"city": "a \\"quoted\\\\\\" } {[", "days": [1, {"x": "]"}]}'
ANSWERS = {
    "tagged": 'Let us <tool see: <tool_call>\n{{"name": "f", "arguments": {0}}}\n</tool_call>\n'
    '<tool_call>\n{{"name": "g", "arguments": {{}}}}\n</tool_call>',
    "listed": 'Let us <tool see: [CALLS] [{{"name": "f", "arguments": {0}, "id": "000000000"}}, '
    '{{"name": "g", "arguments": {{}}, "id": "100000000"}}]',
    "outside": "Let us <tool see: [CALLS]f[ARGS]{0}[CALLS]g[ARGS]{{}}",
}
ANSWERS["None"] = ANSWERS["tagged"]


@pytest.mark.parametrize("form", ["tagged", "outside", None])
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_text_before_calls_and_several_calls_are_told_apart(form: str | None, step: int) -> None:
    text, calls = written(ANSWERS[str(form)].format(ARGUMENTS), form, step)
    assert text == "Let us <tool see: " and calls == [("f", ARGUMENTS), ("g", "{}")]


@pytest.mark.parametrize("thought", ["<think>\n", "<think>\n</think>\n\n", "<|channel>thought\n<channel|>"])
def test_a_thought_that_the_template_begins_hides_no_form(thought: str) -> None:
    opened = TAIL.replace("assistant\n{% endif", f"assistant\n{thought}{{% endif")
    thinking = tokenizer_of("tagged").with_chat_template(HEAD + TURN + TAGGED + opened)
    assert thinking.chat_text([{"role": "user", "content": "x"}]).endswith(thought)
    assert tool_format(thinking) == tool_format(tokenizer_of("tagged"))


def test_calls_with_ids_and_calls_without_a_mark() -> None:
    form = tool_format(tokenizer_of("listed"))
    assert form.trigger(tokenizer_of("listed")) == "[CALLS]" and form.between and '"id": ' in form.between
    text, calls = written('{"name": "f", "parameters": {"x": 1}}', "bare", 2)
    assert not text and calls == [("f", '{"x": 1}')]
    assert written('{"nam', "bare", 1) == ('{"nam', [])
    assert written("<tool_call", None, 4) == ("<tool_call", [])


@pytest.mark.parametrize("form", [*FORMS, None])
def test_what_the_template_writes_is_what_the_grammar_allows(form: str | None) -> None:
    """A turn of calls, rendered by the template, is accepted token by token; one more function is not."""
    from keifu.serving.openai.constraints import constraints

    tokenizer = tokenizer_of(form)
    call = {"id": "000000000", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    asked = [{"role": "user", "content": "x"}]
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    prompt = render(tokenizer, asked, [CLOCK])
    whole = render(tokenizer, [*asked, turn, {"role": "user", "content": "y"}], [CLOCK])
    assert whole[: len(prompt)] == prompt
    for name, taken in (("clock", True), ("colck", False)):
        held = constraints(ToolUse([{"name": name}]).grammar(tokenizer, None), tokenizer, tokenizer.vocab_size)()
        followed = []
        for token in whole[len(prompt) :]:
            followed.append(bool(held.allowed()[token]))
            if not followed[-1] or token in tokenizer.stop_ids:
                break
            held.accept(token)
        assert all(followed) == taken


def test_a_template_without_tools_is_told_of_them_and_of_results() -> None:
    tokenizer = tokenizer_of(None)
    assert tool_format(tokenizer) == HERMES
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
        {"role": "tool", "content": "one", "tool_call_id": "2"},
    ]
    text = tokenizer.decode(render(tokenizer, messages, [CLOCK]), skip_special=False)
    assert text.count("<|im_start|>system") == 1 and text.index("Be brief.") < text.index('{"name": "clock"}')
    assert '<tool_call>\n{"name": "clock", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text
    assert text.count("<|im_start|>user") == 2 and "one\n</tool_response>" in text


@pytest.mark.parametrize("form", [*FORMS, None])
def test_results_go_back_to_the_model(tooled: Any, form: str | None) -> None:
    name = name_of(tooled, form)
    tokenizer = keifu.load(name)[1]
    ask = {"model": name, **ASK, "max_tokens": 5}
    first = tooled.openai.chat.completions.create(**ask, tool_choice="required").choices[0].message
    first = first.model_dump(exclude_none=True)
    first["tool_calls"] = first["tool_calls"][:1] if first.get("tool_calls") else []
    call = {"id": "123456789", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    history = [*ASK["messages"], {"role": "assistant", "content": None, "tool_calls": [call]}]
    history.append({"role": "tool", "tool_call_id": "123456789", "content": "noon"})
    found = tooled.openai.chat.completions.create(**{**ask, "messages": history})
    plain = [{key: value or "" for key, value in each.items()} for each in history]
    assert found.usage.prompt_tokens == len(render(tokenizer, plain, [WEATHER, CLOCK]))


def test_a_schema_or_a_call(tooled: Any) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "green"]}}}
    ask = {"model": name_of(tooled, "tagged"), **ASK, "response_format": form, "n": 6, "temperature": 2, "seed": 1}
    for choice in tooled.openai.chat.completions.create(**ask).choices:
        if choice.message.tool_calls:
            check_call(choice.message.tool_calls[0])
        else:
            assert choice.message.content in ('"red"', '"green"')


FLAT: Any = [{"type": "function", **each} for each in (WEATHER, CLOCK)]


def test_responses_call_and_go_on(tooled: Any) -> None:
    client, name = tooled.openai, name_of(tooled, "tagged")
    ask: Any = {"model": name, "tools": FLAT, "max_output_tokens": 300, "temperature": 1}
    named = {"type": "function", "name": "get_weather"}
    first = client.responses.create(input="The weather?", tool_choice=named, **ask)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert call.name == "get_weather" and json.loads(call.arguments)["days"] in (1, 10)
    assert first.status == "completed" and first.output_text == ""
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    ask |= {"temperature": 0, "max_output_tokens": 6}
    second = client.responses.create(input=[result], previous_response_id=first.id, **ask)
    whole = [{"role": "user", "content": "The weather?"}, call.model_dump(exclude_none=True), result]
    assert client.responses.create(input=whole, **ask).output_text == second.output_text


def test_a_call_that_a_stop_string_tears_is_not_told_as_one(tooled: Any) -> None:
    ask: Any = {"model": name_of(tooled, "tagged"), "temperature": 1, "tool_choice": "required"}
    stop: Any = {"stop": ['"city'], "seed": 4, "max_tokens": 300}
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    found = tooled.openai.chat.completions.create(**ask | ASK | stop | {"tool_choice": named}).choices[0]
    assert found.message.tool_calls[0].function.arguments == "{" and found.finish_reason == "stop"
    del stop["max_tokens"]
    flat = {"type": "function", "name": "get_weather"}
    first = tooled.openai.responses.create(input="x", **ask | {"tools": FLAT, "tool_choice": flat}, extra_body=stop)
    assert first.output[0].arguments == "{" and first.output[0].status == "incomplete"
    ask = {"model": ask["model"], "max_output_tokens": 3, "previous_response_id": first.id}
    assert tooled.openai.responses.create(input="Go on.", **ask).output_text is not None


def test_a_stream_of_responses_makes_the_same_calls(tooled: Any) -> None:
    ask: Any = {"model": name_of(tooled, "outside"), "tools": FLAT, "max_output_tokens": 300, "tool_choice": "required"}
    ask |= {"temperature": 1, "extra_body": {"seed": 3}}
    whole = tooled.openai.responses.create(input="x", **ask)
    events = list(tooled.openai.responses.create(input="x", stream=True, **ask))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    arguments: dict[int, str] = {}
    for event in events:
        if event.type == "response.function_call_arguments.delta":
            arguments[event.output_index] = arguments.get(event.output_index, "") + event.delta
    calls = [item for item in whole.output if item.type == "function_call"]
    assert calls and [item.arguments for item in calls] == list(arguments.values())
    last = [item for item in events[-1].response.output if item.type == "function_call"]
    assert [(item.name, item.arguments) for item in last] == [(item.name, item.arguments) for item in calls]


BROKEN = {"id": "1", "function": {"name": "f", "arguments": "x"}}


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"tools": [{"type": "web"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"nam": "a"}}]}, "Did you mean 'name'?"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "two functions of one name"),
        ({"tool_choice": {"type": "function", "function": {"name": "clokc"}}}, "Did you mean 'clock'?"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "an object"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, "cannot be followed"),
        ({"messages": [{"role": "user", "tool_calls": []}]}, "needs content"),
        ({"messages": [{"role": "assistant", "tool_calls": [BROKEN]}]}, "it must be a JSON object"),
    ],
)
def test_wrong_tools_are_refused_by_name(tooled: Any, field: dict[str, Any], words: str) -> None:
    found = tooled.post("/v1/chat/completions", {"model": name_of(tooled, "tagged"), **ASK, **field})
    assert found.status_code == 400 and words in found.json()["error"]["message"], found.text


def test_the_clients_own_parsing_of_tools(tooled: Any) -> None:
    from pydantic import BaseModel

    class Point(BaseModel):
        axis: bool

    tool = openai.pydantic_function_tool(Point)
    ask = {"model": name_of(tooled, "listed"), "messages": ASK["messages"], "tools": [tool], "tool_choice": "required"}
    found = tooled.openai.chat.completions.parse(**ask, parallel_tool_calls=False, max_tokens=200)
    assert found.choices[0].message.tool_calls[0].function.parsed_arguments.axis in (True, False)


def test_some_of_the_tools_may_be_allowed(tooled: Any) -> None:
    name = name_of(tooled, "tagged")
    only = {"type": "function", "function": {"name": "clock"}}
    choice: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [only]}}
    ask: dict[str, Any] = {"model": name, **ASK, "temperature": 1, "max_tokens": 200}
    for seed in range(3):
        found = tooled.openai.chat.completions.create(**ask, seed=seed, tool_choice=choice).choices[0].message
        assert [call.function.name for call in found.tool_calls] == ["clock"]
    flat: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "clock"}]}
    asked: Any = {"model": name, "input": "x", "tools": FLAT, "temperature": 1, "max_output_tokens": 200}
    response = tooled.openai.responses.create(**asked, tool_choice=flat)
    assert [item.name for item in response.output] == ["clock"] and response.parallel_tool_calls is False
    flat["tools"][0]["name"] = "colck"
    with pytest.raises(openai.BadRequestError, match="Did you mean 'clock'"):
        tooled.openai.responses.create(**asked, tool_choice=flat)

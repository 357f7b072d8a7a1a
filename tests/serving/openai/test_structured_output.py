"""Answers held to a schema: whatever a model with random weights writes is what the schema allows, and ends."""

import json
from typing import Any, Literal

import httpx
import openai
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import BaseModel

import keifu
from keifu.serving.openai.constraints import schema_grammar

MESSAGES = [{"role": "user", "content": "Invent a person."}]


class Person(BaseModel):
    name: Literal["Ada", "Grace", "京子"]
    ages: list[Literal[1, 20, 300]]
    married: bool


SCHEMA = Person.model_json_schema() | {"additionalProperties": False}
SCHEMA["properties"]["ages"] |= {"minItems": 1, "maxItems": 3}


def form(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_each_answer_follows_the_schema(served: Any, chat: str, temperature: float) -> None:
    found = served.openai.chat.completions.create(
        model=chat,
        messages=MESSAGES,
        temperature=temperature,
        n=4,
        seed=1,
        max_tokens=200,
        response_format=form(SCHEMA),
    )
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        person = Person.model_validate_json(choice.message.content)
        assert 1 <= len(person.ages) <= 3


def test_the_clients_own_parsing_works(served: Any, chat: str) -> None:
    bias = {keifu.load(chat)[1].encode("]")[0]: 1e4}
    ask: dict[str, Any] = {"model": chat, "messages": MESSAGES, "max_tokens": 400, "logit_bias": bias}
    found = served.openai.chat.completions.parse(**ask, response_format=Person)
    assert found.choices[0].message.parsed.name in ("Ada", "Grace", "京子")


def test_constrained_and_free_requests_side_by_side(served: Any, chat: str) -> None:
    ask: dict[str, Any] = {"model": chat, "messages": MESSAGES, "temperature": 1, "seed": 4, "max_tokens": 30}
    alone = served.openai.chat.completions.create(**ask).choices[0].message.content
    held = served.openai.chat.completions.create(**ask, response_format=form({"enum": ["x"]}), logprobs=True)
    assert held.choices[0].message.content == '"x"'
    assert all(token.logprob < 0 for token in held.choices[0].logprobs.content)
    assert served.openai.chat.completions.create(**ask).choices[0].message.content == alone


def test_any_object(served: Any, chat: str) -> None:
    bias = {keifu.load(chat)[1].encode("}")[0]: 1e4}
    found = served.openai.chat.completions.create(
        model=chat, messages=MESSAGES, max_tokens=400, response_format={"type": "json_object"}, logit_bias=bias
    )
    assert isinstance(json.loads(found.choices[0].message.content), dict)


def deep(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        found = {"type": "array", "items": found}
    return found


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        (deep(200), "recursion limit exceeded"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(served: Any, chat: str, schema: Any, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match="The schema cannot be followed") as error:
        served.openai.chat.completions.create(model=chat, messages=MESSAGES, response_format=form(schema))
    assert words in error.value.message and error.value.param == "response_format"


def test_a_form_without_its_schema_is_refused(served: Any, chat: str) -> None:
    with pytest.raises(openai.BadRequestError, match="json_schema belongs to the type json_schema"):
        served.openai.chat.completions.create(model=chat, messages=MESSAGES, response_format={"type": "json_schema"})


def accepts(schema: Any, text: str) -> bool:
    """Return whether an answer that follows the schema may be this text."""
    matcher = LLMatcher(LLTokenizer("byte"), schema_grammar(schema).source)
    return matcher.try_consume_tokens([*text.encode()]) == len(text.encode()) and matcher.is_accepting()


WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
PART = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OTHER = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (WEATHER, '{"city": "x", "days": 1}', '{"city": "x", "unit": "C"}'),
        ({**WEATHER, "additionalProperties": True}, '{"city": "x", "unit": "C"}', '{"city": 1}'),
        ({**WEATHER, "required": ["else"]}, '{"else": 3}', "[]"),  # open, for otherwise nothing would satisfy it
        ({"$ref": "#/$defs/w", "$defs": {"w": WEATHER}}, '{"days": 1}', '{"unit": 1}'),
        ({"anyOf": [WEATHER, {"type": "null"}]}, "null", '{"unit": 1}'),
        ({"allOf": [PART, OTHER]}, '{"a": 1, "b": 2}', '{"a": 1}'),
        ({"allOf": [{"$ref": "#/$defs/p"}, OTHER], "$defs": {"p": PART}}, '{"a": 1, "b": 2}', '{"b": 1}'),
        ({"properties": {"o": {"type": "object"}}}, '{"o": {"any": "thing"}}', '{"p": 1}'),
        ({"type": "integer"}, "-" + "9" * 16, "1" * 17),
        ({"type": "integer", "minimum": 0}, "9" * 16, "1" * 17),
        ({"type": "integer", "minimum": 10**17}, "1" * 18, "1"),
        ({"type": "number"}, "0.3333333333", "0." + "3" * 11),
        ({"type": "number", "maximum": 1, "exclusiveMinimum": 0}, "0.5", "0." + "3" * 11),
        ({"type": ["string", "null"]}, '"' + "é" * 2000 + '"', '"' + "é" * 2001 + '"'),
        ({"type": "string", "maxLength": 3000}, '"' + "x" * 3000 + '"', '"' + "x" * 3001 + '"'),
        ({"type": "string", "minLength": 2500}, '"' + "x" * 2500 + '"', '"' + "x" * 2501 + '"'),
        (
            {"type": "array", "items": {"type": "null"}},
            f"[{', '.join(['null'] * 1000)}]",
            f"[{', '.join(['null'] * 1001)}]",
        ),
        ({"type": "array", "minItems": 1070}, f"[{', '.join(['1'] * 1070)}]", f"[{', '.join(['1'] * 1071)}]"),
        ({"type": "array", "maxItems": 90}, f"[{', '.join(['1'] * 90)}]", f"[{', '.join(['1'] * 91)}]"),
        ({"enum": [10**18]}, str(10**18), "1"),
    ],
)
def test_answers_are_narrower_than_the_schema_where_they_would_not_end(schema: Any, good: str, bad: str) -> None:
    assert accepts(schema, good)
    assert not accepts(schema, bad)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"enum": [10**20]}, "the number 1e+20, of more than 64 bits"),
        ({"type": "integer", "maximum": 2**64}, "of more than 64 bits"),
        ({"type": "integer", "minimum": -(10**400)}, "the number beyond 1e300, of more than 64 bits"),
        ({"enum": ["x" * 300_000]}, "bytes, of at most 262,144"),
    ],
)
@pytest.mark.parametrize("form_of", ["response_format", "tools"])
def test_impossible_values_in_a_schema_are_refused(
    served: Any, chat: str, schema: Any, words: str, form_of: str
) -> None:
    body: dict[str, Any] = {"model": chat, "messages": MESSAGES, "max_tokens": 5}
    if form_of == "tools":
        parameters = {"type": "object", "properties": {"x": schema}}
        body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    else:
        body["response_format"] = form(schema)
    found = served.post("/v1/chat/completions", body)
    error = found.json()["error"]
    assert found.status_code == 400 and words in error["message"], error
    assert error["param"] == form_of and error["code"] == "invalid_schema"


@pytest.mark.parametrize(
    "text",
    ['{"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}', '{"\\ud800": 1}'],
)
@pytest.mark.parametrize("schema", ['{"enum": ["\\ud800"]}', '{"properties": {"\\udfff": {}}}', '{"const": 1e400}'])
def test_half_characters_anywhere_are_refused(served: Any, chat: str, text: str, schema: str) -> None:
    body = json.dumps({"model": chat, "messages": MESSAGES})[:-1] + ", " + text.replace("SCHEMA", schema)[1:]
    headers = {"content-type": "application/json"}
    found = httpx.post(f"{served.url}/v1/chat/completions", content=body.encode(), headers=headers)
    assert found.status_code == 400 and found.json()["error"]["type"] == "invalid_request_error", found.text

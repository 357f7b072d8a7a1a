"""Answers held to a schema: whatever a model with random weights writes is what the schema allows, and ends."""

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

import keifu

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

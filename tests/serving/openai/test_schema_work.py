"""The work of a schema is limited, is done once per request, and ends when the client leaves."""

import json
import socket
import threading
from typing import Any

import pytest
from serving_toys import WAIT, until

from keifu.serving.openai import constraints, generation, tools

MESSAGES = [{"role": "user", "content": "Invent a person."}]
NAMES = {f"p{number}": {"type": "string"} for number in range(2000)}
FORMS = ("response_format", "tools")


def body(chat: str, schema: Any, form_of: str = "response_format", **fields: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "form", "schema": schema}}
    parameters = {"type": "object", "properties": {"x": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    asked = {"response_format": form} if form_of == "response_format" else {"tools": tools}
    return {"model": chat, "messages": MESSAGES, "max_tokens": 5, **asked, **fields}


@pytest.mark.parametrize("form_of", FORMS)
@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"allOf": {"type": "string"}}, 'allOf is {"type": "string"}: it must be a list of schemas'),
        ({"type": [["string"]]}, 'type is [["string"]]: it must be a list of names'),
        ({"type": {"a": 1}}, "type is"),
        ({"properties": {"a": {}}, "required": [["a"]]}, "required is"),
        ({"properties": ["a"]}, "properties is"),
        ({"items": "x"}, "which must be a schema"),
        ({"type": "object", "properties": NAMES}, "2,000 properties, of at most 1,000"),
        ({"prefixItems": [{"enum": [1]}] * 6000}, "parts, of at most 5,000"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_schema_of_a_wrong_form_or_with_too_many_parts_is_refused(
    served: Any, chat: str, schema: Any, words: str, form_of: str
) -> None:
    found = served.post("/v1/chat/completions", body(chat, schema, form_of))
    error = found.json()["error"]
    assert found.status_code == 400 and words in error["message"], error
    assert error["param"] == form_of and error["code"] == "invalid_schema"


def test_the_tools_of_a_request_are_limited_together(served: Any, chat: str) -> None:
    parameters = {"type": "object", "properties": dict(list(NAMES.items())[:900])}
    tools = [{"type": "function", "function": {"name": f"f{n}", "parameters": parameters}} for n in range(6)]
    found = served.post("/v1/chat/completions", {"model": chat, "messages": MESSAGES, "tools": tools})
    assert found.status_code == 400 and "5,406 parts" in found.json()["error"]["message"], found.text


@pytest.mark.parametrize("name", ["allOf", "anyOf", "type", "required", "items", "$ref"])
def test_a_property_may_have_the_name_of_a_keyword(served: Any, chat: str, name: str) -> None:
    schema = {"type": "object", "properties": {name: {"enum": ["x"]}}, "required": [name]}
    found = served.post("/v1/chat/completions", body(chat, schema, max_tokens=60, temperature=0))
    assert json.loads(found.json()["choices"][0]["message"]["content"]) == {name: "x"}


def test_a_schema_is_compiled_once_for_all_answers(served: Any, chat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, matcher = [], constraints.LLMatcher

    class Counted:
        grammar_from_json_schema = staticmethod(matcher.grammar_from_json_schema)

        def __new__(cls, *given: Any, **options: Any) -> Any:
            compiled.append(given)
            return matcher(*given, **options)

    monkeypatch.setattr(constraints, "LLMatcher", Counted)
    found = served.post("/v1/chat/completions", body(chat, {"enum": ["red", "blue"]}, n=8, temperature=2, max_tokens=9))
    texts = [choice["message"]["content"] for choice in found.json()["choices"]]
    assert len(texts) == 8 and {*texts} <= {'"red"', '"blue"'} and len(compiled) == 1


def test_no_schema_is_compiled_for_a_client_that_has_left(
    served: Any, chat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, ended, compiled = threading.Event(), threading.Event(), threading.Event(), []
    render, work = generation.render, generation._requests

    def waits(*given: Any, **options: Any) -> Any:
        begun.set()
        goes_on.wait(WAIT)
        return render(*given, **options)

    def watched(*given: Any) -> Any:
        try:
            return work(*given)
        finally:
            ended.set()

    monkeypatch.setattr(generation, "render", waits)
    monkeypatch.setattr(generation, "_requests", watched)
    monkeypatch.setattr(tools, "schema_grammar", lambda schema: compiled.append(schema))
    content = json.dumps(body(chat, {"enum": ["x"]})).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    before = left(served)
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        assert begun.wait(WAIT)
    until(lambda: left(served) > before)
    goes_on.set()
    assert ended.wait(WAIT) and not compiled


def left(served: Any) -> float:
    """Return the number of requests whose clients have left."""
    return served.models.metrics.answers.labels("/v1/chat/completions", "499")._value.get()


def test_a_schema_that_cannot_be_followed_prints_nothing(
    served: Any, chat: str, capfd: pytest.CaptureFixture[str]
) -> None:
    schemas = ({"type": "strin"}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("})
    for schema in schemas:
        for form_of in FORMS:
            assert served.post("/v1/chat/completions", body(chat, schema, form_of)).status_code == 400
    assert capfd.readouterr().err == ""

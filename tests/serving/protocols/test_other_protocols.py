"""Anthropic's and ollama's paths: the answers are those of OpenAI's path, whole and streamed."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from serving_toys import running, until

import keifu
from keifu.serving import models
from keifu.serving.app import Access
from keifu.serving.worker import Limits

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, 世界"}]
ASK: dict[str, Any] = {"temperature": 0.8, "seed": 3, "max_tokens": 24}
TOOL = {"type": "object", "properties": {"city": {"enum": ["Tokyo", "京都"]}}, "required": ["city"]}
CALL: dict[str, Any] = {"role": "user", "content": "How warm is it in Tokyo?"}


def openai_answer(served: Any, **fields: Any) -> Any:
    return served.openai.chat.completions.create(**{"model": "chat", "messages": HELLO, **ASK, **fields})


def test_an_anthropic_message_is_the_same_answer(served: Any) -> None:
    ask: dict[str, Any] = {"model": "chat", "max_tokens": 24, "temperature": 0}
    expected = openai_answer(served, temperature=0)
    turns = {"system": [{"type": "text", "text": "Be brief."}], "messages": HELLO[1:]}
    found = served.post("/v1/messages", {**ask, **turns}).json()
    text = expected.choices[0].message.content
    assert found["content"] == [{"type": "text", "text": text}]
    assert found["type"] == "message" and found["role"] == "assistant" and found["model"] == "chat"
    assert found["stop_reason"] == {"length": "max_tokens", "stop": "end_turn"}[expected.choices[0].finish_reason]
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected.usage.prompt_tokens
    assert usage["output_tokens"] == expected.usage.completion_tokens
    came = served.post("/v1/messages", {**ask, **turns, "stream": True}).text
    events = [json.loads(line[6:]) for line in came.splitlines() if line.startswith("data: ")]
    assert [event["type"] for event in events[:2]] == ["message_start", "content_block_start"]
    assert [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta") == text
    assert came.startswith("event: message_start\n")


def test_anthropic_calls_and_their_results(served: Any) -> None:
    tools = [{"name": "weather", "description": "How warm it is", "input_schema": TOOL}]
    ask: dict[str, Any] = {"model": "chat", "max_tokens": 200, "temperature": 0, "tools": tools}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}):
        found = served.post("/v1/messages", {**ask, "messages": [CALL], "tool_choice": choice}).json()
        assert found["stop_reason"] == "tool_use", found
        call = found["content"][-1]
        assert call["type"] == "tool_use" and call["name"] == "weather" and call["input"]["city"] in ("Tokyo", "京都")
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "20"}]}
    turns = [CALL, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    cut = served.post("/v1/messages", {**ask, "max_tokens": 60, "messages": [CALL], "tool_choice": {"type": "any"}})
    assert cut.json()["stop_reason"] == "max_tokens" and cut.json()["content"][-1]["input"] == {}
    turns[0] = {"role": "user", "content": "?"}
    again = served.post("/v1/messages", {**ask, "max_tokens": 4, "messages": turns, "tools": None})
    assert again.status_code == 200, again.text
    assert again.json()["usage"]["output_tokens"] <= 4


def test_an_anthropic_answer_follows_a_schema(served: Any) -> None:
    form = {"format": {"type": "json_schema", "schema": TOOL}, "effort": "low"}
    ask = {"model": "chat", "max_tokens": 200, "temperature": 0, "messages": [CALL], "output_config": form}
    found = served.post("/v1/messages", ask)
    assert json.loads(found.json()["content"][0]["text"])["city"] in ("Tokyo", "京都"), found.text
    assert found.headers["x-keifu-ignored"] == "effort"


def test_an_anthropic_answer_names_the_stop_sequence_that_ended_it(served: Any) -> None:
    ask = {"model": "chat", "max_tokens": 24, "temperature": 0, "messages": [CALL]}
    text = served.post("/v1/messages", ask).json()["content"][0]["text"]
    stop = text[5:7]
    found = served.post("/v1/messages", {**ask, "stop_sequences": ["never", stop]}).json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", stop)
    assert "".join(block["text"] for block in found["content"]) == text[: text.index(stop)]


def test_tokens_are_counted_without_an_answer(served: Any) -> None:
    ask = {"model": "chat", "system": "Be brief.", "messages": [CALL]}
    tools = {"tools": [{"name": "weather", "input_schema": TOOL, "cache_control": {"type": "ephemeral"}}]}
    for more in ({}, tools):
        counted = served.post("/v1/messages/count_tokens", {**ask, **more}).json()
        usage = served.post("/v1/messages", {**ask, **more, "max_tokens": 1}).json()["usage"]
        assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    assert served.post("/v1/messages/count_tokens", {"model": "chat"}).status_code == 400


def test_errors_have_the_form_of_their_protocol(served: Any) -> None:
    for path, status, error_type in (("messages", 404, "not_found_error"), ("messages/x", 404, "not_found_error")):
        found = served.post(f"/v1/{path}", {"model": "none", "max_tokens": 1, "messages": [CALL]})
        assert found.status_code == status and found.json()["type"] == "error"
        assert found.json()["error"]["type"] == error_type and "There is no" in found.json()["error"]["message"]
        assert found.json()["request_id"] == found.headers["x-request-id"]
    found = served.post("/api/chat", {"model": "none", "messages": [CALL]})
    assert found.status_code == 404 and found.json()["error"].startswith("There is no model 'none'")
    found = served.post("/v1/messages", {"model": "chat", "max_tokens": 0, "messages": [CALL]})
    assert found.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("headers", [{}, {"content-type": "application/x-www-form-urlencoded"}])
def test_ollamas_paths_take_json_without_its_header(served: Any, headers: dict[str, str]) -> None:
    body = json.dumps({"model": "chat", "messages": [CALL], "stream": False, "options": {"num_predict": 2}}).encode()
    found = httpx.post(f"{served.url}/api/chat", content=body, headers=headers)
    assert found.status_code == 200 and found.json()["done"], found.text
    page = httpx.post(f"{served.url}/api/chat", content=body, headers={**headers, "origin": "https://evil.example"})
    assert page.status_code == 403 and "may not ask this server" in page.json()["error"]


SHOWN = {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image", "source": {}}]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "The field max_tokens is missing"),
        (
            {"max_tokens": 4, "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "base64, with",
        ),
        ({"max_tokens": 4, "messages": [{"role": "user", "content": [SHOWN]}]}, "of no tool_result"),
        ({"max_tokens": 4, "messages": [{"role": "wizard", "content": "x"}]}, "wizard"),
        ({"max_tokens": 4, "tools": [{"nme": "x"}]}, "name"),
        ({"max_tokens": 4, "tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
        ({"max_tokens": 4, "output_config": {"format": {"type": "json"}}}, "output_config.format.type"),
        ({"max_tokens": 4, "mcp_servers": [{"url": "x"}]}, "mcp_servers is not supported"),
        ({"max_tokens": 4, "thinking": {"type": "on"}}, "thinking"),
        ({"max_tokens": 4, "tools": [{"name": "x"}], "tool_choice": {"type": "some"}}, "tool_choice"),
        ({"max_tokens": 4, "messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]}, "messages"),
    ],
)
def test_wrong_anthropic_requests_are_sentences(served: Any, fields: dict[str, Any], words: str) -> None:
    found = served.post("/v1/messages", {"model": "chat", "messages": [CALL], **fields})
    assert found.status_code == 400 and words in found.json()["error"]["message"], found.text


def test_a_model_that_never_thinks_answers_a_client_that_turns_thoughts_on(served: Any) -> None:
    counted = {"model": "chat", "messages": [CALL]}
    asked = counted | {"max_tokens": 4, "temperature": 0}
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    for path, body, name in (("messages", asked, "content"), ("messages/count_tokens", counted, "input_tokens")):
        found = served.post(f"/v1/{path}", body | thinking)
        assert found.status_code == 200, found.text
        assert "thinking" in found.headers["x-keifu-ignored"].split(", ")
        assert found.json()[name] == served.post(f"/v1/{path}", body).json()[name]


def test_an_ollama_chat_is_the_same_answer(served: Any) -> None:
    expected = openai_answer(served)
    options = {"temperature": 0.8, "seed": 3, "num_predict": 24, "num_ctx": 4096}
    ask = {"model": "chat:latest", "messages": HELLO, "options": options}
    came = served.post("/api/chat", ask)
    assert came.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in came.text.splitlines()]
    text = expected.choices[0].message.content
    assert "".join(line["message"]["content"] for line in lines) == text
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["done_reason"] == expected.choices[0].finish_reason
    assert lines[-1]["prompt_eval_count"] == expected.usage.prompt_tokens
    assert lines[-1]["eval_count"] == expected.usage.completion_tokens
    found = served.post("/api/chat", {**ask, "stream": False}).json()
    assert found["message"] == {"role": "assistant", "content": text} and found["done"]


def test_ollama_formats_calls_and_lists(served: Any) -> None:
    bias = {"num_predict": 400, "temperature": 0}
    ask = {"model": "chat", "messages": [CALL], "stream": False, "options": bias, "format": TOOL}
    assert json.loads(served.post("/api/chat", ask).json()["message"]["content"])["city"] in ("Tokyo", "京都")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": TOOL}}]
    asked = {**ask, "format": None, "tools": tools}
    found = served.post("/api/chat", asked)
    assert found.status_code == 200 and found.json()["done"]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Tokyo"}}}]}
    turns = [CALL, call, {"role": "tool", "content": "20", "tool_name": "weather"}]
    assert served.post("/api/chat", {**asked, "messages": turns}).status_code == 200
    tags = httpx.get(f"{served.url}/api/tags").json()["models"]
    assert [each["name"] for each in tags][:2] == ["chat", "base"] and tags[0]["size"] > 0
    assert httpx.get(f"{served.url}/api/version").json()["version"] == keifu.__version__
    turns[1] = {"role": "assistant", "tool_calls": [{"function": "x"}]}
    wrong = served.post("/api/chat", {**asked, "messages": turns})
    assert wrong.status_code == 400 and "messages.1.tool_calls.0.function" in wrong.text
    wrong = served.post("/api/chat", {"model": "chat", "messages": [{"role": "user", "content": "x", "images": ["y"]}]})
    assert wrong.status_code == 400 and "sees no pictures" in wrong.text


def loaded(served: Any) -> dict[str, bool]:
    return {model.id: model.loaded for model in served.openai.models.list()}


def test_models_are_loaded_and_unloaded_by_request(folder: Path) -> None:
    with running([str(folder / kind) for kind in ("base", "chat")], Limits(), Access()) as served:
        assert served.post("/v1/models/load", {"model": "base"}).json()["loaded"]
        assert loaded(served) == {"base": True, "chat": False}
        served.models.workers["base"].pending = 1
        busy = served.post("/v1/models/unload", {"model": "base"})
        assert busy.status_code == 409 and "is at work" in busy.json()["error"]["message"] and loaded(served)["base"]
        served.models.workers["base"].pending = 0
        assert not served.post("/v1/models/unload", {"model": "base"}).json()["loaded"]
        assert loaded(served) == {"base": False, "chat": False}
        assert served.post("/v1/models/unload", {"model": "nothing"}).status_code == 404


def test_models_are_unloaded_when_nothing_asks_for_them_and_load_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of the test, at which the server looks four times in each second of `keep_alive`."""
    clock, looks = [0.0], list[int]()
    clocks = {"monotonic": lambda: looks.append(1) or clock[0], "time": time.time}
    monkeypatch.setattr(models, "time", SimpleNamespace(**clocks))
    with running([str(folder / "base")], Limits(keep_alive=0.1), Access()) as served:
        served.post("/v1/models/load", {"model": "base"})
        clock[0], before = 0.09, len(looks)
        until(lambda: len(looks) > before + 2)
        assert loaded(served) == {"base": True}
        worker = served.models.workers["base"]
        worker.pending, clock[0], before = 1, 0.5, len(looks)  # an answer is being written
        until(lambda: len(looks) > before + 2)
        worker.pending, clock[0], before = 0, 0.59, len(looks)
        until(lambda: len(looks) > before + 2)
        assert loaded(served) == {"base": True}, "the time counts from the end of the last answer"
        clock[0] = 0.7
        until(lambda: not any(loaded(served).values()))
        again = served.post("/v1/completions", {"model": "base", "prompt": "abc", "max_tokens": 1})
        assert again.status_code == 200

"""What the service refuses, each in a sentence of OpenAI's shape, and that it goes on afterwards."""

import importlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving_toys import WAIT, running, until

from keifu.inference.text.engine import Engine
from keifu.inference.text.request import Piece
from keifu.native.library import instructions_in_use
from keifu.serving.app import Access
from keifu.serving.worker import Limits

JSON = {"content-type": "application/json"}
MESSAGES = [{"role": "user", "content": "Hello"}]
FIELDS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"temprature": 1}, "There is no field 'temprature'. Did you mean 'temperature'?", "temprature"),
    ({"messages": []}, "messages is []: list should have at least 1 item", "messages"),
    ({"messages": [{"role": "user", "contnt": "x"}]}, "Did you mean 'content'?", "messages.0.contnt"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 'messages.0.role is "wizard"', "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "a message of the role 'user' needs content", "messages.0"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url' needs image_url alone", None),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "This model reads text alone, and sees no pictures",
        None,
    ),
    ({"temperature": "hot"}, 'temperature is "hot": input should be a valid number', "temperature"),
    ({"temperature": -1}, "temperature must be 0 or a number from 1e-06 to 1,000,000", "temperature"),
    ({"max_tokens": 0}, "max_tokens must be a whole number from 1", "max_tokens"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens and max_completion_tokens differ", None),
    ({"n": 0}, "n is 0: input should be greater than or equal to 1", "n"),
    ({"top_logprobs": 3}, "top_logprobs needs logprobs to be true", None),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21", "top_logprobs"),
    ({"logit_bias": {"x": 1}}, "ids of tokens, and 'x' is none", "logit_bias"),
    ({"logit_bias": {"9" * 5000: 1}}, "ids of tokens, and '99999999999999999999' is none", "logit_bias"),
    ({"logit_bias": {"9999": 1}}, "logit_bias names the token 9999, but the model knows only 0 to 260", "logit_bias"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "should have at most 1024 items", "logit_bias"),
    ({"user": "x" * 513}, "at most 512 characters", "user"),
    ({"stop": ["a"] * 17}, "list should have at most 16 items", "stop"),
    ({"stop": ["a", ""]}, "strings of at least one character", "stop"),
    ({"seed": -1}, "not -1", "seed"),
    ({"audio": {"voice": "x"}}, "audio is not supported by this server: leave it out.", "audio"),
    ({"functions": [{"name": "f"}]}, "functions is not supported", "functions"),
    ({"lora": [{"id": 0, "scale": 0.5}]}, "lora is not supported by this server: choose an adapter", "lora"),
    ({"stream": True, "stream_options": {"include_usag": 1}}, "mean 'include_usage'?", "stream_options.include_usag"),
    ({"stream_options": {}}, "stream_options is for streams: give stream as true too", "stream_options"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options is for streams", "stream_options"),
]
BODIES: list[tuple[bytes, str]] = [
    (b"", "missing"),
    (b'{"model": ', "The body is not JSON at character 10"),
    (b"[1, 2]", "valid dictionary"),
    (
        b'{"model": "", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        "is NaN: input should be a fi",
    ),
    (b'"\xff\xfe"', "The body is not UTF-8 text"),
    (bytes(range(256)) * 10, "UTF-8|JSON"),
    (b"[" * 100_000 + b"]" * 100_000, "nested too deeply|JSON"),
]


@pytest.mark.parametrize(("field", "words", "param"), FIELDS, ids=[str(field) for field, _, _ in FIELDS])
def test_each_wrong_field_is_named(
    served: Any, chat: str, field: dict[str, Any], words: str, param: str | None
) -> None:
    found = served.post("/v1/chat/completions", {"model": chat, "messages": MESSAGES, **field})
    error = found.json()["error"]
    assert found.status_code == 400 and words in error["message"], error
    assert error["type"] == "invalid_request_error" and (param is None or error["param"] == param)


@pytest.mark.parametrize(
    "neutral", [{"store": False}, {"tools": []}, {"user": "me"}, {"stop": None}, {"stream_options": None}, {"n": None}]
)
def test_what_asks_for_nothing_else_is_let_pass(served: Any, chat: str, neutral: dict[str, Any]) -> None:
    body = {"model": chat, "messages": MESSAGES, "max_tokens": 1, **neutral}
    assert served.post("/v1/chat/completions", body).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ("responses", {"input": "x" * 600}, "input"),
        ("completions", {"prompt": "x" * 600}, "prompt"),
    ],
)
def test_a_prompt_that_is_too_long_has_a_code(
    served: Any, chat: str, path: str, body: dict[str, Any], param: str
) -> None:
    error = served.post(f"/v1/{path}", {"model": chat, **body}).json()["error"]
    assert error["code"] == "context_length_exceeded" and error["param"] == param and "512" in error["message"], error


@pytest.mark.parametrize(("body", "words"), BODIES, ids=[str(body[:12]) for body, _ in BODIES])
def test_what_is_no_request_is_told_in_a_sentence(served: Any, body: bytes, words: str) -> None:
    found = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=JSON)
    assert found.status_code == 400
    assert any(word in found.json()["error"]["message"] for word in words.split("|")), found.text


def test_a_body_that_is_not_told_to_be_json_is_refused_with_the_header_to_send(served: Any) -> None:
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        found = httpx.post(f"{served.url}/v1/completions", content=b'{"model": "x", "prompt": "y"}', headers=headers)
        assert found.status_code == 400 and "Content-Type: application/json" in found.json()["error"]["message"]


def test_half_a_surrogate_pair_is_refused_and_can_be_told(served: Any, chat: str) -> None:
    body = b'{"model": "%s", "messages": [{"role": "user", "content": "\\ud800"}]}' % chat.encode()
    found = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=JSON)
    assert found.status_code == 400 and "surrogate" in found.json()["error"]["message"]
    body = b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}'
    assert httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=JSON).status_code == 404


def test_unknown_places_and_methods(served: Any) -> None:
    assert "There is nothing at /v1/chat" in served.post("/v1/chat", {}).json()["error"]["message"]
    found = httpx.get(f"{served.url}/v1/chat/completions")
    assert found.status_code == 405 and "GET is not for" in found.json()["error"]["message"]
    assert httpx.get(f"{served.url}/v1/models/none").status_code == 404


def test_another_name_of_the_host_is_refused_where_names_are_given(folder: Path) -> None:
    with running([str(folder / "base")], Limits(), Access(hosts=("127.0.0.1",))) as served:
        health = httpx.get(f"{served.url}/health")
        assert health.json() == {"status": "ok", "instructions": instructions_in_use()}
        assert httpx.get(f"{served.url}/health", headers={"host": "evil.example"}).status_code == 400


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Any]:
    """Yield a server with keys, few slots, a short queue and small request bodies."""
    limits, access = Limits(slots=1, queue=1), Access(keys=("first", "second"), body=2000)
    with running([str(folder / "chat")], limits, access) as found:
        yield found


def ask(served: Any, key: str | bytes | None = "second", **fields: Any) -> httpx.Response:
    name = next(iter(served.models.descriptions))
    headers = {} if key is None else {"authorization": b"Bearer " + (key.encode() if isinstance(key, str) else key)}
    return served.post("/v1/chat/completions", {"model": name, "messages": MESSAGES, **fields}, headers=headers)


def test_a_key_opens(small: Any) -> None:
    assert ask(small, max_tokens=1).status_code == ask(small, "first", max_tokens=1).status_code == 200
    for key in (None, "firs", "firstsecond", "\xff".encode("latin-1")):
        found = ask(small, key)
        assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{small.url}/health").status_code == 200
    assert httpx.get(f"{small.url}/metrics").status_code == 401
    assert httpx.post(f"{small.url}/rerank", json={"query": "x", "documents": ["y"]}).status_code == 401


def test_a_large_body_is_refused_by_its_length_and_by_what_comes(small: Any) -> None:
    assert ask(small, user="x" * 3000).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield from [b" " * 1000] * 5

    headers = {"authorization": "Bearer first", **JSON}
    found = httpx.post(f"{small.url}/v1/chat/completions", content=chunks(), headers=headers)
    assert found.status_code == 413 and "2,000 bytes" in found.json()["error"]["message"]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let the engine write two tokens, and stop it until this event is set."""
    opened, steps, step = threading.Event(), count(), Engine.step

    def gated(engine: Engine) -> list[Piece]:
        if next(steps) > 1:
            opened.wait()
        return step(engine)

    monkeypatch.setattr(Engine, "step", gated)
    yield opened
    opened.set()


def test_a_full_queue_answers_429_and_a_client_that_leaves_makes_room(small: Any, gate: threading.Event) -> None:
    client = openai.OpenAI(base_url=f"{small.url}/v1", api_key="first", max_retries=0)
    name = next(iter(small.models.descriptions))
    long = {"model": name, "messages": MESSAGES, "max_tokens": 400, "logit_bias": {"258": -1e5, "0": -1e5, "257": -1e5}}
    streams = [client.chat.completions.create(**long, stream=True) for _ in range(2)]
    [next(stream) for stream in streams[:1]]
    worker = small.models.workers[name]
    until(lambda: worker.pending == 2)
    refused = ask(small, max_tokens=1)
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    assert "try again" in refused.json()["error"]["message"]
    assert ask(small, n=3).status_code == 400
    for stream in streams:
        stream.close()
    until(lambda: worker.pending == 0)
    gate.set()
    until(lambda: not worker._jobs)
    assert ask(small, max_tokens=1).status_code == 200


def test_a_client_that_leaves_before_its_answer_makes_room(small: Any, gate: threading.Event) -> None:
    name = next(iter(small.models.descriptions))
    worker = small.models.workers[name]
    with asking(small, "chat/completions", {"model": name, "messages": MESSAGES, "max_tokens": 450}):
        until(lambda: worker.pending == 1)
    until(lambda: worker.pending == 0)
    gate.set()
    until(lambda: not worker._jobs)


@contextmanager
def asking(served: Any, path: str, body: dict[str, Any]) -> Iterator[None]:
    """Ask, and leave at the end of the block, whatever has come."""
    content = json.dumps(body).encode()
    head = [
        f"POST /v1/{path} HTTP/1.1", "Host: x", "Content-Type: application/json",
        "Authorization: Bearer first", f"Content-Length: {len(content)}",
    ]  # fmt: skip
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode() + content)
        yield


@pytest.mark.parametrize(
    ("kind", "path", "part", "texts"),
    [
        ("translator", "translations", "keifu.inference.text.translation.beam_search", ["abc"] * 300),
        ("encoder", "embeddings", "keifu.inference.embeddings.encoders.pool", ["the cat"] * 1200),
    ],
)
def test_what_a_client_has_left_ends_after_a_batch(
    served: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, path: str, part: str, texts: list[str]
) -> None:
    body = {"model": str(folder / kind), "input": texts[0]}
    assert served.post(f"/v1/{path}", body).status_code == 200
    module, _, name = part.rpartition(".")
    whole, batches = getattr(importlib.import_module(module), name), []
    begun, goes_on = threading.Event(), threading.Event()

    def waits(*given: Any) -> Any:
        batches.append(given)
        begun.set()
        goes_on.wait(WAIT)
        return whole(*given)

    monkeypatch.setattr(part, waits)
    with asking(served, path, {**body, "input": texts}):
        assert begun.wait(WAIT)
    until(lambda: not served.models.workers[kind].pending)
    goes_on.set()
    assert served.post(f"/v1/{path}", body).status_code == 200
    assert len(batches) == 2, "one of the first request, and the second request's"


def test_an_answer_that_takes_too_long_is_given_up(folder: Path) -> None:
    with running([str(folder / "chat")], Limits(timeout=0.01), Access()) as served:
        found = ask(served, None, max_tokens=450)
        assert found.status_code == 504 and found.json()["error"]["code"] == "timeout"
        streamed = ask(served, None, max_tokens=450, stream=True)
        assert streamed.status_code == 200 and '"code": "timeout"' in streamed.text


def test_figures_are_counted(served: Any, base: str) -> None:
    first = served.models.metrics.first_token.labels("base")
    count = sum(each.get() for each in first._buckets)
    served.post("/v1/completions", {"model": base, "prompt": "abc", "max_tokens": 3})
    assert sum(each.get() for each in first._buckets) == count + 1, "one answer has one first token"
    text = httpx.get(f"{served.url}/metrics").text
    assert 'keifu_generated_tokens_total{model="base"}' in text
    assert 'keifu_requests_total{path="/v1/completions",status="200"}' in text
    assert httpx.get(f"{served.url}/ready").json()["status"] == "ready"


def test_the_cache_holds_what_it_was_given_and_answers_stay_the_same(folder: Path) -> None:
    with running([str(folder / "base")], Limits(slots=3, cache=160_000), Access()) as served:
        name = str(folder / "base")
        body = {"model": name, "prompt": ["abc " * 9, "xyz " * 9, "uvw " * 9], "max_tokens": 30, "temperature": 0}
        texts = [choice["text"] for choice in served.post("/v1/completions", body).json()["choices"]]
        runner = served.models.workers["base"]._engine.runner
        assert runner.n_blocks * runner.block_size * runner.token_bytes <= 160_000
        for prompt, text in zip(body["prompt"], texts, strict=True):
            alone = served.post("/v1/completions", {**body, "prompt": prompt}).json()["choices"][0]["text"]
            assert alone == text
        refused = served.post("/v1/completions", {**body, "prompt": "a" * 400})
        assert refused.status_code == 400 and "do not fit the memory" in refused.json()["error"]["message"]


def test_pages_of_other_origins_may_ask_only_where_they_are_named(served: Any, folder: Path) -> None:
    asked = {"origin": "https://example.org", "access-control-request-method": "POST"}
    with running([str(folder / "base")], Limits(), Access(origins=("https://example.org",))) as named:
        found = httpx.options(f"{named.url}/v1/completions", headers=asked)
        assert found.headers["access-control-allow-origin"] == "https://example.org"
        other = httpx.options(f"{named.url}/v1/completions", headers={**asked, "origin": "https://evil.example"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
    found = httpx.options(f"{served.url}/v1/completions", headers=asked)
    assert "access-control-allow-origin" not in found.headers


def test_a_body_of_100_megabytes_is_refused_before_it_is_read(served: Any) -> None:
    head = {"content-length": str(100 * 2**20), **JSON}
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as connection:
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in head.items())]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + b"x" * 1000)
        assert b" 413 " in connection.recv(1000).split(b"\r\n")[0]
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_text_to_be_shown_as_tokens_is_limited(served: Any, chat: str) -> None:
    text = "a" + "\u0301" * 2**18
    for body in ({"input": text}, {"messages": [{"role": "user", "content": text}]}):
        found = served.post("/v1/tokenize", {"model": chat, **body})
        assert found.status_code == 400 and "character" in found.json()["error"]["message"]

"""ollama's paths besides /api/chat, asked as its clients ask: generation, embeddings, and facts about models."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving_toys import running

import keifu
from keifu.inference.embeddings.encoders import embed
from keifu.serving.app import Access
from keifu.serving.worker import Limits

CALL = {"role": "user", "content": "Hello"}
OPTIONS = {"num_predict": 12, "temperature": 0, "seed": -1}


@pytest.fixture(scope="module")
def own(folder: Path) -> Any:
    """Yield a server with a chat model, a base model and an encoder, none of them loaded."""
    with running([str(folder / kind) for kind in ("chat", "base", "encoder", "ddpm")], Limits(), Access()) as found:
        yield found


def test_a_prompt_is_answered_as_a_conversation(own: Any) -> None:
    ask = {"model": "chat:latest", "prompt": "Hello", "system": "Be brief.", "options": OPTIONS}
    turns = [{"role": "system", "content": "Be brief."}, CALL]
    chat = {"model": "chat", "messages": turns, "options": OPTIONS, "stream": False}
    expected = own.post("/api/chat", chat).json()
    came = own.post("/api/generate", ask)
    lines = [json.loads(line) for line in came.text.splitlines()]
    assert came.headers["content-type"] == "application/x-ndjson"
    assert "".join(line["response"] for line in lines) == expected["message"]["content"]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    whole = own.post("/api/generate", {**ask, "stream": False}).json()
    assert whole["response"] == expected["message"]["content"] and whole["done"] and "message" not in whole
    assert whole["prompt_eval_count"] == lines[-1]["prompt_eval_count"] == expected["prompt_eval_count"]
    schema = {**ask, "stream": False, "format": {"enum": ["red"]}}
    assert own.post("/api/generate", schema).json()["response"] == '"red"'


@pytest.mark.parametrize(("model", "more"), [("base", {}), ("chat", {"raw": True})])
def test_a_base_model_continues_the_prompt(own: Any, model: str, more: dict[str, Any]) -> None:
    ask = {"model": model, "prompt": "abc", "max_tokens": 12, "temperature": 0}
    expected = own.post("/v1/completions", ask).json()["choices"][0]["text"]
    ask = {"model": model, "prompt": "abc", "options": OPTIONS, "stream": False, **more}
    assert own.post("/api/generate", ask).json()["response"] == expected
    assert own.post("/api/generate", {**ask, "format": {"enum": ["x"]}}).json()["response"] == '"x"'
    refused = own.post("/api/generate", {**ask, "system": "Be brief."})
    assert refused.status_code == 400 and "no system" in refused.json()["error"]


def test_probabilities_are_those_of_the_chat(own: Any) -> None:
    ask: dict[str, Any] = {"model": "chat", "messages": [CALL], "logprobs": True, "top_logprobs": 2}
    chat = own.post("/v1/chat/completions", {**ask, "max_tokens": 12, "temperature": 0}).json()
    expected = chat["choices"][0]["logprobs"]["content"]
    found = own.post("/api/chat", {**ask, "options": OPTIONS, "stream": False}).json()["logprobs"]
    lines = own.post("/api/chat", {**ask, "options": OPTIONS}).text.splitlines()
    streamed = [token for line in lines for token in json.loads(line).get("logprobs", ())]
    for tokens in (found, streamed):
        assert [token["token"] for token in tokens] == [token["token"] for token in expected]
        assert [token["logprob"] for token in tokens] == pytest.approx([token["logprob"] for token in expected])


def test_a_request_without_a_prompt_loads_and_unloads(own: Any) -> None:
    for path, body in (("chat", {"messages": []}), ("generate", {})):
        ask = {"model": "chat", **body}
        assert own.post(f"/api/{path}", ask).json()["done_reason"] == "load"
        (entry,) = [each for each in httpx.get(f"{own.url}/api/ps").json()["models"] if each["name"] == "chat"]
        assert entry["size"] > 0 and entry["context_length"] == 512 and datetime.fromisoformat(entry["expires_at"])
        assert own.post(f"/api/{path}", {**ask, "keep_alive": 0}).json()["done_reason"] == "unload"
        assert "chat" not in [each["name"] for each in httpx.get(f"{own.url}/api/ps").json()["models"]]
    assert own.post("/api/generate", {"model": "none"}).status_code == 404


def test_texts_are_embedded(own: Any, folder: Path) -> None:
    model, tokenizer = keifu.load(str(folder / "encoder"))
    texts = ["the cat", "seven dogs ran"]
    found = own.post("/api/embed", {"model": "encoder:latest", "input": texts, "keep_alive": "5m"}).json()
    torch.testing.assert_close(torch.tensor(found["embeddings"]), embed(model, tokenizer, texts))
    assert found["model"] == "encoder" and found["prompt_eval_count"] > 0
    one = own.post("/api/embed", {"model": "encoder", "input": texts[0]}).json()["embeddings"][0]
    old = own.post("/api/embeddings", {"model": "encoder", "prompt": texts[0]}).json()["embedding"]
    assert one == old == pytest.approx(found["embeddings"][0], abs=1e-6)
    long = {"model": "encoder", "input": "the cat " * 30}
    assert len(own.post("/api/embed", long).json()["embeddings"]) == 1
    assert own.post("/api/embed", {**long, "truncate": False}).status_code == 400
    wrong = own.post("/api/embed", {**long, "dimensions": 7})
    assert wrong.status_code == 400 and wrong.json()["error"].startswith("dimensions is 7")


def test_models_are_listed_and_described(own: Any) -> None:
    tags = httpx.get(f"{own.url}/api/tags").json()["models"]
    assert [each["name"] for each in tags] == ["chat", "base", "encoder"] and tags[0]["details"]["family"] == "llama"
    chat = own.post("/api/show", {"model": "chat"}).json()
    assert chat["capabilities"] == ["completion", "tools"] and "<|im_start|>" in chat["template"]
    assert chat["model_info"]["llama.context_length"] == 512 and chat["details"]["format"] == "safetensors"
    assert own.post("/api/show", {"name": "encoder:latest"}).json()["capabilities"] == ["embedding"]
    assert own.post("/api/show", {"model": "nothing"}).json()["error"].startswith("There is no model")
    found = httpx.head(own.url)
    assert found.status_code == 200 and not found.content


def test_thoughts_are_refused_of_a_model_that_has_none(own: Any) -> None:
    ask = {"model": "chat", "messages": [CALL], "options": OPTIONS, "stream": False}
    assert own.post("/api/chat", {**ask, "think": False}).status_code == 200
    refused = own.post("/api/chat", {**ask, "think": "high"})
    assert refused.status_code == 400 and "no thoughts" in refused.json()["error"]

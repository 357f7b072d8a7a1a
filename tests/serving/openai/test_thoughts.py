"""Thoughts in the service: apart from the answer, counted, and switched by the chat template's option."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving_toys import SIZE, byte_tokenizer, running, sharp

import keifu
from keifu.data.tokenizers.chat_template import CHATML
from keifu.models import llama
from keifu.serving.app import Access
from keifu.serving.openai.schemas import ResponseRequest
from keifu.serving.openai.tools import Reply
from keifu.serving.worker import Limits

OPENS = "{% if add_generation_prompt %}<think>\n{% if enable_thinking is false %}\n</think>\n\n{% endif %}{% endif %}"
EARLIER = "{% for m in messages if m.reasoning_content %}[{{ m.reasoning_content }}]{% endfor %}"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0}
OFF = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a server over a model with random weights. Its template opens thoughts, which it never ends."""
    folder: Path = tmp_path_factory.mktemp("thinker") / "thinker"
    torch.manual_seed(2)
    model = sharp(llama.build(llama.Config(**SIZE, n_heads=4, head_dim=6, n_kv_heads=2)))
    keifu.save(model, byte_tokenizer().with_chat_template(EARLIER + CHATML + OPENS), folder)
    with running([str(folder)], Limits(), Access()) as found:
        yield found


def test_thoughts_are_no_part_of_the_answer_and_are_counted(thinker: Any) -> None:
    name = next(iter(thinker.models.descriptions))
    found = thinker.openai.chat.completions.create(model=name, **ASK)
    message = found.choices[0].message
    assert message.content == "" and message.reasoning_content
    assert found.usage.completion_tokens_details.reasoning_tokens == found.usage.completion_tokens > 0
    other = thinker.openai.chat.completions.create(model=name, **ASK, extra_body=OFF)
    assert other.choices[0].message.content and "reasoning_content" not in other.choices[0].message.model_dump()
    assert other.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_stream_has_the_same_thoughts(thinker: Any) -> None:
    name = next(iter(thinker.models.descriptions))
    whole = thinker.openai.chat.completions.create(model=name, **ASK).choices[0].message.reasoning_content
    chunks = [*thinker.openai.chat.completions.create(model=name, **ASK, stream=True)]
    deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == whole
    assert "".join(delta.get("content") or "" for delta in deltas) == ""


def test_ollama_calls_them_thinking(thinker: Any) -> None:
    name = next(iter(thinker.models.descriptions))
    body = {"model": name, "messages": ASK["messages"], "stream": False, "options": {"num_predict": 8}}
    message = httpx.post(f"{thinker.url}/api/chat", json=body).json()["message"]
    assert message["thinking"] and message["content"] == ""
    off = httpx.post(f"{thinker.url}/api/chat", json={**body, "think": False}).json()["message"]
    assert off["content"] and "thinking" not in off


def test_anthropics_client_gets_thinking_blocks(thinker: Any) -> None:
    name, url = next(iter(thinker.models.descriptions)), f"{thinker.url}/v1/messages"
    body = {"model": name, "messages": ASK["messages"], "max_tokens": 12, "temperature": 0}
    message = httpx.post(url, json=body).json()
    [block] = message["content"]
    assert block["type"] == "thinking" and block["thinking"] and "signature" in block
    lines = httpx.post(url, json={**body, "stream": True}).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert {delta["type"] for delta in deltas} == {"thinking_delta"}
    assert "".join(delta["thinking"] for delta in deltas) == block["thinking"]
    turns = [*ASK["messages"], {"role": "assistant", "content": [block, {"type": "text", "text": "A"}]}]
    again = httpx.post(url, json={**body, "messages": [*turns, *ASK["messages"]]}).json()
    alone = [*ASK["messages"], {"role": "assistant", "content": [block]}, *ASK["messages"]]  # the limit cut it off
    only = httpx.post(url, json={**body, "messages": alone}).json()
    plain = [*ASK["messages"], {"role": "assistant", "content": "A"}, *ASK["messages"]]
    without = httpx.post(url, json={**body, "messages": plain}).json()
    read = [sum(n for name, n in each["usage"].items() if "input" in name) for each in (again, only, without)]
    assert read[0] - 1 == read[1] > read[2]


def test_a_response_has_an_item_of_thoughts(thinker: Any) -> None:
    name = next(iter(thinker.models.descriptions))
    ask = {"model": name, "input": "Hi", "max_output_tokens": 12, "temperature": 0}
    found = thinker.openai.responses.create(**ask)
    [item] = found.output
    assert item.type == "reasoning" and item.content[0].text and found.output_text == ""
    assert found.usage.output_tokens_details.reasoning_tokens == found.usage.output_tokens
    events = [*thinker.openai.responses.create(**ask, stream=True)]
    text = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert text == item.content[0].text
    assert [event.text for event in events if event.type == "response.reasoning_text.done"] == [text]
    turn = [{"role": "user", "content": "Hi"}, item.model_dump(exclude_none=True), *ASK["messages"]]
    assert thinker.openai.responses.create(**ask | {"input": turn}).usage.input_tokens > found.usage.input_tokens


def test_all_thoughts_before_an_answer_go_with_it() -> None:
    parts: list[Any] = [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": each}]} for each in "ab"]
    body = ResponseRequest(input=[*parts, {"role": "assistant", "content": "A"}])
    assert body.messages == [{"role": "assistant", "content": "A", "reasoning_content": "ab"}]


def test_earlier_thoughts_go_to_the_template(thinker: Any) -> None:
    name = next(iter(thinker.models.descriptions))
    turns = [*ASK["messages"], {"role": "assistant", "content": "A", "reasoning_content": "T" * 9}, *ASK["messages"]]
    counts = []
    for messages in (turns, [{k: v for k, v in turn.items() if k != "reasoning_content"} for turn in turns]):
        found = httpx.post(f"{thinker.url}/v1/chat/completions", json={"model": name, **ASK, "messages": messages})
        counts.append(found.json()["usage"]["prompt_tokens"])
    assert counts[0] == counts[1] + len("[]") + 9


@pytest.mark.parametrize("name", ["enable_thoughts", "tools"])
def test_an_option_that_the_template_does_not_read_is_refused(thinker: Any, name: str) -> None:
    model = next(iter(thinker.models.descriptions))
    body = {"model": model, **ASK, "chat_template_kwargs": {name: True}}
    found = httpx.post(f"{thinker.url}/v1/chat/completions", json=body)
    assert found.status_code == 400 and f"has no option {name}" in found.json()["error"]["message"]


def test_every_interface_switches_thoughts_by_the_template(thinker: Any) -> None:
    name = next(iter(thinker.models.descriptions))
    ask = {"model": name, "max_output_tokens": 12, "temperature": 0, "input": "Hi"}
    kinds = [each.type for each in thinker.openai.responses.create(**ask, extra_body=OFF).output]
    assert kinds == ["message"]
    body = {"model": name, "messages": ASK["messages"], "max_tokens": 12, "temperature": 0}
    for kind, block in (("enabled", "thinking"), ("adaptive", "thinking"), ("disabled", "text")):
        asked = {**body, "thinking": {"type": kind, **({"budget_tokens": 1024} if kind == "enabled" else {})}}
        found = httpx.post(f"{thinker.url}/v1/messages", json=asked)
        assert [each["type"] for each in found.json()["content"]] == [block]
        assert ("budget_tokens" in found.headers.get("x-keifu-ignored", "")) == (kind == "enabled")


def test_thoughts_before_text_are_split_in_any_pieces() -> None:
    for step in (1, 3, 7):
        reply, text = Reply(), "<think>\nab\n</think>\n\nThe answer"
        pieces = [text[at : at + step] for at in range(0, len(text), step)]
        found = [part.content for n, piece in enumerate(pieces) for part in reply.push(piece, n == len(pieces) - 1)]
        assert (reply.reasoning, reply.text, "".join(found)) == ("ab", "The answer", "The answer")
        assert 0 < reply.reasoning_tokens < len(pieces)


def test_turning_off_thoughts_that_a_model_has_not_changes_nothing(served: Any, chat: str) -> None:
    body = {"model": chat, "messages": ASK["messages"], "max_tokens": 4, **OFF}
    found = served.post("/v1/chat/completions", body)
    assert found.status_code == 200 and found.headers["x-keifu-ignored"] == "chat_template_kwargs.enable_thinking"
    body["chat_template_kwargs"] = {"enable_thinking": True}
    assert served.post("/v1/chat/completions", body).status_code == 400

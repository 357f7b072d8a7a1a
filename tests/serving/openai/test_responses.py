"""/v1/responses by OpenAI's own client: text, streams, structured output, and conversations that the server keeps."""

from typing import Any

import openai
import pytest

import keifu
from keifu.serving.openai import responses

ASK: dict[str, Any] = {"temperature": 0, "max_output_tokens": 8}


def by_chat(served: Any, name: str, messages: list[dict[str, str]]) -> Any:
    return served.openai.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=8)


def test_a_response_is_the_answer_of_the_chat(served: Any, chat: str) -> None:
    found = served.openai.responses.create(model=chat, input="Hello", instructions="Be brief.", **ASK)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    alone = by_chat(served, chat, messages)
    assert found.output_text == alone.choices[0].message.content
    assert found.usage.input_tokens == alone.usage.prompt_tokens
    assert found.usage.output_tokens == alone.usage.completion_tokens
    cut = alone.choices[0].finish_reason == "length"
    assert found.status == ("incomplete" if cut else "completed")
    assert not cut or found.incomplete_details.reason == "max_output_tokens"


def test_a_stream_has_the_same_text_and_ends_with_the_response(served: Any, chat: str) -> None:
    whole = served.openai.responses.create(model=chat, input="Hello", **ASK)
    events = list(served.openai.responses.create(model=chat, input="Hello", stream=True, **ASK))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == f"response.{whole.status}"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text


def test_a_conversation_goes_on_from_its_id(served: Any, chat: str) -> None:
    client = served.openai
    first = client.responses.create(model=chat, input=[{"role": "user", "content": "One"}], **ASK)
    second = client.responses.create(model=chat, input="Two", previous_response_id=first.id, **ASK)
    messages = [("user", "One"), ("assistant", first.output_text), ("user", "Two")]
    alone = by_chat(served, chat, [{"role": role, "content": text} for role, text in messages])
    assert second.output_text == alone.choices[0].message.content
    assert client.responses.retrieve(first.id).output_text == first.output_text
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="There is no response"):
        client.responses.create(model=chat, input="Three", previous_response_id=first.id, **ASK)
    loose = client.responses.create(model=chat, input="One", store=False, **ASK)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(loose.id)
    given_back = [{"role": "user", "content": "One"}, *first.model_dump()["output"], {"role": "user", "content": "Two"}]
    assert client.responses.create(model=chat, input=given_back, **ASK).output_text == second.output_text


def test_its_text_can_follow_a_schema(served: Any, chat: str) -> None:
    form = {"type": "json_schema", "name": "colour", "schema": {"enum": ["red", "green"]}, "strict": True}
    found = served.openai.responses.create(model=chat, input="x", text={"format": form}, temperature=0)
    assert found.output_text in ('"red"', '"green"') and found.status == "completed"


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens is 0"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "json_schema needs a schema"),
        ({"background": True}, "background is not supported"),
        ({"include": ["message.output_text.logprobs"]}, "which this path has not"),
        ({"n": 2}, "n is not supported"),
        ({"lora": [{"id": 0}]}, "lora is not supported by this server: choose an adapter by its name as model"),
        ({"max_output_token": 1}, "Did you mean 'max_output_tokens'?"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
    ],
)
def test_what_is_not_there_is_refused(served: Any, chat: str, field: dict[str, Any], words: str) -> None:
    found = served.post("/v1/responses", {"model": chat, "input": "x", "max_output_tokens": 1, **field})
    assert found.status_code == 400 and words in found.json()["error"]["message"], found.text


def test_of_more_than_there_is_room_for_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "KEPT_RESPONSES", 3)
    monkeypatch.setattr(responses, "KEPT_BYTES", 300)
    stored = responses.StoredResponses()
    for name in "abcd":
        stored.add({"id": name}, [{"role": "user", "content": "x" * 10}])
    assert [*stored.entries] == ["b", "c", "d"] and stored.bytes == sum(map(len, stored.entries.values()))
    stored.add({"id": "e", "metadata": {"a": "y" * 245}}, [])  # every field counts
    assert [*stored.entries] == ["e"]
    stored.add({"id": "f", "metadata": {"a": "y" * 300}}, [])
    assert not stored.entries and stored.bytes == 0


def test_instructions_belong_to_one_response(served: Any, chat: str) -> None:
    create = served.openai.responses.create
    ask: dict[str, Any] = {"model": chat, "max_output_tokens": 4, "temperature": 0}
    first = create(input="Hello", instructions="Be brief.", **ask)
    second = create(input="And?", instructions="Be long.", previous_response_id=first.id, **ask)
    turns = [
        {"role": "system", "content": "Be long."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And?"},
    ]
    tokens = len(keifu.load(chat)[1].render_chat(turns))
    assert second.usage.input_tokens == tokens


@pytest.mark.parametrize(
    "metadata", [{str(n): "x" for n in range(17)}, {"k" * 65: "x"}, {"k": "x" * 513}, {"k": 1}, ["k"]]
)
def test_metadata_is_limited(served: Any, chat: str, metadata: Any) -> None:
    found = served.post("/v1/responses", {"model": chat, "input": "x", "metadata": metadata})
    assert found.status_code == 400 and "metadata" in found.json()["error"]["param"]


def test_items_of_a_stored_response_are_named_by_their_ids(served: Any, chat: str) -> None:
    """The Vercel AI SDK sends them, and langchain-openai goes on from a response only if its id begins with resp_."""
    create = served.openai.responses.create
    first = create(model=chat, input="One", **ASK)
    assert first.id.startswith("resp_") and first.output[0].id.startswith("msg_")
    named = {"type": "item_reference", "id": first.output[0].id}
    turns = [{"role": "user", "content": "One"}, named, {"role": "user", "content": "Two"}]
    followed = create(model=chat, input="Two", previous_response_id=first.id, **ASK)
    assert create(model=chat, input=turns, **ASK).output_text == followed.output_text
    served.openai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="There is no item 'msg_.*store: false"):
        create(model=chat, input=turns, **ASK)


def test_a_result_may_be_a_list_of_texts(served: Any, chat: str) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    parts = [{"type": "input_text", "text": "sun"}, {"type": "input_text", "text": "wind"}]
    results = [{"type": "function_call_output", "call_id": "c1", "output": output} for output in (parts, "sun\nwind")]
    ask: Any = {"model": chat, "stream": False, **ASK}
    texts = [served.openai.responses.create(input=[call, result], **ask).output_text for result in results]
    assert texts[0] == texts[1]
    picture = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
    with pytest.raises(openai.BadRequestError, match="of no result"):
        served.openai.responses.create(input=[call, {**results[0], "output": [picture]}], **ask)

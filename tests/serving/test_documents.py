"""Documents of a chat, by OpenAI's and Anthropic's forms: citations whole and streamed, no answer, refusals."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from serving_toys import Served, running

from keifu.inference.chat.documents import NOT_FOUND
from keifu.inference.text.request import Piece
from keifu.serving.app import Access
from keifu.serving.openai.generation import Answer
from keifu.serving.worker import Limits

HARBOUR = "# Harbour\n\nThe crane of Osttavbra was bought in 1931.\nIt lifts forty tons.\n"
CATS = "The cat of the office is called Minka."
CRANE = "When was the crane of Osttavbra bought?"
FAR = "Which team won the football cup?"
PIECES = ["It was bought", " in 19", "31. The off", "ice cat is Minka", ". Good [x.md:1-2]."]
MARKED = "It was bought in 1931. [harbour.md:3-4] The office cat is Minka. [document 2:1] Good (x.md:1-2)."


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """Yield a server over a small chat model and an encoder."""
    with running(["chat-en", "minilm"], Limits(), Access()) as found:
        yield found


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, server: Served) -> list[str]:
    """Replace what the model writes. Return the prompts that it would have read."""
    prompts = list[str]()
    real = Answer.pieces

    async def pieces(self: Answer) -> Any:
        if self.citations and self.citations.fixed_text:
            async for item in real(self):
                yield item
            return
        prompts.append(self.description.tokenizer.decode(list(self.requests[0].prompt)))
        for choice in range(len(self.requests)):
            for number, text in enumerate(PIECES, 1):
                yield choice, Piece(choice, text, 1, finish_reason="stop" if number == len(PIECES) else None)

    monkeypatch.setattr(Answer, "pieces", pieces)
    return prompts


def openai_body(question: str = CRANE, **more: Any) -> dict[str, Any]:
    documents = [{"title": "harbour.md", "text": HARBOUR}, {"text": CATS}]
    return {"model": "chat-en", "messages": [{"role": "user", "content": question}], "documents": documents, **more}


def anthropic_body(question: str = CRANE, enabled: bool = True, **more: Any) -> dict[str, Any]:
    blocks: list[dict[str, Any]] = [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": text}, "title": title,
         "citations": {"enabled": enabled}}
        for title, text in (("harbour.md", HARBOUR), ("cats.txt", CATS))
    ]  # fmt: skip
    content = [*blocks, {"type": "text", "text": question}]
    return {"model": "chat-en", "max_tokens": 16, "messages": [{"role": "user", "content": content}], **more}


def events(server: Served, path: str, body: dict[str, Any]) -> list[Any]:
    lines = server.post(path, body | {"stream": True}).text.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_an_answer_has_annotations_where_its_marks_are(server: Served, written: list[str]) -> None:
    choices = server.post("/v1/chat/completions", openai_body(n=2)).json()["choices"]
    for choice in choices:
        message = choice["message"]
        assert message["content"] == MARKED
        places = [each["url_citation"] for each in message["annotations"]]
        marks = [MARKED[place["start_index"] : place["end_index"]] for place in places]
        assert marks == ["[harbour.md:3-4]", "[document 2:1]"]
        assert places[0]["url"] == "harbour.md#L3-L4" and places[0]["title"] == "harbour.md:3-4"
    assert "> The crane of Osttavbra was bought in 1931." in written[0] and CRANE in written[0]


def test_a_stream_has_the_same_text_and_annotations(server: Served, written: list[str]) -> None:
    deltas = [event["choices"][0]["delta"] for event in events(server, "/v1/chat/completions", openai_body())]
    message = server.post("/v1/chat/completions", openai_body()).json()["choices"][0]["message"]
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"] == MARKED
    assert [each for delta in deltas for each in delta.get("annotations", [])] == message["annotations"]


@pytest.mark.parametrize("end", [".", ""])
def test_the_last_sentence_is_cited_also_if_no_text_follows(
    server: Served, written: list[str], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PIECES", ["The crane was", f" bought in 1931{end}"])
    expected = f"The crane was bought in 1931{end}"
    message = server.post("/v1/chat/completions", openai_body()).json()["choices"][0]["message"]
    deltas = [event["choices"][0]["delta"] for event in events(server, "/v1/chat/completions", openai_body())]
    streamed = "".join(delta.get("content", "") for delta in deltas)
    assert message["content"] == streamed == f"{expected} [harbour.md:3-4]"
    assert len(message["annotations"]) == sum(len(delta.get("annotations", [])) for delta in deltas) == 1
    [block] = server.post("/v1/messages", anthropic_body()).json()["content"]
    deltas = [event.get("delta", {}) for event in events(server, "/v1/messages", anthropic_body())]
    assert block["text"] == expected and block["citations"][0]["document_index"] == 0
    assert [delta.get("type") for delta in deltas].count("citations_delta") == 1


def test_openais_client_reads_the_annotations(server: Served, written: list[str]) -> None:
    body = openai_body()
    found = server.openai.chat.completions.create(**{k: body[k] for k in ("model", "messages")},
                                                  extra_body={"documents": body["documents"]})  # fmt: skip
    message = found.choices[0].message
    assert message.annotations[0].url_citation.title == "harbour.md:3-4"
    again = [*body["messages"], message.model_dump(exclude_none=True), body["messages"][0]]
    assert server.post("/v1/chat/completions", openai_body(messages=again)).status_code == 200


def test_anthropics_blocks_have_the_characters_of_their_documents(server: Served, written: list[str]) -> None:
    blocks = server.post("/v1/messages", anthropic_body()).json()["content"]
    assert [block["text"] for block in blocks] == [
        "It was bought in 1931.", " The office cat is Minka.", " Good (x.md:1-2)."
    ]  # fmt: skip
    for block, (index, text) in zip(blocks, enumerate((HARBOUR, CATS)), strict=False):
        [citation] = block["citations"]
        assert citation["type"] == "char_location" and citation["document_index"] == index
        assert text[citation["start_char_index"] : citation["end_char_index"]] == citation["cited_text"]
    assert blocks[0]["citations"][0]["cited_text"] == HARBOUR[11:-1] and "citations" not in blocks[2]


def test_anthropics_stream_has_the_same_blocks(server: Served, written: list[str]) -> None:
    blocks: list[dict[str, Any]] = []
    for event in events(server, "/v1/messages", anthropic_body()):
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
        elif event["type"] == "content_block_delta" and event["delta"]["type"] == "citations_delta":
            blocks[event["index"]].setdefault("citations", []).append(event["delta"]["citation"])
        elif event["type"] == "content_block_delta":
            blocks[event["index"]]["text"] += event["delta"]["text"]
    assert blocks == server.post("/v1/messages", anthropic_body()).json()["content"]
    again = anthropic_body()
    again["messages"] += [{"role": "assistant", "content": blocks}, {"role": "user", "content": CRANE}]
    assert server.post("/v1/messages", again).status_code == 200


def test_without_citations_the_answer_is_one_text(server: Served, written: list[str]) -> None:
    [block] = server.post("/v1/messages", anthropic_body(enabled=False)).json()["content"]
    assert block == {"type": "text", "text": "".join(PIECES).replace("[x.md:1-2]", "(x.md:1-2)")}


def test_a_question_far_from_the_documents_is_not_asked(server: Served, written: list[str]) -> None:
    found = server.post("/v1/chat/completions", openai_body(FAR)).json()
    assert found["choices"][0]["message"]["content"] == NOT_FOUND and found["usage"]["completion_tokens"] == 0
    assert found["choices"][0]["message"]["annotations"] == [] and found["choices"][0]["finish_reason"] == "stop"
    streamed = events(server, "/v1/chat/completions", openai_body(FAR))
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in streamed) == NOT_FOUND
    assert server.post("/v1/messages", anthropic_body(FAR)).json()["content"] == [{"type": "text", "text": NOT_FOUND}]
    assert written == []


def test_the_model_itself_answers_from_documents(server: Served) -> None:
    body = openai_body(max_tokens=8, temperature=0.0)
    message = server.post("/v1/chat/completions", body).json()
    plain = server.post("/v1/chat/completions", body | {"documents": None}).json()
    assert message["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 30
    streamed = events(server, "/v1/chat/completions", body)
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in streamed)
    assert text == message["choices"][0]["message"]["content"] and text


def test_refusals_name_the_field(server: Served, chat: str) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    assistant = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    cases: list[tuple[dict[str, Any], str]] = [
        (openai_body(response_format=schema), "documents has citations"),
        (openai_body(messages=assistant), "documents answer a question"),
        (openai_body(documents=[{"text": "a\0b"}]), "binary"),
        (openai_body(documents=[{"title": "a]b", "text": "x"}]), "documents"),
        (openai_body(documents=[]), "documents"),
        (openai_body(model="minilm"), "for this, ask chat-en"),
    ]
    for body, told in cases:
        found = server.post("/v1/chat/completions", body)
        assert found.status_code == 400 and told in found.json()["error"]["message"], found.text
    body = anthropic_body()
    body["messages"][0]["content"][0]["citations"] = {"enabled": False}
    assert "for all documents" in server.post("/v1/messages", body).text
    body["messages"][0]["content"][0]["source"] = {"type": "base64", "media_type": "application/pdf", "data": "x"}
    assert "type text" in server.post("/v1/messages", body).text
    with running([chat], Limits(), Access()) as alone:
        found = alone.post("/v1/chat/completions", openai_body(model="chat"))
        assert found.status_code == 400 and "keifu serve MODEL minilm" in found.text

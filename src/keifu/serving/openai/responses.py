"""/v1/responses: OpenAI's newer form of a conversation, whose earlier turns the server keeps in memory."""

from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from keifu.generation.text.sampling_params import ANSWER_TOKENS
from keifu.serving.errors import ApiError
from keifu.serving.models import ServedModels
from keifu.serving.openai.generation import REASONS, Answer, prepare
from keifu.serving.openai.schemas import ResponseRequest
from keifu.serving.streaming import EventStream, json_response, whole

Messages = list[dict[str, Any]]
KEPT_RESPONSES, KEPT_CHARACTERS = 1000, 2**26


class Stored:
    """Responses and the conversations that they end, by id; the oldest are forgotten where there is no more room."""

    def __init__(self) -> None:
        self.entries: OrderedDict[str, tuple[dict[str, Any], Messages]] = OrderedDict()
        self.characters = 0

    def add(self, response: dict[str, Any], messages: Messages) -> None:
        """Keeps one."""
        self.entries[response["id"]] = response, messages
        self.characters += _size(messages)
        while len(self.entries) > KEPT_RESPONSES or (self.characters > KEPT_CHARACTERS and len(self.entries) > 1):
            self.remove(next(iter(self.entries)))

    def find(self, name: str) -> tuple[dict[str, Any], Messages]:
        """One by its id; an unknown one is an `ApiError`."""
        if name not in self.entries:
            text = f"There is no response {name!r}: it was not stored, or has been forgotten."
            raise ApiError(404, text, "previous_response_id", "response_not_found")
        return self.entries[name]

    def remove(self, name: str) -> None:
        """Forgets one."""
        self.find(name)
        self.characters -= _size(self.entries.pop(name)[1])


def _size(messages: Messages) -> int:
    return sum(len(message["content"]) for message in messages)


def routes(models: ServedModels) -> APIRouter:
    """The routes, for these models."""
    router = APIRouter()
    stored = Stored()

    @router.post("/v1/responses", summary="Answer a conversation that the server keeps", tags=["text"])
    async def create(body: ResponseRequest, request: Request) -> Response:
        earlier = stored.find(body.previous_response_id)[1] if body.previous_response_id else []
        messages = [*earlier, *body.messages]
        told: Messages = [{"role": "system", "content": body.instructions}] if body.instructions else []

        def prompts(tokenizer: Any) -> list[list[int]]:
            return [tokenizer.render_chat([*told, *messages])]

        answer = await prepare(models, body, "chat", prompts, "resp", ANSWER_TOKENS, body.schema)
        turn = Turn(answer, body, messages, None if body.store is False else stored)
        if body.stream:
            return EventStream(turn.events(), models.limits.timeout, named=True)
        return await whole(request, turn.response())

    @router.get("/v1/responses/{name}", summary="A response that was stored", tags=["text"])
    async def retrieve(name: str) -> Response:
        return json_response(stored.find(name)[0])

    @router.delete("/v1/responses/{name}", summary="Forget a response", tags=["text"])
    async def delete(name: str) -> Response:
        stored.remove(name)
        return json_response({"id": name, "object": "response", "deleted": True})

    return router


class Turn:
    """One answer as it is written. messages: the conversation before it; stored: where it is kept, if at all."""

    def __init__(self, answer: Answer, body: ResponseRequest, messages: Messages, stored: Stored | None):
        self.answer, self.body, self.messages, self.stored = answer, body, messages, stored
        self.text, self.reason = "", "stop"
        self.item_id = f"msg_{answer.id}"

    async def response(self) -> dict[str, Any]:
        """The whole response."""
        async with aclosing(self.answer.pieces()) as pieces:
            async for _, piece in pieces:
                self.text += piece.text
                self.reason = REASONS[piece.finish_reason or "stop"]
        return self._finish()

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The response as events, numbered."""
        number = 0
        async with aclosing(self._events()) as events:
            async for event in events:
                yield {**event, "sequence_number": number}
                number += 1

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        begun = self._object("in_progress")
        item = {"output_index": 0, "item_id": self.item_id, "content_index": 0}
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        yield {"type": "response.output_item.added", "output_index": 0, "item": self._item("in_progress", [])}
        yield {"type": "response.content_part.added", **item, "part": _part("")}
        async with aclosing(self.answer.pieces()) as pieces:
            async for _, piece in pieces:
                self.text += piece.text
                self.reason = REASONS[piece.finish_reason or "stop"]
                if piece.text:
                    yield {"type": "response.output_text.delta", **item, "delta": piece.text, "logprobs": []}
        yield {"type": "response.output_text.done", **item, "text": self.text, "logprobs": []}
        yield {"type": "response.content_part.done", **item, "part": _part(self.text)}
        found = self._finish()
        yield {"type": "response.output_item.done", "output_index": 0, "item": found["output"][0]}
        yield {"type": f"response.{found['status']}", "response": found}

    def _finish(self) -> dict[str, Any]:
        """The finished response, stored where it is to be."""
        found = self._object("completed" if self.reason == "stop" else "incomplete")
        if self.stored is not None:
            self.stored.add(found, [*self.messages, {"role": "assistant", "content": self.text}])
        return found

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "message", "id": self.item_id, "status": status, "role": "assistant", "content": content}

    def _object(self, status: str) -> dict[str, Any]:
        answer, body, going = self.answer, self.body, status == "in_progress"
        sampling = answer.requests[0].sampling
        return {
            "id": answer.id,
            "object": "response",
            "created_at": answer.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": answer.description.name,
            "output": [] if going else [self._item(status, [_part(self.text)])],
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "seed": answer.seed,
            "store": self.stored is not None,
            "temperature": sampling.temperature,
            "text": {"format": body.form},
            "tool_choice": "auto",
            "tools": [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None if going else _usage(answer.usage),
            "user": body.user,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: dict[str, int]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }

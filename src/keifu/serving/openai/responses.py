"""/v1/responses: OpenAI's newer API for conversations, whose earlier turns the server stores in memory."""

import json
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Response

from keifu.serving.errors import ApiError
from keifu.serving.models import ServedModels
from keifu.serving.openai.generation import Answer, prepare_chat
from keifu.serving.openai.items import CallItem, Item, ReasoningItem, ReferenceItem
from keifu.serving.openai.schemas import ResponseRequest
from keifu.serving.openai.tools import THOUGHTS, Delta
from keifu.serving.streaming import STREAM, EventStream, json_response

Messages = list[dict[str, Any]]
KEPT_RESPONSES, KEPT_BYTES = 1000, 2**26
ITEMS = {"message": Item, "reasoning": ReasoningItem, "function_call": CallItem}
ITEM_ID = re.compile(r"(?:msg|rs|fc)_([0-9a-f]{32})_\d+")  # it contains the id of its response


class StoredResponses:
    """Responses with their conversations, by id, as JSON. The oldest are dropped if there is no room."""

    def __init__(self) -> None:
        self.entries: OrderedDict[str, bytes] = OrderedDict()
        self.bytes = 0

    def add(self, response: dict[str, Any], messages: Messages) -> None:
        """Store a response."""
        entry = json.dumps([response, messages]).encode()  # objects would take more memory than the bytes suggest
        self.entries[response["id"]] = entry
        self.bytes += len(entry)
        while len(self.entries) > KEPT_RESPONSES or self.bytes > KEPT_BYTES:
            self.remove(next(iter(self.entries)))

    def find(self, name: str) -> tuple[dict[str, Any], Messages]:
        """Return a response and its conversation. Raises `ApiError` for an unknown id."""
        if name not in self.entries:
            text = f"There is no response {name!r}: it was not stored, or has been forgotten."
            raise ApiError(404, text, "previous_response_id", "response_not_found")
        response, messages = json.loads(self.entries[name])
        return response, messages

    def resolve(self, items: Sequence[Any]) -> list[Any]:
        """Return the items of an input; stored items replace references. Raises `ApiError` for an unknown
        id."""
        return [self._item(item.id) if isinstance(item, ReferenceItem) else item for item in items]

    def _item(self, name: str) -> Any:
        match = ITEM_ID.fullmatch(name)
        output = self.find(f"resp_{match[1]}")[0]["output"] if match and f"resp_{match[1]}" in self.entries else []
        for item in output:
            if item["id"] == name:
                return ITEMS[item["type"]].model_validate(item)
        text = f"There is no item {name[:100]!r}: it was not stored, or has been forgotten; send whole items, as with "
        raise ApiError(404, f"{text}store: false.", "input", "item_not_found")

    def remove(self, name: str) -> None:
        """Remove a response."""
        if name not in self.entries:
            self.find(name)
        self.bytes -= len(self.entries.pop(name))


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for these models."""
    stored = StoredResponses()

    @app.post("/v1/responses", summary="Answer a conversation that is kept", tags=["text"], responses=STREAM)
    async def create(body: ResponseRequest) -> Response:
        earlier = stored.find(body.previous_response_id)[1] if body.previous_response_id else []
        if not isinstance(body.input, str):
            body.input = stored.resolve(body.input)
        messages = [*earlier, *body.messages]
        first: Messages = [{"role": "system", "content": body.instructions}] if body.instructions else []
        answer = await prepare_chat(models, body, [*first, *messages], "resp_", body.schema)
        turn = Turn(answer, body, messages, None if body.store is False else stored)
        if body.stream:
            return EventStream(turn.events(), models.limits.timeout, names_events=True)
        return json_response(await turn.response())

    @app.get("/v1/responses/{name}", summary="A response that was stored", tags=["text"])
    async def retrieve(name: str) -> Response:
        return json_response(stored.find(name)[0])

    @app.delete("/v1/responses/{name}", summary="Forget a response", tags=["text"])
    async def delete(name: str) -> Response:
        stored.remove(name)
        return json_response({"id": name, "object": "response", "deleted": True})


class Turn:
    """Growing response. messages: the conversation before it. stored: the store that keeps it, if any."""

    def __init__(self, answer: Answer, body: ResponseRequest, messages: Messages, stored: StoredResponses | None):
        self.answer, self.body, self.messages, self.stored = answer, body, messages, stored
        self.reply = answer.replies[0]
        self.output: list[dict[str, Any]] = []  # items; the last may be unfinished

    async def response(self) -> dict[str, Any]:
        """Return the whole response."""
        async with aclosing(self._events()) as events:
            async for event in events:
                if "response" in event:
                    answer = event["response"]
        return answer

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the response as numbered events."""
        number = 0
        async with aclosing(self._events()) as events:
            async for event in events:
                yield {**event, "sequence_number": number}
                number += 1

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        begun = self._object("in_progress")
        yield {"type": "response.created", "response": begun}
        yield {"type": "response.in_progress", "response": begun}
        async with aclosing(self.answer.pieces()) as pieces:
            async for choice, piece in pieces:
                for part in self.answer.push(choice, piece):
                    for event in self._go_on(part):
                        yield event
        for event in self._go_on(Delta()) if not self.output else ():
            yield event
        cut = self.reply.finish_reason == "length"
        for event in self._end("incomplete" if cut or self.reply.unfinished else "completed"):
            yield event
        answer = self._finish("incomplete" if cut else "completed")
        yield {"type": f"response.{answer['status']}", "response": answer}

    def _go_on(self, part: Delta) -> Iterator[dict[str, Any]]:
        """Yield the events of the next delta, after those of a new item if it begins one."""
        item_type = "reasoning" if part.call == THOUGHTS else "function_call" if part.call >= 0 else "message"
        if not self.output or part.name or self.output[-1]["type"] != item_type:
            yield from self._end("completed")
            index = len(self.output)
            make_item = _thoughts if item_type == "reasoning" else _message
            self.output.append(self._call(index, part) if part.name else make_item(index, self.answer.id))
            item = {**self.output[-1], "content": []} if not part.name else self.output[-1]
            yield {"type": "response.output_item.added", "output_index": index, "item": dict(item)}
            if not part.name:
                first = dict(self.output[-1]["content"][0])
                yield {"type": "response.content_part.added", **self._place(), "content_index": 0, "part": first}
        item = self.output[-1]
        if part.content:
            item["content"][0]["text"] += part.content
            delta_fields = {"content_index": 0, "delta": part.content} | (
                {} if item_type == "reasoning" else {"logprobs": []}
            )
            yield {"type": f"response.{item['content'][0]['type']}.delta", **self._place(), **delta_fields}
        if part.arguments:
            item["arguments"] += part.arguments
            yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": part.arguments}

    def _end(self, status: str) -> Iterator[dict[str, Any]]:
        """Yield the events at the end of the last item, if there is one."""
        if not self.output:
            return
        item, index = self.output[-1], self._place()
        item["status"] = status
        if item["type"] != "function_call":
            part = dict(item["content"][0])
            text = {"content_index": 0, **{name: part[name] for name in ("text", "logprobs") if name in part}}
            yield {"type": f"response.{part['type']}.done", **index, **text}
            yield {"type": "response.content_part.done", **index, "content_index": 0, "part": part}
        else:
            call = {"name": item["name"], "arguments": item["arguments"]}
            yield {"type": "response.function_call_arguments.done", **index, **call}
        yield {"type": "response.output_item.done", "output_index": index["output_index"], "item": dict(item)}

    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self.output) - 1, "item_id": self.output[-1]["id"]}

    def _call(self, index: int, part: Delta) -> dict[str, Any]:
        call = {"call_id": self.reply.calls[part.call]["id"], "name": part.name, "arguments": ""}
        return {"type": "function_call", "id": _item_id("fc", self.answer.id, index), "status": "in_progress", **call}

    def _finish(self, status: str) -> dict[str, Any]:
        """Return the finished response, and store it if requested."""
        answer_object = self._object(status)
        if self.stored is not None:
            calls = {"tool_calls": self.reply.calls} if self.reply.calls and not self.reply.unfinished else {}
            thoughts = {"reasoning_content": self.reply.reasoning} if self.reply.reasoning else {}
            answer = {"role": "assistant", "content": self.reply.text, **calls, **thoughts}
            earlier, last = self.messages, self.messages[-1]
            if not calls and len(earlier) > 1 and last["role"] == "assistant" and "tool_calls" not in last:
                answer["content"] = last["content"] + answer["content"]  # the answer continues that message
                earlier = earlier[:-1]
            self.stored.add(answer_object, [*earlier, answer])
        return answer_object

    def _object(self, status: str) -> dict[str, Any]:
        answer, body, going = self.answer, self.body, status == "in_progress"
        sampling = answer.requests[0].sampling
        parallel = answer.tools.parallel if answer.tools else body.parallel_tool_calls is not False
        tools = [{"strict": True, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()]
        request_fields = {
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "user": body.user,
            "metadata": body.metadata or {}, "parallel_tool_calls": parallel,
            "previous_response_id": body.previous_response_id, "text": {"format": body.form}, "tools": tools,
            "tool_choice": body.model_dump(include={"tool_choice"})["tool_choice"] or "auto", "truncation": "disabled",
        }  # fmt: skip
        return {
            **request_fields, "id": answer.id, "object": "response", "created_at": answer.created, "status": status,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": answer.description.name, "output": [] if going else self.output, "seed": answer.seed,
            "store": self.stored is not None, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "usage": None if going else _usage(answer.usage),
        }  # fmt: skip


def _item_id(prefix: str, response: str, index: int) -> str:
    return f"{prefix}_{response.removeprefix('resp_')}_{index}"


def _message(index: int, name: str) -> dict[str, Any]:
    item = {"type": "message", "id": _item_id("msg", name, index), "status": "in_progress", "role": "assistant"}
    return {**item, "content": [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]}


def _thoughts(index: int, name: str) -> dict[str, Any]:
    item = {"type": "reasoning", "id": _item_id("rs", name, index), "status": "in_progress", "summary": []}
    return {**item, "content": [{"type": "reasoning_text", "text": ""}]}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    input_usage = {"input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"]}
    details = {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]}
    output_usage = {"output_tokens": usage["completion_tokens"], "output_tokens_details": details}
    return {**input_usage, **output_usage, "total_tokens": usage["total_tokens"]}

"""/api/chat, /api/tags and /api/version: the paths used by clients of ollama."""

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Response
from pydantic import Field

from keifu import __version__
from keifu.serving.models import ServedModels
from keifu.serving.openai.chat import begin_from
from keifu.serving.openai.generation import Answer
from keifu.serving.openai.schemas import Body, Neutral
from keifu.serving.openai.tools import THOUGHTS
from keifu.serving.streaming import STREAM, LineStream, json_response

OPTIONS = {  # ollama's names, and OpenAI's
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "seed": "seed", "stop": "stop",
    "num_predict": "max_tokens", "repeat_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}  # fmt: skip


class OllamaFunction(Body):
    """Function that the model called, with its arguments."""

    name: str
    arguments: dict[str, Any] = {}
    index: int | None = None
    ignored: ClassVar[Neutral] = {"description": ()}


class OllamaCall(Body):
    """Call of a function, written by the model earlier."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: OllamaFunction


class OllamaMessage(Body):
    """Message of a conversation."""

    role: str
    content: str = ""
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    images: list[str] | None = None  # in base64
    ignored: ClassVar[Neutral] = {"thinking": ("",)}


class OllamaChat(Body):
    """POST /api/chat. Options for ollama's engine are ignored."""

    model: str = ""
    messages: Annotated[list[OllamaMessage], Field(min_length=1)]
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    ignored: ClassVar[Neutral] = {"keep_alive": (), "think": (False,)}


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for these models."""

    @app.post("/api/chat", summary="Answer a conversation (ollama)", tags=["other clients"], responses=STREAM)
    async def chat(body: OllamaChat) -> Response:
        answer = await begin_from(models, _fields(body), "ollama-")
        if body.stream:
            return LineStream(_lines(answer), models.limits.timeout, named=True)
        return json_response(await _all(answer))

    @app.get("/api/tags", summary="The models that chat (ollama)", tags=["other clients"])
    async def tags() -> Response:
        chatting = [description for description in models.descriptions.values() if "chat" in description.uses]
        began = datetime.fromtimestamp(models.began, UTC).isoformat()
        entries = [{"name": model.name, "model": model.name, "size": model.size} for model in chatting]
        more = {"modified_at": began, "digest": "", "details": {"family": "keifu", "format": "safetensors"}}
        return json_response({"models": [entry | more for entry in entries]})

    @app.get("/api/version", summary="The version of keifu (ollama)", tags=["other clients"])
    async def version() -> Response:
        return json_response({"version": __version__})


def _fields(body: OllamaChat) -> dict[str, Any]:
    """Return the request in OpenAI's fields."""
    options = body.options or {}
    kept = {ours: options[name] for name, ours in OPTIONS.items() if options.get(name) is not None}
    if isinstance(kept.get("max_tokens"), int) and kept["max_tokens"] < 0:  # negative: unlimited
        del kept["max_tokens"]
    form: Any = {"type": "json_object"} if body.format == "json" else None
    if isinstance(body.format, dict):
        form = {"type": "json_schema", "json_schema": {"name": "format", "schema": body.format}}
    turns, number = [], 0
    for turn in body.messages:
        calls = []
        for call in turn.tool_calls or ():
            named = {"name": call.function.name, "arguments": json.dumps(call.function.arguments)}
            calls.append({"id": f"call{len(turns)}x{len(calls)}", "type": "function", "function": named})
        more: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if turn.role == "tool":
            more = {"tool_call_id": f"call{number}x0", "name": turn.tool_name}
        number = len(turns) if calls else number
        parts: list[Any] = [{"type": "text", "text": turn.content}]
        parts += [{"type": "image_url", "image_url": {"url": f"data:;base64,{image}"}} for image in turn.images or ()]
        turns.append({"role": turn.role, "content": parts if turn.images else turn.content, **more})
    # ollama's clients append ":latest" to a name without a tag
    model = body.model.removesuffix(":latest")
    return {"model": model, "messages": turns, "tools": body.tools or None, "response_format": form, **kept}


async def _lines(answer: Answer) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the parts of an answer, then its figures. Each call is sent as a whole."""
    begin, first, reply = time.monotonic_ns(), 0, answer.replies[0]

    def line(message: dict[str, Any], **more: Any) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat()
        whole_message = {"role": "assistant", "content": "", **message}
        return {"model": answer.description.name, "created_at": now, "message": whole_message, "done": False, **more}

    async with aclosing(answer.pieces()) as pieces:
        async for choice, piece in pieces:
            first = first or time.monotonic_ns()
            for part in answer.push(choice, piece):
                if part.content:
                    yield line({"thinking" if part.call == THOUGHTS else "content": part.content})
    functions = [call["function"] for call in reply.calls[: len(reply.calls) - reply.unfinished]]
    calls = [{"function": {**call, "arguments": json.loads(call["arguments"] or "{}")}} for call in functions]
    if calls:
        yield line({"tool_calls": calls})
    end, usage = time.monotonic_ns(), answer.usage
    yield line(
        {}, done=True, done_reason="length" if reply.finish_reason == "length" else "stop", total_duration=end - begin,
        load_duration=0, prompt_eval_count=usage["prompt_tokens"], prompt_eval_duration=first - begin,
        eval_count=usage["completion_tokens"], eval_duration=end - first,
    )  # fmt: skip


async def _all(answer: Answer) -> dict[str, Any]:
    """Return the whole answer."""
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    whole: dict[str, Any] = {}
    async with aclosing(_lines(answer)) as lines:
        async for line in lines:
            message["content"] += line["message"]["content"]
            if thought := line["message"].get("thinking"):
                message["thinking"] = message.get("thinking", "") + thought
            message |= {"tool_calls": calls} if (calls := line["message"].get("tool_calls")) else {}
            whole = line
    return {**whole, "message": message}

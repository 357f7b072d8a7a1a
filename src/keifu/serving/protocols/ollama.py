"""/api/chat and /api/generate: answers for clients of ollama, whole or as a stream."""

import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Response
from pydantic import Field

from keifu.inference.text.request import prompt_tokens
from keifu.inference.text.sampling_params import ANSWER_TOKENS, SETTINGS
from keifu.serving.errors import TEXT_ERRORS, ApiError
from keifu.serving.facts import current
from keifu.serving.models import ServedModels
from keifu.serving.openai.body import Body, Neutral
from keifu.serving.openai.chat import begin_from, thinking_options, token_entries
from keifu.serving.openai.generation import Answer, prepare
from keifu.serving.openai.schemas import CompletionRequest
from keifu.serving.openai.tools import THOUGHTS
from keifu.serving.streaming import STREAM, LineStream, json_response

OPTIONS = {  # ollama's names, and OpenAI's
    row.setting.ollama or name: name for name, row in SETTINGS.items() if row.setting.on_command_line
}
RESPONSES = STREAM | TEXT_ERRORS


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
    allows_null: ClassVar[bool] = True


class OllamaRequest(Body):
    """Fields of /api/chat and /api/generate. Options for ollama's engine are ignored. keep_alive: 0, in a request
    without a prompt, unloads the model; otherwise --keep-alive decides."""

    model: str = ""
    stream: bool = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: float | str | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def name(self) -> str:
        """Id of the model. ollama's clients append ":latest" to a name without a tag."""
        return self.model.removesuffix(":latest")

    @property
    def schema(self) -> dict[str, Any] | None:
        """Schema that the text must follow; None for any text."""
        return {"type": "object"} if self.format == "json" else self.format or None  # type: ignore[return-value]

    def settings(self) -> dict[str, Any]:
        """Return the options in OpenAI's fields. A negative number of tokens is no limit, a negative seed is none."""
        options = self.options or {}
        fields = {ours: options[name] for name, ours in OPTIONS.items() if options.get(name) is not None}
        for name in ("max_tokens", "seed"):
            if isinstance(fields.get(name), int) and fields[name] < 0:
                del fields[name]
        return fields


class OllamaChat(OllamaRequest):
    """POST /api/chat. Without messages the model is only loaded."""

    messages: list[OllamaMessage] = []
    tools: list[dict[str, Any]] | None = None


class OllamaGenerate(OllamaRequest):
    """POST /api/generate. Without a prompt the model is only loaded. raw: whether the prompt is continued as it is,
    without a chat template, as a base model always does."""

    prompt: str = ""
    system: str | None = None
    images: list[str] | None = None  # in base64
    raw: bool = False
    refused: ClassVar[Neutral] = {"suffix": ("",), "template": ("",), "context": ([],)}


Form = Callable[[dict[str, Any]], dict[str, Any]]


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the routes for these models."""

    async def sent(answer: Answer, body: OllamaRequest, form: Form) -> Response:
        if body.stream:
            return LineStream(_lines(answer, body, form), models.limits.timeout, names_events=True)
        return json_response(await _full_answer(answer, body, form))

    async def loaded(body: OllamaRequest, form: Form) -> Response:
        name = models.description_of(body.name).name
        if body.keep_alive in (0, "0", "0s") and (name not in models.workers or models.unload(name)):
            return json_response(_head(name) | form({}) | {"done": True, "done_reason": "unload"})
        await models.worker(name).call(lambda *_: None)
        return json_response(_head(name) | form({}) | {"done": True, "done_reason": "load"})

    @app.post("/api/chat", summary="Answer a conversation (ollama)", tags=["other clients"], responses=RESPONSES)
    async def chat(body: OllamaChat) -> Response:
        if not body.messages:
            return await loaded(body, _chat_form)
        fields = _conversation(body, models, _turns(body.messages)) | {"tools": body.tools or None}
        return await sent(await begin_from(models, fields, "ollama-"), body, _chat_form)

    @app.post("/api/generate", summary="Answer a prompt (ollama)", tags=["other clients"], responses=RESPONSES)
    async def generate(body: OllamaGenerate) -> Response:
        if not body.prompt and not body.images:
            return await loaded(body, _generate_form)
        if body.raw or "chat" not in models.description_of(body.name).uses:
            if body.images or body.system:
                raise ApiError(400, "A prompt without a chat template has no images and no system: leave them out.")
            return await sent(await _continuation(body, models), body, _generate_form)
        first = [OllamaMessage(role="system", content=body.system)] if body.system else []
        message = OllamaMessage(role="user", content=body.prompt, images=body.images)
        fields = _conversation(body, models, _turns([*first, message]))
        return await sent(await begin_from(models, fields, "ollama-"), body, _generate_form)


def _conversation(body: OllamaRequest, models: ServedModels, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a request for these messages in OpenAI's fields."""
    current().ignored += ["keep_alive"] * (body.keep_alive is not None)
    form: Any = {"type": "json_object"} if body.format == "json" else None
    if isinstance(body.format, dict):
        form = {"type": "json_schema", "json_schema": {"name": "format", "schema": body.format}}
    thinking = None
    if body.think is not None:
        thinking = thinking_options(models.find(body.name, "chat"), body.think is not False, "think")
    further_fields = {"logprobs": body.logprobs, "top_logprobs": body.top_logprobs, "chat_template_kwargs": thinking}
    return {"model": body.name, "messages": turns, "response_format": form, **further_fields, **body.settings()}


async def _continuation(body: OllamaGenerate, models: ServedModels) -> Answer:
    """Return the continuation of a prompt, which has not begun."""
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    fields = {"model": body.name, "prompt": body.prompt, "max_tokens": ANSWER_TOKENS, **body.settings()}
    request = CompletionRequest.model_validate(fields | {"logprobs": logprobs})
    return await prepare(
        models, request, "completion", lambda about: [prompt_tokens(about.tokenizer, body.prompt)], "ollama-",
        body.schema,
    )  # fmt: skip


def _turns(messages: list[OllamaMessage]) -> list[dict[str, Any]]:
    """Return messages in OpenAI's form. Calls get ids, which the results after them name."""
    turns, number = [], 0
    for turn in messages:
        calls = []
        for call in turn.tool_calls or ():
            function = {"name": call.function.name, "arguments": json.dumps(call.function.arguments)}
            calls.append({"id": f"call{len(turns)}x{len(calls)}", "type": "function", "function": function})
        further_fields: dict[str, Any] = {"tool_calls": calls} if calls else {}
        if turn.role == "tool":
            further_fields = {"tool_call_id": f"call{number}x0", "name": turn.tool_name}
        number = len(turns) if calls else number
        parts: list[Any] = [{"type": "text", "text": turn.content}]
        parts += [{"type": "image_url", "image_url": {"url": f"data:;base64,{image}"}} for image in turn.images or ()]
        turns.append({"role": turn.role, "content": parts if turn.images else turn.content, **further_fields})
    return turns


def _chat_form(fields: dict[str, Any]) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": "", **fields}}


def _generate_form(fields: dict[str, Any]) -> dict[str, Any]:
    text = {"response": fields.get("content", "")}
    return text | {name: value for name, value in fields.items() if name != "content"}


def _head(name: str) -> dict[str, Any]:
    return {"model": name, "created_at": datetime.now(UTC).isoformat()}


async def _parts(answer: Answer, body: OllamaRequest) -> AsyncGenerator[tuple[dict[str, Any], dict[str, Any]], None]:
    """Yield the parts of an answer's message, each with other fields; the last ones are its figures. Each call is one
    part."""
    begin, first, reply = time.monotonic_ns(), 0, answer.replies[0]
    tokens: list[dict[str, Any]] = []

    def probabilities() -> dict[str, Any]:
        nonlocal tokens
        entries, tokens = tokens, []
        return {"logprobs": entries} if entries and body.logprobs else {}

    async with aclosing(answer.pieces()) as pieces:
        async for choice, piece in pieces:
            first = first or time.monotonic_ns()
            tokens += token_entries(answer, piece)
            for part in answer.push(choice, piece):
                if part.content:
                    yield {"thinking" if part.call == THOUGHTS else "content": part.content}, probabilities()
    functions = [call["function"] for call in reply.calls[: len(reply.calls) - reply.unfinished]]
    calls = [{"function": {**call, "arguments": json.loads(call["arguments"] or "{}")}} for call in functions]
    if calls:
        yield {"tool_calls": calls}, {}
    end, usage = time.monotonic_ns(), answer.usage
    figures = {
        "done": True, "done_reason": "length" if reply.finish_reason == "length" else "stop",
        "total_duration": end - begin, "load_duration": 0, "prompt_eval_count": usage["prompt_tokens"],
        "prompt_eval_duration": first - begin, "eval_count": usage["completion_tokens"], "eval_duration": end - first,
    }  # fmt: skip
    yield {}, figures | probabilities()


async def _lines(answer: Answer, body: OllamaRequest, form: Form) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the lines of a stream."""
    async with aclosing(_parts(answer, body)) as parts:
        async for fields, further_fields in parts:
            yield {**_head(answer.description.name), **form(fields), "done": False, **further_fields}


async def _full_answer(answer: Answer, body: OllamaRequest, form: Form) -> dict[str, Any]:
    """Return the whole answer."""
    message, all_further_fields, tokens = dict[str, Any](), dict[str, Any](), []
    async with aclosing(_parts(answer, body)) as parts:
        async for fields, further_fields in parts:
            for name, value in fields.items():
                message[name] = message[name] + value if name in message else value
            tokens += further_fields.pop("logprobs", [])
            all_further_fields |= further_fields
    return {
        **_head(answer.description.name),
        **form(message),
        **all_further_fields,
        **({"logprobs": tokens} if tokens else {}),
    }

"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API for conversations."""

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Response
from pydantic import Field

from keifu.serving.errors import ApiError
from keifu.serving.models import ServedModels
from keifu.serving.openai.chat import begin_from, thinking_options
from keifu.serving.openai.generation import Answer, count_tokens
from keifu.serving.openai.schemas import Body, ChatRequest, Neutral
from keifu.serving.openai.tools import THOUGHTS, Delta
from keifu.serving.streaming import STREAM, EventStream, json_response

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
NOT_READ = ("cache_control", "citations")  # fields of a text block
Blocks = str | list[dict[str, Any]]


class AnthropicMessage(Body):
    """Message of the user or of the assistant; a block is text, image, document, thinking, tool_use or
    tool_result."""

    role: str
    content: Blocks


class Thinking(Body):
    """Whether the model thinks before it answers. adaptive: by the default of its chat template."""

    type: Literal["enabled", "disabled", "adaptive"]
    ignored: ClassVar[Neutral] = {"budget_tokens": (), "display": ()}


class OutputFormat(Body):
    """Schema that the text of the answer must follow."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    """Format of the answer's text."""

    format: OutputFormat | None = None
    ignored: ClassVar[Neutral] = {"effort": ()}


class CountRequest(Body):
    """POST /v1/messages/count_tokens."""

    model: str = ""
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: Blocks | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    refused: ClassVar[Neutral] = {"container": (), "mcp_servers": ([],)}
    ignored: ClassVar[Neutral] = {
        "metadata": ({},), "service_tier": ("auto",), "context_management": (), "cache_control": (),
        "inference_geo": (), "speed": ("standard",),
    }  # fmt: skip


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the route for these models."""

    @app.post("/v1/messages", summary="Answer a conversation (Anthropic)", tags=["other clients"], responses=STREAM)
    async def messages(body: MessagesRequest) -> Response:
        answer = await begin_from(models, _fields(body) | {"chat_template_kwargs": _options(body, models)}, "msg_")
        if body.stream:
            return EventStream(_events(answer, _cites(body)), models.limits.timeout, names_events=True)
        return json_response(await _message(answer, _cites(body)))

    @app.post("/v1/messages/count_tokens", summary="Tokens of a conversation (Anthropic)", tags=["other clients"])
    async def count(body: CountRequest) -> Response:
        values = {name: value for name, value in _fields(body).items() if value is not None}
        request = ChatRequest.model_validate(values | {"chat_template_kwargs": _options(body, models)})
        messages = [message.plain() for message in request.messages]
        return json_response({"input_tokens": await count_tokens(models, request, messages)})


def _options(body: CountRequest, models: ServedModels) -> dict[str, Any] | None:
    """Return chat template variables that turn thoughts on or off.

    Clients turn thoughts on for any model, so one that never thinks answers without thoughts.
    """
    if body.thinking is None or body.thinking.type == "adaptive":
        return None
    return thinking_options(models.find(body.model, "chat"), body.thinking.type == "enabled", "thinking", is_hint=True)


def _fields(body: CountRequest) -> dict[str, Any]:
    """Return the request in OpenAI's fields."""
    turns = [{"role": "system", "content": _text(body.system)}] if body.system else []
    turns += [turn for message in body.messages for turn in _turns(message)]
    same = ("model", "max_tokens", "temperature", "top_k", "top_p")
    shared_fields = {name: value for name, value in vars(body).items() if name in same}
    tools = [_function(tool) for tool in body.tools or ()]
    form = body.output_config and body.output_config.format
    tool_choice = body.tool_choice or {}
    choice: Any = CHOICES.get(tool_choice.get("type", ""), tool_choice.get("type"))
    if choice == "tool":
        choice = {"type": "function", "function": {"name": tool_choice.get("name")}}
    return shared_fields | {
        "messages": turns,
        "documents": [_document(block) for block in _documents(body)] or None,
        "stop": vars(body).get("stop_sequences") or None,
        "tools": [{"type": "function", "function": tool} for tool in tools] or None,
        "tool_choice": choice if tools else None,
        "parallel_tool_calls": False if tool_choice.get("disable_parallel_tool_use") else None,
        "response_format": form
        and {"type": "json_schema", "json_schema": {"name": "output_config", "schema": form.schema_}},
    }


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool as a function in OpenAI's form. Raises an error for a tool that Anthropic's servers would run."""
    if (tool_type := tool.get("type", "custom")) not in ("custom", None):
        text = f"tools has one of the type {tool_type!r}, which this server does not run: give tools that you run."
        raise ApiError(400, text, "tools", "refused_field")
    return {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get("input_schema")}


def _text(blocks: Any) -> str:
    """Return the text of a string or of blocks. Raises an error for pictures."""
    if not isinstance(blocks, list):
        return blocks
    parts = [block for block in blocks if isinstance(block, dict)]
    if any(block.get("type") == "image" for block in parts):
        raise ApiError(400, "A picture is a block of the user's message, and of no tool_result or system.", "messages")
    return "\n".join(str(block.get("text", "")) for block in parts)


def _turns(turn: AnthropicMessage) -> Iterator[dict[str, Any]]:
    """Yield the message in OpenAI's format. Results of tools become separate messages."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    calls, blocks, thoughts = [], [], ""
    for block in turn.content:
        if block.get("type") == "thinking":
            thoughts += str(block.get("thinking", ""))
        elif block.get("type") == "tool_result":
            content = _text(block.get("content")) or ""
            yield {"role": "tool", "content": content, "tool_call_id": block.get("tool_use_id")}
        elif block.get("type") == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input"))}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif block.get("type") == "document":
            continue  # see `_documents`
        elif block.get("type") == "image":
            blocks.append({"type": "image_url", "image_url": {"url": _url(block.get("source"))}})
        else:
            blocks.append({name: value for name, value in block.items() if name not in NOT_READ})
    if blocks or calls or thoughts:
        fields = {"tool_calls": calls or None, "reasoning_content": thoughts or None}
        yield {"role": turn.role, "content": blocks or "", **{name: value for name, value in fields.items() if value}}


def _documents(body: CountRequest) -> list[dict[str, Any]]:
    """Return the document blocks of all messages."""
    blocks = [block for message in body.messages if not isinstance(message.content, str) for block in message.content]
    return [block for block in blocks if block.get("type") == "document"]


def _cites(body: CountRequest) -> bool:
    """Return whether the answer has citations. Raises an error if only some documents ask for them."""
    enabled = {bool((block.get("citations") or {}).get("enabled")) for block in _documents(body)}
    if len(enabled) > 1:
        raise ApiError(400, "citations must be enabled for all documents of a request, or for none.", "messages")
    return True in enabled


def _document(block: dict[str, Any]) -> dict[str, Any]:
    """Return a document's title and text."""
    match block.get("source"):
        case {"type": "text", "data": str(text)}:
            return {"text": text} | ({"title": block["title"]} if block.get("title") else {})
    raise ApiError(400, "A document's source has the type text, with media_type text/plain and data.", "messages")


def _url(source: Any) -> str:
    """Return the URL of a picture, or its bytes as a data URL."""
    match source:
        case {"type": "base64", "media_type": form, "data": data}:
            return f"data:{form};base64,{data}"
        case {"type": "url", "url": str(url)}:
            return url
    raise ApiError(400, "A picture's source has the type base64, with media_type and data, or url.", "messages")


async def _message(answer: Answer, cites: bool) -> dict[str, Any]:
    """Return the whole message. cites: as in `_events`."""
    message: dict[str, Any] = {}
    async with aclosing(_events(answer, cites)) as events:
        async for event in events:
            if event["type"] == "message_start":
                message = event["message"]
            elif event["type"] == "content_block_start":
                message["content"].append(event["content_block"] | {"held": ""})
            elif event["type"] == "content_block_delta" and "citation" in event["delta"]:
                message["content"][-1].setdefault("citations", []).append(event["delta"]["citation"])
            elif event["type"] == "content_block_delta":
                message["content"][-1]["held"] += next(text for name, text in event["delta"].items() if name != "type")
            elif event["type"] == "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
    for block in message["content"]:
        withheld = block.pop("held")
        block |= {"input": _object(withheld)} if block["type"] == "tool_use" else {block["type"]: withheld}
    return message


def _object(arguments: str) -> dict[str, Any]:
    """Return the arguments of a call; {} if the token limit has cut them."""
    with suppress(ValueError):
        return json.loads(arguments)
    return {}


async def _events(answer: Answer, cites: bool) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the answer as Anthropic's events. cites: whether citations of documents are part of it. A block of text
    ends after a citation, which is that of the block's last sentence."""
    reply, open_block = answer.replies[0], -1
    head = {"id": answer.id, "type": "message", "role": "assistant", "model": answer.description.name, "content": []}
    start = {**head, "stop_reason": None, "stop_sequence": None, "usage": _usage(answer)}
    yield {"type": "message_start", "message": start}
    open_call: Any = None
    async with aclosing(answer.pieces()) as pieces:
        async for choice, piece in pieces:
            for part in answer.push(choice, piece):
                if part.citation:
                    if cites and answer.citations:
                        delta = {"type": "citations_delta", "citation": answer.citations.location(part.citation)}
                        yield {"type": "content_block_delta", "index": open_block, "delta": delta}
                        open_call = None  # further text is a new block
                    continue
                if part.call != open_call or open_block < 0:
                    if open_block >= 0:
                        yield {"type": "content_block_stop", "index": open_block}
                    open_block, open_call = open_block + 1, part.call
                    block = _block(part, reply.calls)
                    yield {"type": "content_block_start", "index": open_block, "content_block": block}
                if part.content or part.arguments:
                    yield {"type": "content_block_delta", "index": open_block, "delta": _delta(part)}
    if open_block >= 0:
        yield {"type": "content_block_stop", "index": open_block}
    stop = answer.requests[0].stop_string
    ended = {"stop_reason": "stop_sequence" if stop else REASONS[reply.finish_reason], "stop_sequence": stop or None}
    yield {"type": "message_delta", "delta": ended, "usage": _usage(answer)}
    yield {"type": "message_stop"}


def _block(part: Delta, calls: list[dict[str, Any]]) -> dict[str, Any]:
    if part.call == THOUGHTS:
        return {"type": "thinking", "thinking": "", "signature": ""}
    if part.call < 0:
        return {"type": "text", "text": ""}
    return {"type": "tool_use", "id": calls[part.call]["id"], "name": part.name, "input": {}}


def _delta(part: Delta) -> dict[str, Any]:
    if part.call == THOUGHTS:
        return {"type": "thinking_delta", "thinking": part.content}
    if part.call < 0:
        return {"type": "text_delta", "text": part.content}
    return {"type": "input_json_delta", "partial_json": part.arguments}


def _usage(answer: Answer) -> dict[str, Any]:
    usage = answer.usage
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    input_usage = {"input_tokens": usage["prompt_tokens"] - cached, "cache_read_input_tokens": cached}
    return {**input_usage, "output_tokens": usage["completion_tokens"]}

"""POST /v1/chat/completions: answers to messages, whole or as a stream."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import Response

from keifu.generation.images.prompts import ImagePrompt
from keifu.generation.text.request import Piece
from keifu.serving.models import Description, ServedModels
from keifu.serving.openai.generation import Answer, check_count, finish_reason, prepare, token_bytes, token_text
from keifu.serving.openai.pictures import open_images
from keifu.serving.openai.schemas import ChatRequest
from keifu.serving.openai.tools import Delta, Reply, render
from keifu.serving.streaming import STREAM, EventStream, whole


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the route for these models."""

    @app.post("/v1/chat/completions", summary="Answer a conversation", tags=["text"], responses=STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        answer = await begin(models, body, "chatcmpl")
        if body.stream:
            return EventStream(_events(answer, body), models.limits.timeout)
        return await whole(request, _completion(answer, body))


async def begin(models: ServedModels, body: ChatRequest, prefix: str) -> Answer:
    """Check a conversation and return its answer, which has not begun. prefix: first part of its id."""
    tools = body.tool_use()
    schema = body.response_format.schema if body.response_format else None
    options = body.chat_template_kwargs or {}

    def prompts(about: Description) -> list[list[int] | ImagePrompt]:
        check_count(len(body.messages), about)
        messages = open_images([message.plain() for message in body.messages], models.limits.pictures)
        return [render(about.tokenizer, messages, tools.functions if tools else (), about.config, **options)]

    return await prepare(models, body, "chat", prompts, prefix, schema, tools)


async def begin_from(models: ServedModels, fields: dict[str, Any], prefix: str) -> Answer:
    """Return the answer to a conversation in OpenAI's fields, translated from another protocol."""
    try:
        body = ChatRequest.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    return await begin(models, body, prefix)


async def _completion(answer: Answer, body: ChatRequest) -> dict[str, Any]:
    """Return the whole answer."""
    replies = [answer.reply() for _ in answer.requests]
    reasons: list[str] = ["length" for _ in answer.requests]
    tokens: list[list[dict[str, Any]]] = [[] for _ in answer.requests]
    async with aclosing(answer.pieces()) as pieces:
        async for choice, piece in pieces:
            replies[choice].push(piece.text, piece.finish_reason is not None)
            reasons[choice] = finish_reason(piece, replies[choice]) or "length"
            tokens[choice] += _tokens(answer, piece)
    choices = [
        {
            "index": choice,
            "message": _message(reply),
            "logprobs": {"content": tokens[choice], "refusal": None} if body.logprobs else None,
            "finish_reason": reasons[choice],
        }
        for choice, reply in enumerate(replies)
    ]
    return {**answer.head("chat.completion"), "choices": choices, "usage": answer.usage}


def _message(reply: Reply) -> dict[str, Any]:
    calls = {"tool_calls": reply.calls} if reply.calls else {}
    thoughts = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
    return {"role": "assistant", "content": reply.text or (None if calls else ""), "refusal": None, **thoughts, **calls}


def _delta(part: Delta, reply: Reply) -> dict[str, Any]:
    """Return a part of an answer in the API's format. The first part of a call has its id and name."""
    if part.call < 0:
        return {"content": part.content}
    if not part.name:
        return {"tool_calls": [{"index": part.call, "function": {"arguments": part.arguments}}]}
    call = {"index": part.call, "id": reply.calls[part.call]["id"], "type": "function"}
    return {"tool_calls": [{**call, "function": {"name": part.name, "arguments": ""}}]}


async def _events(answer: Answer, body: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the answer in chunks. The probability of a token comes with the text that it completes."""
    head = answer.head("chat.completion.chunk")
    usage = {"usage": None} if body.includes_usage else {}
    tokens: list[list[dict[str, Any]]] = [[] for _ in answer.requests]
    replies = [answer.reply() for _ in answer.requests]

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        logprobs = {"content": tokens[index], "refusal": None} if body.logprobs and tokens[index] else None
        tokens[index] = []
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice], **usage}

    for index in range(len(answer.requests)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async with aclosing(answer.pieces()) as pieces:
        async for index, piece in pieces:
            tokens[index] += _tokens(answer, piece)
            parts = replies[index].push(piece.text, piece.finish_reason is not None)
            if replies[index].thought:
                yield chunk(index, {"reasoning_content": replies[index].thought})
            for part in parts:
                yield chunk(index, _delta(part, replies[index]))
            if piece.finish_reason:
                yield chunk(index, {}, finish_reason(piece, replies[index]))
    if body.includes_usage:
        yield {**head, "choices": [], "usage": answer.usage}


def _tokens(answer: Answer, piece: Piece) -> list[dict[str, Any]]:
    """Return a token with its probability and those of the likeliest tokens, if they were requested.

    The sampled token is always included, as in OpenAI's answers: after the likeliest if it is not one of them.
    """
    tokenizer = answer.description.tokenizer
    if piece.log_probability is None or piece.token in tokenizer.stop_ids:
        return []

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": token_text(tokenizer, token), "logprob": value, "bytes": [*token_bytes(tokenizer, token)]}

    chosen = piece.token, piece.log_probability
    top = list(piece.top_log_probabilities)
    if top and piece.token not in dict(top):
        top.append(chosen)
    return [{**entry(*chosen), "top_logprobs": [entry(*pair) for pair in top]}]

"""POST /v1/chat/completions: messages in, an answer out, whole or as a stream."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response

from keifu.generation.text.request import Piece
from keifu.serving.models import ServedModels
from keifu.serving.openai.generation import Answer, finish_reason, prepare, token_bytes, token_text
from keifu.serving.openai.schemas import ChatRequest
from keifu.serving.openai.tools import Delta, Reply, render
from keifu.serving.streaming import STREAM, EventStream, whole


def routes(app: FastAPI, models: ServedModels) -> None:
    """The route, for these models."""

    @app.post("/v1/chat/completions", summary="Answer a conversation", tags=["text"], responses=STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        def prompts(tokenizer: Any) -> list[list[int]]:
            return [render(tokenizer, [message.plain() for message in body.messages], tools.functions if tools else ())]

        tools = body.tool_use()
        schema = body.response_format.schema if body.response_format else None
        answer = await prepare(models, body, "chat", prompts, "chatcmpl", schema, tools)
        if body.stream:
            return EventStream(_events(answer, body), models.limits.timeout)
        return await whole(request, _completion(answer, body))


async def _completion(answer: Answer, body: ChatRequest) -> dict[str, Any]:
    """The whole answer."""
    replies = [answer.reply() for _ in answer.requests]
    reasons: list[str] = ["length" for _ in answer.requests]
    tokens: list[list[dict[str, Any]]] = [[] for _ in answer.requests]
    async with aclosing(answer.pieces()) as pieces:
        async for place, piece in pieces:
            replies[place].push(piece.text, piece.finish_reason is not None)
            reasons[place] = finish_reason(piece, replies[place]) or "length"
            tokens[place] += _tokens(answer, piece)
    choices = [
        {
            "index": place,
            "message": _message(reply),
            "logprobs": {"content": tokens[place], "refusal": None} if body.logprobs else None,
            "finish_reason": reasons[place],
        }
        for place, reply in enumerate(replies)
    ]
    return {**answer.head("chat.completion"), "choices": choices, "usage": answer.usage}


def _message(reply: Reply) -> dict[str, Any]:
    calls = {"tool_calls": reply.calls} if reply.calls else {}
    return {"role": "assistant", "content": reply.text or (None if calls else ""), "refusal": None, **calls}


def _delta(part: Delta, reply: Reply) -> dict[str, Any]:
    """A part of an answer as the API has it; the first of a call has its id and name."""
    if part.call < 0:
        return {"content": part.content}
    if not part.name:
        return {"tool_calls": [{"index": part.call, "function": {"arguments": part.arguments}}]}
    call = {"index": part.call, "id": reply.calls[part.call]["id"], "type": "function"}
    return {"tool_calls": [{**call, "function": {"name": part.name, "arguments": ""}}]}


async def _events(answer: Answer, body: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    """The answer in chunks; a token's probability comes with the text that it completes."""
    head = answer.head("chat.completion.chunk")
    usage = {"usage": None} if body.includes_usage else {}
    held: list[list[dict[str, Any]]] = [[] for _ in answer.requests]
    replies = [answer.reply() for _ in answer.requests]

    def chunk(place: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        logprobs = {"content": held[place], "refusal": None} if body.logprobs and held[place] else None
        held[place] = []
        choice = {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice], **usage}

    for place in range(len(answer.requests)):
        yield chunk(place, {"role": "assistant", "content": ""})
    async with aclosing(answer.pieces()) as pieces:
        async for place, piece in pieces:
            held[place] += _tokens(answer, piece)
            for part in replies[place].push(piece.text, piece.finish_reason is not None):
                yield chunk(place, _delta(part, replies[place]))
            if piece.finish_reason:
                yield chunk(place, {}, finish_reason(piece, replies[place]))
    if body.includes_usage:
        yield {**head, "choices": [], "usage": answer.usage}


def _tokens(answer: Answer, piece: Piece) -> list[dict[str, Any]]:
    """A piece's token with its probability and the likeliest others, where they were asked for."""
    tokenizer = answer.description.tokenizer
    if piece.log_probability is None or piece.token in tokenizer.stop_ids:
        return []

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": token_text(tokenizer, token), "logprob": value, "bytes": [*token_bytes(tokenizer, token)]}

    top = [entry(*pair) for pair in piece.top_log_probabilities]
    return [{**entry(piece.token, piece.log_probability), "top_logprobs": top}]

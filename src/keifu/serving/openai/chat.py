"""POST /v1/chat/completions: answers to messages, whole or as a stream."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Response

from keifu.data.chat.thoughts import OPEN
from keifu.data.tokenizers.chat_template import template_variables
from keifu.inference.text.request import Piece
from keifu.serving.errors import ApiError
from keifu.serving.facts import current
from keifu.serving.models import Description, ServedModels
from keifu.serving.openai.generation import Answer, prepare_chat, token_bytes, token_text
from keifu.serving.openai.grounding import AnswerCitations, ground, url_citation
from keifu.serving.openai.schemas import ChatRequest
from keifu.serving.openai.tools import THOUGHTS, Delta, Reply
from keifu.serving.streaming import STREAM, EventStream, json_response
from keifu.serving.tool_parsers.harmony import speaks_harmony


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the route for these models."""

    @app.post("/v1/chat/completions", summary="Answer a conversation", tags=["text"], responses=STREAM)
    async def chat_completions(body: ChatRequest) -> Response:
        answer = await begin(models, body, "chatcmpl-")
        if body.stream:
            return EventStream(_events(answer, body), models.limits.timeout)
        return json_response(await _completion(answer, body))


async def begin(models: ServedModels, body: ChatRequest, prefix: str) -> Answer:
    """Check a conversation and return its answer, which has not begun. prefix: first part of its id."""
    schema = body.response_format.schema if body.response_format else None
    messages = [message.plain() for message in body.messages]
    if not body.documents:
        return await prepare_chat(models, body, messages, prefix, schema)
    models.find(body.model, "chat")  # its error comes first
    grounded, grounding = await ground(models, messages, body.titled_texts)
    answer = await prepare_chat(models, body, grounded, prefix, schema)
    answer.citations = AnswerCitations(body.titled_texts, grounding, len(answer.requests))
    return answer


async def begin_from(models: ServedModels, fields: dict[str, Any], prefix: str) -> Answer:
    """Return the answer to a conversation in OpenAI's fields, translated from another protocol."""
    values = {name: value for name, value in fields.items() if value is not None}
    return await begin(models, ChatRequest.model_validate(values), prefix)


def thinking_options(about: Description, thinks: bool, field: str, is_hint: bool = False) -> dict[str, Any] | None:
    """Return chat template variables that turn thoughts on or off.

    Raises `ApiError` if thoughts are wanted of a model that never thinks, unless the wish is only a hint, which is then
    ignored and named. field: that of the request.
    """
    template = about.tokenizer.chat_template
    if "enable_thinking" in template_variables(template):
        return {"enable_thinking": thinks}
    if thinks and OPEN not in template and not speaks_harmony(about.tokenizer):
        if is_hint and not current().strict:
            current().ignored.append(field)
            return None
        raise ApiError(400, f"The chat template of this model has no thoughts: leave out {field}.", field)
    return None


async def _completion(answer: Answer, body: ChatRequest) -> dict[str, Any]:
    """Return the whole answer."""
    tokens: list[list[dict[str, Any]]] = [[] for _ in answer.requests]
    async with aclosing(answer.pieces()) as pieces:
        async for choice, piece in pieces:
            answer.push(choice, piece)
            tokens[choice] += token_entries(answer, piece)
    choices = [
        {
            "index": choice,
            "message": _message(reply) | _cited_message(answer, choice),
            "logprobs": {"content": tokens[choice], "refusal": None} if body.logprobs else None,
            "finish_reason": reply.finish_reason,
        }
        for choice, reply in enumerate(answer.replies)
    ]
    return {**answer.head("chat.completion"), "choices": choices, "usage": answer.usage}


def _message(reply: Reply) -> dict[str, Any]:
    calls = {"tool_calls": reply.calls} if reply.calls else {}
    thoughts = {"reasoning_content": reply.reasoning} if reply.reasoning else {}
    return {"role": "assistant", "content": reply.text or (None if calls else ""), "refusal": None, **thoughts, **calls}


def _cited_message(answer: Answer, choice: int) -> dict[str, Any]:
    """Return the text with marks, and the annotations, of an answer from documents."""
    if answer.citations is None:
        return {}
    return {"content": answer.citations.texts[choice], "annotations": answer.citations.annotations[choice]}


def _delta(part: Delta, reply: Reply) -> dict[str, Any]:
    """Return a part of an answer in the API's format. The first part of a call has its id and name."""
    if part.citation:
        return {"content": part.content, "annotations": [url_citation(part.citation, part.end)]}
    if part.call < 0:
        return {"reasoning_content" if part.call == THOUGHTS else "content": part.content}
    if not part.name:
        return {"tool_calls": [{"index": part.call, "function": {"arguments": part.arguments}}]}
    call = {"index": part.call, "id": reply.calls[part.call]["id"], "type": "function"}
    return {"tool_calls": [{**call, "function": {"name": part.name, "arguments": ""}}]}


async def _events(answer: Answer, body: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the answer in chunks. The probability of a token comes with the text that it completes."""
    head = answer.head("chat.completion.chunk")
    usage = {"usage": None} if body.includes_usage else {}
    tokens: list[list[dict[str, Any]]] = [[] for _ in answer.requests]

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        logprobs = {"content": tokens[index], "refusal": None} if body.logprobs and tokens[index] else None
        tokens[index] = []
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**head, "choices": [choice], **usage}

    for index in range(len(answer.requests)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async with aclosing(answer.pieces()) as pieces:
        async for index, piece in pieces:
            tokens[index] += token_entries(answer, piece)
            for part in answer.push(index, piece):
                yield chunk(index, _delta(part, answer.replies[index]))
            if piece.finish_reason:
                yield chunk(index, {}, answer.replies[index].finish_reason)
    if body.includes_usage:
        yield {**head, "choices": [], "usage": answer.usage}


def token_entries(answer: Answer, piece: Piece) -> list[dict[str, Any]]:
    """Return a token with its probability and those of the likeliest tokens, if they were requested.

    The sampled token is always included, as in OpenAI's answers: after the likeliest if it is not one of them.
    """
    tokenizer = answer.description.tokenizer
    if piece.log_probability is None or piece.token in tokenizer.stop_ids:
        return []

    def entry(token: int, value: float) -> dict[str, Any]:
        return {"token": token_text(tokenizer, token), "logprob": value, "bytes": [*token_bytes(tokenizer, token)]}

    sampled = piece.token, piece.log_probability
    top = list(piece.top_log_probabilities)
    if top and piece.token not in dict(top):
        top.append(sampled)
    return [{**entry(*sampled), "top_logprobs": [entry(*pair) for pair in top]}]

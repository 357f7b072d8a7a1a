"""POST /v1/completions: continuations of texts, whole or as a stream; with `echo` also the prompts and their scores."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI, Response
from torch import nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.inference.text.likelihood import LikeliestTokens, score_likeliest
from keifu.inference.text.model import device_of
from keifu.inference.text.request import Piece, prompt_tokens
from keifu.serving.models import Description, ServedModels
from keifu.serving.openai.generation import REASONS, Answer, prepare, token_bytes
from keifu.serving.openai.schemas import CompletionRequest
from keifu.serving.streaming import STREAM, EventStream, json_response


def routes(app: FastAPI, models: ServedModels) -> None:
    """Add the route for these models."""

    @app.post("/v1/completions", summary="Continue texts", tags=["text"], responses=STREAM)
    async def completions(body: CompletionRequest) -> Response:
        def prompts(about: Description) -> list[list[int]]:
            return [prompt_tokens(about.tokenizer, prompt) for prompt in body.prompts()]

        answer = await prepare(models, body, "completion", prompts, "cmpl-")
        if body.stream:
            return EventStream(_events(answer, body), models.limits.timeout)
        return json_response(await _completion(answer, body))


COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's text, or as OpenAI `bytes:\\xe6\\x97` if it is a part of a character: parts that are all U+FFFD
    would be one entry of `top_logprobs`."""
    content = token_bytes(tokenizer, token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class CompletionChoice:
    """Growing text of a choice, with its tokens and their probabilities if they were requested."""

    def __init__(self, answer: Answer, body: CompletionRequest, index: int):
        self.tokenizer = answer.description.tokenizer
        self.index, self.top = index, body.logprobs
        self.text, self.length = "", 0  # text since the last `take`; characters in all
        self.tokens: list[tuple[str, float | None, dict[str, float] | None, int]] = []  # text, probability, top, offset

    def add(self, text: str, token: int, value: float | None, top: Any) -> None:
        """Add a token, and the text that it completes."""
        if self.top is not None:
            sampled = [(token, value)] if self.top and value is not None else []  # it may not be one of the likeliest
            both = {token_name(self.tokenizer, each): log for each, log in [*top, *sampled]} if sampled else None
            self.tokens.append((token_name(self.tokenizer, token), value, both, self.length))
        self.text += text
        self.length += len(text)

    def take(self, reason: str | None) -> dict[str, Any]:
        """Return the text since the last call in the API's format. reason: `finish_reason` of the last `Piece`, or
        None."""
        logprobs = None
        if self.top is not None:
            logprobs = {name: [row[column] for row in self.tokens] for column, name in enumerate(COLUMNS)}
            logprobs |= {} if self.top else {"top_logprobs": None}
        text, self.text, self.tokens = self.text, "", []
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": REASONS.get(reason or "")}


async def _begin(answer: Answer, body: CompletionRequest) -> list[CompletionChoice]:
    """Return the choices before the first token: empty, or with `echo` the prompts."""
    choices = [CompletionChoice(answer, body, index) for index in range(len(answer.requests))]
    for first in range(0, len(choices), answer.choices) if body.echo else ():
        prompt = answer.requests[first].prompt
        scores = None if body.logprobs is None else await answer.worker.call(partial(_score, prompt, body.logprobs))
        for choice in choices[first : first + answer.choices]:
            _echo(choice, prompt, scores)
    return choices


def _score(prompt: list[int], top: int, model: nn.Module, *_: Any) -> LikeliestTokens:
    return score_likeliest(model, torch.tensor(prompt, device=device_of(model)), top)


def _echo(choice: CompletionChoice, prompt: list[int], scores: LikeliestTokens | None) -> None:
    """Add the prompt's text and, if there are scores, its tokens. The first token has no score."""
    stream = choice.tokenizer.stream(skip_special=False)
    for position, token in enumerate(prompt):
        text = stream.push(token)
        scores_of_token = (scores.values[position - 1], scores.top[position - 1]) if scores and position else (None, ())
        choice.add(text, token, *scores_of_token)


async def _pieces(answer: Answer, body: CompletionRequest) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yield the generated pieces: none if the request only asks for the prompts and their scores."""
    if not body.only_echoes:
        async with aclosing(answer.pieces()) as pieces:
            async for item in pieces:
                yield item


async def _completion(answer: Answer, body: CompletionRequest) -> dict[str, Any]:
    """Return the whole answer."""
    choices = await _begin(answer, body)
    reasons = ["length" for _ in choices]
    async with aclosing(_pieces(answer, body)) as pieces:
        async for index, piece in pieces:
            choices[index].add(piece.text, piece.token, piece.log_probability, piece.top_log_probabilities)
            reasons[index] = piece.finish_reason or "length"
    whole_choices = [choice.take(reason) for choice, reason in zip(choices, reasons, strict=True)]
    return {**answer.head("text_completion"), "choices": whole_choices, "usage": answer.usage}


async def _events(answer: Answer, body: CompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the answer in chunks."""
    usage = {"usage": None} if body.includes_usage else {}
    choices = await _begin(answer, body)
    for choice in choices if body.echo else ():
        end = "length" if body.only_echoes else None
        yield {**answer.head("text_completion"), "choices": [choice.take(end)], **usage}
    async with aclosing(_pieces(answer, body)) as pieces:
        async for index, piece in pieces:
            choices[index].add(piece.text, piece.token, piece.log_probability, piece.top_log_probabilities)
            if choices[index].text or piece.finish_reason:
                yield {**answer.head("text_completion"), "choices": [choices[index].take(piece.finish_reason)], **usage}
    if body.includes_usage:
        yield {**answer.head("text_completion"), "choices": [], "usage": answer.usage}

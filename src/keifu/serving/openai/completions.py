"""POST /v1/completions: texts that are continued, whole or as a stream; with `echo` the prompts and their scores."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

import torch
from fastapi import FastAPI, Request
from starlette.responses import Response
from torch import nn

from keifu.generation.text.likelihood import LikeliestTokens, score_likeliest
from keifu.generation.text.model import device_of
from keifu.generation.text.request import prompt_tokens
from keifu.serving.models import ServedModels
from keifu.serving.openai.generation import REASONS, Answer, likeliest, prepare, token_text
from keifu.serving.openai.schemas import CompletionRequest
from keifu.serving.streaming import STREAM, EventStream, whole


def routes(app: FastAPI, models: ServedModels) -> None:
    """The route, for these models."""

    @app.post("/v1/completions", summary="Continue texts", tags=["text"], responses=STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        def prompts(tokenizer: Any) -> list[list[int]]:
            return [prompt_tokens(tokenizer, prompt) for prompt in body.prompts()]

        answer = await prepare(models, body, "completion", prompts, "cmpl")
        if body.stream:
            return EventStream(_events(answer, body), models.limits.timeout)
        return await whole(request, _completion(answer, body))


COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class Choice:
    """A text as it grows, with its tokens and their probabilities where they were asked for."""

    def __init__(self, answer: Answer, body: CompletionRequest, place: int):
        self.tokenizer = answer.description.tokenizer
        self.place, self.top = place, body.logprobs
        self.text, self.length = "", 0  # what was not yet handed out; characters of the whole
        self.tokens: list[tuple[str, float | None, dict[str, float] | None, int]] = []  # in these columns

    def add(self, text: str, token: int, value: float | None, top: Any) -> None:
        """One more token, and the text that it completes."""
        if self.top is not None:
            own = [(token, value)] if self.top and value is not None else []  # it may be none of the likeliest
            found = dict(likeliest(self.tokenizer, [*top, *own])) if own else None
            self.tokens.append((token_text(self.tokenizer, token), value, found, self.length))
        self.text += text
        self.length += len(text)

    def take(self, reason: str | None) -> dict[str, Any]:
        """What came since the last call, as the API has it. reason: why a `Piece` was the last, if one was."""
        logprobs = None
        if self.top is not None:
            logprobs = {name: [row[place] for row in self.tokens] for place, name in enumerate(COLUMNS)}
            logprobs |= {} if self.top else {"top_logprobs": None}
        text, self.text, self.tokens = self.text, "", []
        return {"index": self.place, "text": text, "logprobs": logprobs, "finish_reason": REASONS.get(reason or "")}


async def _begin(answer: Answer, body: CompletionRequest) -> list[Choice]:
    """The choices before the first token: empty, or with `echo` holding the prompts."""
    choices = [Choice(answer, body, place) for place in range(len(answer.requests))]
    for first in range(0, len(choices), answer.choices) if body.echo else ():
        prompt = answer.requests[first].prompt
        scores = None if body.logprobs is None else await answer.worker.call(partial(_score, prompt, body.logprobs))
        for choice in choices[first : first + answer.choices]:
            _echo(choice, prompt, scores)
    return choices


def _score(prompt: list[int], top: int, model: nn.Module, *_: Any) -> LikeliestTokens:
    return score_likeliest(model, torch.tensor(prompt, device=device_of(model)), top)


def _echo(choice: Choice, prompt: list[int], scores: LikeliestTokens | None) -> None:
    """Puts the prompt's text and, where there are scores, its tokens before what is written; the first has no score."""
    stream = choice.tokenizer.stream(skip_special=False)
    for place, token in enumerate(prompt):
        text = stream.push(token)
        known = (scores.values[place - 1], scores.top[place - 1]) if scores and place else (None, ())
        choice.add(text, token, *known)


async def _completion(answer: Answer, body: CompletionRequest) -> dict[str, Any]:
    """The whole answer."""
    choices = await _begin(answer, body)
    reasons = ["length" for _ in choices]
    async with aclosing(answer.pieces()) as pieces:
        async for place, piece in pieces:
            choices[place].add(piece.text, piece.token, piece.log_probability, piece.top_log_probabilities)
            reasons[place] = piece.finish_reason or "length"
    found = [choice.take(reason) for choice, reason in zip(choices, reasons, strict=True)]
    return {**answer.head("text_completion"), "choices": found, "usage": answer.usage}


async def _events(answer: Answer, body: CompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
    """The answer in chunks."""
    usage = {"usage": None} if body.includes_usage else {}
    choices = await _begin(answer, body)
    for choice in choices if body.echo else ():
        yield {**answer.head("text_completion"), "choices": [choice.take(None)], **usage}
    async with aclosing(answer.pieces()) as pieces:
        async for place, piece in pieces:
            choices[place].add(piece.text, piece.token, piece.log_probability, piece.top_log_probabilities)
            if choices[place].text or piece.finish_reason:
                yield {**answer.head("text_completion"), "choices": [choices[place].take(piece.finish_reason)], **usage}
    if body.includes_usage:
        yield {**answer.head("text_completion"), "choices": [], "usage": answer.usage}

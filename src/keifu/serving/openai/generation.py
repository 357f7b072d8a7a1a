"""Conversion of request bodies to engine requests, and of pieces to tokens, probabilities and usage."""

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from keifu.data.chat.thoughts import ThoughtSplitter, opens_thoughts, thought_tokens
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.chat.prompts import ImagePrompt, InsertedImages, refuse_pictures
from keifu.inference.text.request import Piece, Request
from keifu.inference.text.sampling_params import ANSWER_TOKENS, SamplingParams, sampling_for
from keifu.serving.errors import ApiError, of_exception
from keifu.serving.facts import Facts, current
from keifu.serving.models import Description, ServedModels
from keifu.serving.openai.constraints import constraints
from keifu.serving.openai.grounding import AnswerCitations
from keifu.serving.openai.pictures import open_images
from keifu.serving.openai.schemas import ChatRequest, ResponseRequest, Sampling
from keifu.serving.openai.tools import (
    THOUGHTS,
    Delta,
    HarmonyReply,
    Reply,
    ToolUse,
    answer_grammar,
    render,
    tool_format,
)
from keifu.serving.tool_parsers.harmony import begun_message, speaks_harmony
from keifu.serving.worker import Worker

REASONS = {"stop": "stop", "length": "length", "context": "length"}
PREPARE_SECONDS = 30.0  # time limit for prompts and grammars, before an answer begins
LARGE = 2**16  # larger bodies, in bytes, are prepared separately from small ones
SMALL_POOL = ThreadPoolExecutor(4, "keifu-prepare")
LARGE_POOL = ThreadPoolExecutor(2, "keifu-prepare-large")


@dataclass
class Answer:
    """Answer of a model to one HTTP request. `requests` has the choices of the first prompt, then those of the next.

    in_channels: whether the model answers in gpt-oss's channels. citations: the passages that the choices cite, if
    the request has documents.
    """

    models: ServedModels
    description: Description
    requests: list[Request]
    choices: int
    seed: int
    prefix: str
    tools: ToolUse | None = None
    in_channels: bool = False
    citations: AnswerCitations | None = None
    replies: list[Reply] = field(init=False)
    id: str = field(init=False)
    facts: Facts = field(default_factory=current)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}{uuid.uuid4().hex}"
        self.worker.check_room(len(self.requests))
        self.replies = [self._reply(request.prompt) for request in self.requests]
        self.facts.prompt_tokens = self.prompt_tokens
        self.models.metrics.prompt.labels(self.description.name).inc(self.prompt_tokens)

    @property
    def worker(self) -> Worker:
        """Thread that has the model. Until it has work, another model may replace its model."""
        return self.models.worker(self.description.name)

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompts. A prompt with several choices counts once."""
        return sum(len(request.prompt) for request in self.requests[:: self.choices])

    @property
    def completion_tokens(self) -> int:
        """Number of tokens generated so far, in all choices."""
        return sum(len(request.tokens) for request in self.requests)

    @property
    def usage(self) -> dict[str, Any]:
        """Numbers of tokens so far. cached: tokens of the prompts that had been computed before. accepted and rejected:
        right and wrong guesses of speculative decoding."""
        completion_tokens = self.completion_tokens
        cached = {"cached_tokens": sum(request.cached for request in self.requests[:: self.choices])}
        total = self.prompt_tokens + completion_tokens
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}
        accepted = sum(request.accepted for request in self.requests)
        rejected = sum(request.guessed for request in self.requests) - accepted
        details = {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": rejected}
        details |= {"reasoning_tokens": sum(reply.reasoning_tokens for reply in self.replies)}
        return {**counts, "prompt_tokens_details": cached, "completion_tokens_details": details}

    def head(self, object_name: str) -> dict[str, Any]:
        """Return the common first fields of all objects of this answer."""
        name = self.description.name
        return {"id": self.id, "object": object_name, "created": self.created, "model": name, "seed": self.seed}

    def _reply(self, prompt: Sequence[int]) -> Reply:
        """Return a splitter of a choice into thoughts, text and calls."""
        tokenizer = self.description.tokenizer
        schemas = {tool["name"]: tool.get("parameters") or {} for tool in self.tools.functions} if self.tools else {}
        if self.in_channels:
            return HarmonyReply(functions=schemas, begun=begun_message(tokenizer, prompt))
        splitter = ThoughtSplitter(opens_thoughts(tokenizer, prompt))
        if not self.tools:
            return Reply(splitter=splitter)
        form = tool_format(tokenizer)
        return Reply(form, form.trigger(tokenizer), splitter=splitter, functions=schemas)

    def push(self, choice: int, piece: Piece) -> list[Delta]:
        """Add a piece to the reply of its choice. Return the parts that are now certain, thoughts first."""
        reply = self.replies[choice]
        last = piece.finish_reason is not None
        deltas = reply.push(piece.text, last)
        if self.citations:
            deltas = self.citations.cited(choice, deltas, last)
        if piece.finish_reason:
            ended = REASONS[piece.finish_reason]
            reply.finish_reason = "tool_calls" if ended == "stop" and reply.calls and not reply.unfinished else ended
        return [Delta(reply.thought, THOUGHTS), *deltas] if reply.thought else deltas

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield each generated piece with the index of its request."""
        if self.citations and self.citations.fixed_text:
            for choice in range(len(self.requests)):
                yield choice, Piece(choice, self.citations.fixed_text, -1, finish_reason="stop")
            return
        try:
            async with aclosing(self.worker.generate(self.requests)) as pieces:
                async for item in pieces:
                    yield item
        finally:
            self.facts.completion_tokens = self.completion_tokens


async def prepare(
    models: ServedModels, body: Sampling, use: str, prompts: Callable[[Description], Sequence[list[int] | ImagePrompt]],
    prefix: str, schema: dict[str, Any] | None = None, tools: ToolUse | None = None,
) -> Answer:  # fmt: skip
    """Check a body and return its answer, which has not begun.

    Prompts are encoded in separate threads, within a time limit. Large bodies and those with a schema use other threads
    than small ones, so that they do not delay them.

    Args:
        models: the models of the service.
        body: the request.
        use: the use that the model must have.
        prompts: encodes each prompt with the model's tokenizer.
        prefix: the first part of the answer's id.
        schema: the JSON schema that each text must follow, if any.
        tools: the functions that the answer may call, if any.
    """
    description = models.find(body.model, use)
    pool, client_left = LARGE_POOL if schema or tools or current().size > LARGE else SMALL_POOL, threading.Event()
    try:
        sampling = sampling_for(description.tokenizer, body.options(), ANSWER_TOKENS).seeded()
        in_channels = use == "chat" and speaks_harmony(description.tokenizer)
        work = partial(_requests, description, body, sampling, prompts, schema, tools, use, client_left)
        async with asyncio.timeout(PREPARE_SECONDS):
            requests = await asyncio.get_running_loop().run_in_executor(pool, work)
        return Answer(models, description, requests, body.n or 1, sampling.seed or 0, prefix, tools, in_channels)
    except TimeoutError:
        text = "The prompt and the schema were not read in {:.0f} s: make them shorter, or try again later."
        raise ApiError(503, text.format(PREPARE_SECONDS), code="preparation_timeout", retry=30) from None
    except UserError as error:
        raise of_exception(error, tuple(type(body).model_fields)) from error
    finally:
        client_left.set()


async def prepare_chat(
    models: ServedModels, body: ChatRequest | ResponseRequest, messages: Sequence[Mapping[str, Any]], prefix: str,
    schema: dict[str, Any] | None,
) -> Answer:  # fmt: skip
    """Check a conversation and return its answer, which has not begun. See `prepare`.

    A conversation with more messages than the context has tokens is refused before it is rendered.
    """
    return await prepare(models, body, "chat", chat_prompts(models, body, messages), prefix, schema, body.tool_use())


async def count_tokens(models: ServedModels, body: ChatRequest, messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of tokens of a conversation in the model's chat template."""
    about, prompts = models.find(body.model, "chat"), chat_prompts(models, body, messages)
    async with asyncio.timeout(PREPARE_SECONDS):
        (prompt,) = await asyncio.get_running_loop().run_in_executor(LARGE_POOL, prompts, about)
    return len(InsertedImages(prompt, about.config).tokens if isinstance(prompt, ImagePrompt) else prompt)


def chat_prompts(
    models: ServedModels, body: ChatRequest | ResponseRequest, messages: Sequence[Mapping[str, Any]]
) -> Callable[[Description], list[list[int] | ImagePrompt]]:
    """Return a function that encodes a conversation for a model."""
    tools, options, facts = body.tool_use(), dict(body.chat_template_kwargs or {}), current()

    def prompts(about: Description) -> list[list[int] | ImagePrompt]:
        template = about.tokenizer.chat_template or ""
        if options.get("enable_thinking") is False and "enable_thinking" not in template and not facts.strict:
            facts.ignored.append("chat_template_kwargs.enable_thinking")  # it has no thoughts to be turned off
            del options["enable_thinking"]
        if about.context_length is not None and len(messages) > about.context_length:
            counts = f"{len(messages):,} entries, and the context of this model has {about.context_length:,} tokens"
            raise ApiError(400, f"messages has {counts}: send fewer.", "messages", "context_length_exceeded")
        refuse_pictures(about.config, [url for message in messages for url in message.get("images", ())])
        opened = open_images(messages, models.limits.pictures)
        return [render(about.tokenizer, opened, tools.functions if tools else (), about.config, **options)]

    return prompts


def _requests(
    description: Description, body: Sampling, sampling: SamplingParams, prompts: Any, schema: Any,
    tools: ToolUse | None, use: str, client_left: threading.Event,
) -> list[Request]:  # fmt: skip
    """Return the requests of all prompts and choices, each with a different seed.

    use: see `prepare`. client_left: set if nobody waits for it.
    """

    def go_on() -> None:
        if client_left.is_set():
            raise ApiError(499, "The client has left.")

    tokenizer, config = description.tokenizer, description.config
    ids = prompts(description)
    go_on()
    in_channels = use == "chat" and speaks_harmony(tokenizer)
    grammar = answer_grammar(tokenizer, tools, schema, in_channels)
    constraint = (lambda: None) if grammar is None else constraints(grammar, tokenizer, config.vocab_size)
    visible_tokens = [*thought_tokens(tokenizer).values()] if use == "chat" else []
    visible_tokens += tool_format(tokenizer).special(tokenizer).values() if tools or in_channels else ()
    seeds = [((sampling.seed or 0) + choice) % 2**63 for choice in range(body.n or 1)]
    prompts_with_images = [
        InsertedImages(prompt, config) if isinstance(prompt, ImagePrompt) else prompt for prompt in ids
    ]
    pairs = [
        (prompt.tokens, prompt) if isinstance(prompt, InsertedImages) else (prompt, None)
        for prompt in prompts_with_images
    ]
    limits, settings = (config.vocab_size, config.context_length), [replace(sampling, seed=seed) for seed in seeds]
    requests = []
    for tokens, images in pairs:
        for setting in settings:
            go_on()
            try:
                requests.append(Request(tokens, setting, tokenizer, *limits, constraint(), visible_tokens, images))
            except UserError as error:
                if len(tokens) < config.context_length:
                    raise
                name = next(name for name in ("messages", "input", "prompt") if name in type(body).model_fields)
                raise ApiError(400, str(error), name, "context_length_exceeded") from error
    return requests


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Return the bytes of a token; b"" for an id beyond the tokenizer's, which a padded embedding may have."""
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as text. Incomplete characters become U+FFFD."""
    return token_bytes(tokenizer, token).decode("utf-8", "replace")


def likeliest(tokenizer: Tokenizer, pairs: Sequence[tuple[int, float]]) -> Iterator[tuple[str, float]]:
    """Yield the texts of tokens with their log-probabilities."""
    return ((token_text(tokenizer, token), value) for token, value in pairs)

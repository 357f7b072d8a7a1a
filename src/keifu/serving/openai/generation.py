"""From a request's fields to what the engine takes, and from its pieces to tokens with probabilities and usage."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.text.request import Piece, Request
from keifu.generation.text.sampling_params import ANSWER_TOKENS, SamplingParams, sampling_for
from keifu.serving.errors import of_exception
from keifu.serving.models import Description, ServedModels
from keifu.serving.openai.constraints import constraints, schema_grammar
from keifu.serving.openai.schemas import Sampling
from keifu.serving.openai.tools import Reply, ToolUse, tool_format
from keifu.serving.worker import Worker

REASONS = {"stop": "stop", "length": "length", "context": "length"}


@dataclass
class Answer:
    """What is asked of a model and written: `requests` are the choices of the first prompt, then those of the next."""

    models: ServedModels
    description: Description
    requests: list[Request]
    choices: int
    seed: int
    prefix: str
    tools: ToolUse | None = None
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.worker.check_room(len(self.requests))
        self.models.metrics.prompt.labels(self.description.name).inc(self.prompt_tokens)

    @property
    def worker(self) -> Worker:
        """The thread that has the model now: until something is asked of it, another model may take its room."""
        return self.models.worker(self.description.name)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        return sum(len(request.prompt) for request in self.requests[:: self.choices])

    @property
    def usage(self) -> dict[str, Any]:
        """The numbers of tokens up to now; cached: those of the prompts that had been computed before."""
        written = sum(len(request.tokens) for request in self.requests)
        cached = {"cached_tokens": sum(request.cached for request in self.requests[:: self.choices])}
        total = self.prompt_tokens + written
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": written, "total_tokens": total}
        return {**counts, "prompt_tokens_details": cached}

    def head(self, kind: str) -> dict[str, Any]:
        """What every object of this answer begins with."""
        name = self.description.name
        return {"id": self.id, "object": kind, "created": self.created, "model": name, "seed": self.seed}

    def reply(self) -> Reply:
        """What splits a choice into text and calls."""
        tokenizer = self.description.tokenizer
        return Reply(form := tool_format(tokenizer), form.trigger(tokenizer)) if self.tools else Reply()

    def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Each piece with the place of its request, as they are written."""
        return self.worker.generate(self.requests)


async def prepare(
    models: ServedModels,
    body: Sampling,
    use: str,
    prompts: Any,
    prefix: str,
    schema: dict[str, Any] | None = None,
    tools: ToolUse | None = None,
) -> Answer:
    """The answer to a body, checked and not begun. prompts: makes the ids of each from the tokenizer, in a thread
    beside, so that a long one stops nobody. schema: what each text must follow, if anything. tools: those that it
    may call."""
    description = models.find(body.model, use)
    try:
        sampling = sampling_for(description.tokenizer, body.options(), ANSWER_TOKENS).seeded()
        requests = await asyncio.to_thread(_requests, description, body, sampling, prompts, schema, tools)
        return Answer(models, description, requests, body.n or 1, sampling.seed or 0, prefix, tools)
    except UserError as error:
        raise of_exception(error, tuple(type(body).model_fields)) from error


def _requests(
    description: Description, body: Sampling, sampling: SamplingParams, prompts: Any, schema: Any, tools: ToolUse | None
) -> list[Request]:
    """The requests of all prompts and choices, each with its own seed."""
    tokenizer, config = description.tokenizer, description.config
    ids = prompts(tokenizer)
    grammar = tools.grammar(tokenizer, schema) if tools else None if schema is None else schema_grammar(schema)
    constraint = (lambda: None) if grammar is None else constraints(grammar, tokenizer, config.vocab_size)
    shown = tool_format(tokenizer).special(tokenizer).values() if tools else ()
    seeds = [((sampling.seed or 0) + choice) % 2**63 for choice in range(body.n or 1)]
    places = [(prompt, replace(sampling, seed=seed)) for prompt in ids for seed in seeds]
    limits = config.vocab_size, config.context_length
    return [Request(*pair, tokenizer, *limits, constraint(), shown) for pair in places]


def finish_reason(piece: Piece, reply: Reply) -> str | None:
    """Why the answer ended with this piece, as the API has it; None while it goes on."""
    reason = REASONS[piece.finish_reason] if piece.finish_reason else None
    return "tool_calls" if reason == "stop" and reply.calls and not reply.unfinished else reason


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token; none for an id beyond the tokenizer's, which a padded embedding has."""
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; bytes that are no whole character become U+FFFD."""
    return token_bytes(tokenizer, token).decode("utf-8", "replace")


def likeliest(tokenizer: Tokenizer, pairs: Sequence[tuple[int, float]]) -> Iterator[tuple[str, float]]:
    """The texts of tokens with their log-probabilities."""
    return ((token_text(tokenizer, token), value) for token, value in pairs)

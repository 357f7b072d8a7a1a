"""Text generation in one call: as a stream of pieces, as strings, or as completions with their log-probabilities.

A seed belongs to a request: the same prompt, settings and seed give the same text alone or in a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack, overload

from torch import nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.text.defaults import sampling_for
from keifu.generation.text.engine import batch_capacity, causal, write
from keifu.generation.text.request import Piece, Request, check_tokens, prompt_tokens
from keifu.generation.text.sampling_params import SamplingOptions, SamplingParams
from keifu.threads import follow_load

Prompts = Sequence[str | Sequence[int]]


@dataclass(frozen=True)
class Completion:
    """A finished text.

    text: what the model wrote, without the stop token or stop string that ended it.
    tokens: all that were sampled, the stop token or those of the stop string included.
    log_probabilities, sampled_log_probabilities: one a token, as in `Piece`; None if not asked for.
    finish_reason: "stop", "length" or "context", as in `Piece`.
    seed: with it the same text comes again.
    prompt_tokens: the length of the prompt.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    seed: int
    prompt_tokens: int
    log_probabilities: list[float] | None = None
    sampled_log_probabilities: list[float] | None = None


def stream(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Prompts,
    samplings: SamplingParams | Sequence[SamplingParams],
) -> Iterator[Piece]:
    """The pieces of all texts as they are written, a token of each text in turn.

    prompts: texts, or lists of token ids. samplings: one for all, or one for each.
    An invalid request is a `UserError` at once, before the first piece. `finish_reason` marks the last piece of a text.
    """
    each = _one_each(samplings, len(prompts))
    tokens = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    writer = causal(model)
    config = writer.config
    check_tokens(tokens, config.vocab_size)
    pairs = enumerate(zip(tokens, each, strict=True))
    requests = [Request(i, *pair, tokenizer, config.context_length) for i, pair in pairs]
    if not requests:
        return iter(())
    return write(writer, requests, writer.new_caches(len(requests), batch_capacity(requests)))


def generate_batch(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Prompts,
    samplings: SamplingParams | Sequence[SamplingParams],
    batch_size: int = 32,
) -> list[Completion]:
    """The completion of every prompt, in their order; `batch_size` of similar length are written at a time."""
    each = [sampling.seeded() for sampling in _one_each(samplings, len(prompts))]
    tokens = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    done: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        pieces: list[list[Piece]] = [[] for _ in group]
        for piece in stream(model, tokenizer, [tokens[i] for i in group], [each[i] for i in group]):
            pieces[piece.index].append(piece)
        done |= {i: completion(p, each[i].seed or 0, len(tokens[i])) for i, p in zip(group, pieces, strict=True)}
    return [done[i] for i in range(len(tokens))]


def completion(pieces: Sequence[Piece], seed: int, prompt_length: int) -> Completion:
    """All pieces of one text, put together."""
    return Completion(
        "".join(piece.text for piece in pieces),
        [piece.token for piece in pieces],
        pieces[-1].finish_reason or "",
        seed,
        prompt_length,
        [p.log_probability for p in pieces if p.log_probability is not None] or None,
        [p.sampled_log_probability for p in pieces if p.sampled_log_probability is not None] or None,
    )


@overload
def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: str, *, raw: bool = False, **sampling: Unpack[SamplingOptions]
) -> str: ...
@overload
def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: list[str], *, raw: bool = False, **sampling: Unpack[SamplingOptions]
) -> list[str]: ...
def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompt: str | list[str],
    *,
    raw: bool = False,
    **sampling: Unpack[SamplingOptions],
) -> str | list[str]:
    """What the model writes after the prompt (without the prompt), or after each of several.

    A model with a chat template answers the prompt as a message; `raw` continues it as plain text instead.

    sampling: any of max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
    frequency_penalty, stop, seed, as described in `SamplingParams`. One that is not given has the model's recommended
    value, from its generation_config.json, or where there is none: temperature=0 (greedy) for chat models;
    temperature=0.8, top_k=40, top_p=0.95, min_p=0.05 for base models; and max_tokens=256.

    A prompt longer than the context, and a setting that is unknown or out of its range, are `UserError`s. With one seed
    for several prompts each gets what it would get alone, so equal prompts get equal texts.

    >>> import keifu
    >>> model, tokenizer = keifu.load("smollm2")
    >>> keifu.generate(model, tokenizer, "Once upon a time, in a small", max_tokens=3, raw=True)
    ' town, there'
    """
    follow_load()
    settings = sampling_for(tokenizer, sampling)
    prompts = [as_prompt(tokenizer, each, raw) for each in ([prompt] if isinstance(prompt, str) else prompt)]
    texts = [done.text for done in generate_batch(model, tokenizer, prompts, settings)]
    return texts[0] if isinstance(prompt, str) else texts


def as_prompt(tokenizer: Tokenizer, text: str, raw: bool = False) -> str | list[int]:
    """The prompt made from a text: a message in the chat template where the tokenizer has one; otherwise, or if `raw`,
    the text itself."""
    if raw or tokenizer.chat_template is None:
        return text
    return tokenizer.render_chat([{"role": "user", "content": text}])


def _one_each(samplings: SamplingParams | Sequence[SamplingParams], n: int) -> list[SamplingParams]:
    """As many settings as prompts."""
    each = [samplings] * n if isinstance(samplings, SamplingParams) else list(samplings)
    if len(each) != n:
        raise UserError(f"There are {n} prompts and {len(each)} samplings: give one for all, or one for each.")
    return each

"""Text generation in one call: as a stream of pieces, as strings, or as completions with log-probabilities.

A seed belongs to a request: on a CPU the same prompt, settings and seed give the same text alone or in a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, cast, overload

from PIL import Image
from torch import nn

from keifu.data.chat.thoughts import template_options
from keifu.data.images.io import read_image
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.chat.prompts import ImagePrompt, Messages, refuse_pictures, render
from keifu.inference.text.draft import Draft
from keifu.inference.text.engine import Engine
from keifu.inference.text.model import PREFILL_TOKENS, MaskPredictor, text_model
from keifu.inference.text.request import Piece, Request
from keifu.inference.text.sampling_params import SamplingOptions, SamplingParams, sampling_for
from keifu.inference.text.unmasking import Unmasking, write
from keifu.threads import follow_load

Prompts = Sequence[str | Sequence[int] | ImagePrompt]


class GenerateOptions(SamplingOptions, total=False):
    """Options of `generate`."""

    images: Sequence[str | Path]
    steps: int
    block: int


@dataclass(frozen=True)
class Completion:
    """Finished text.

    text: the generated text, without the stop token or stop string that ended it. tokens: all sampled tokens, with the
    stop token or those of the stop string. log_probabilities, sampled_log_probabilities: one for each token, as in
    `Piece`; None if not requested. finish_reason: "stop", "length" or "context", as in `Piece`. seed: it reproduces the
    text. prompt_tokens: the length of the prompt. guessed_tokens, accepted_tokens: numbers of guessed tokens and of
    right guesses.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    seed: int
    prompt_tokens: int
    log_probabilities: list[float] | None = None
    sampled_log_probabilities: list[float] | None = None
    guessed_tokens: int = 0
    accepted_tokens: int = 0


def stream(
    model: nn.Module, tokenizer: Tokenizer, prompts: Prompts, samplings: SamplingParams | Sequence[SamplingParams],
    guesses: int | Draft | None = None,
) -> Iterator[Piece]:  # fmt: skip
    """Yield the pieces of all texts as they are generated, a token of each text in turn.

    prompts: texts, or lists of token ids. samplings: one for all, or one for each. guesses: as in `Engine`. An invalid
    request raises `UserError` before the first piece. `finish_reason` marks the last piece of a text.
    """
    engine = Engine(model, tokenizer, max_running=max(1, len(prompts)), guesses=guesses)
    _add(engine, prompts, samplings)
    return engine.pieces()


def _add(engine: Engine, prompts: Prompts, samplings: SamplingParams | Sequence[SamplingParams]) -> list[Request]:
    """Add a request for each prompt to the engine."""
    n = len(prompts)
    for_prompts = [samplings] * n if isinstance(samplings, SamplingParams) else list(samplings)
    if len(for_prompts) != n:
        raise UserError(f"There are {n} prompts and {len(for_prompts)} samplings: give one for all, or one for each.")
    requests = [engine.request(*pair) for pair in zip(prompts, for_prompts, strict=True)]
    for request in requests:
        engine.add(request)
    return requests


def generate_batch(
    model: nn.Module, tokenizer: Tokenizer | None, prompts: Prompts,
    samplings: SamplingParams | Sequence[SamplingParams], batch_size: int = 32,
    advance: Callable[[int], object] | None = None, guesses: int | Draft | None = None,
) -> list[Completion]:  # fmt: skip
    """Generate the completion of every prompt, in order. At most `batch_size` are generated at once.

    A common beginning of prompts is computed once. tokenizer: None gives tokens without text. advance: called with the
    number of finished prompts. guesses: as in `Engine`.
    """
    engine = Engine(model, tokenizer, max_running=batch_size, step_tokens=PREFILL_TOKENS, guesses=guesses)
    requests = _add(engine, prompts, samplings)
    pieces: list[list[Piece]] = [[] for _ in requests]
    done = 0
    for piece in engine.pieces():
        pieces[piece.index].append(piece)
        if piece.finish_reason and advance:
            advance(done := done + 1)
    return [completion(*pair) for pair in zip(requests, pieces, strict=True)]


def completion(request: Request, pieces: Sequence[Piece]) -> Completion:
    """Join the pieces of one text."""
    text, reason, seed = "".join(p.text for p in pieces), pieces[-1].finish_reason or "", request.sampling.seed or 0
    logs = [p.log_probability for p in pieces if p.log_probability is not None] or None
    sampled = [p.sampled_log_probability for p in pieces if p.sampled_log_probability is not None] or None
    return Completion(
        text, request.tokens, reason, seed, len(request.prompt), logs, sampled, request.guessed, request.accepted
    )


@overload
def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: str | Messages, *, raw: bool = False,
    **sampling: Unpack[GenerateOptions],
) -> str: ...  # fmt: skip
@overload
def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: list[str], *, raw: bool = False, **sampling: Unpack[GenerateOptions]
) -> list[str]: ...
def generate(
    model: nn.Module, tokenizer: Tokenizer, prompt: str | list[str] | Messages, *, raw: bool = False,
    **sampling: Unpack[GenerateOptions],
) -> str | list[str]:  # fmt: skip
    """Return the text that the model generates after the prompt (without the prompt), or after each of several.

    A model with a chat template answers the prompt as a message. With one seed for several prompts, each gets the text
    that it would get alone, so equal prompts get equal texts.

    Args:
        prompt: The text to answer or to continue, or a list of texts; or the messages of a conversation to answer, such
            as [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}].
        raw: Whether the prompt is continued as plain text, without the chat template.
        **sampling: Fields of `SamplingParams`; images: picture files, for a model that sees.
            Missing ones come from generation_config.json. Without that file they are temperature=0 (greedy) for
            chat models, temperature=0.8, top_k=40, top_p=0.95 and min_p=0.05 for base models, and max_tokens=256.
            A model of masked diffusion has the settings of `keifu.inference.text.unmasking.Unmasking` instead.

    Returns:
        The text, or a list of texts for a list of prompts.

    Raises:
        UserError: The prompt is longer than the context, or a setting is unknown or out of its range.

    Examples:
        >>> import keifu
        >>> model, tokenizer = keifu.load("smollm2")
        >>> keifu.generate(model, tokenizer, "Once upon a time, in a small", max_tokens=3, raw=True)
        ' town, there'
    """
    follow_load()
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"The tokenizer is {tokenizer!r:.60}: give the one that keifu.load returned with the model.")
    single = isinstance(prompt, str) or is_conversation(prompt) or not isinstance(prompt, Iterable)
    prompt_items: Iterable[Any] = [prompt] if single else cast(Any, prompt)
    config = None if (masked := isinstance(model, MaskPredictor)) else text_model(model).config
    refuse_pictures(config, files := sampling.pop("images", ()))
    images = [read_image(Path(file)).image for file in files]
    prompts: list[Any] = [as_prompt(tokenizer, one, raw, config, images) for one in prompt_items]
    if masked:
        texts = [write(model, tokenizer, one, Unmasking.of(sampling)) for one in prompts]
    else:
        texts = [done.text for done in generate_batch(model, tokenizer, prompts, sampling_for(tokenizer, sampling))]
    return texts[0] if single else texts


def is_conversation(prompt: Any) -> bool:
    """Return whether a prompt is a list of messages."""
    return isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)


def as_prompt(
    tokenizer: Tokenizer, text: str | Messages, raw: bool = False, config: Any = None,
    images: Sequence[Image.Image] = (), **options: Any,
) -> str | list[int] | ImagePrompt:  # fmt: skip
    """Convert a text to a prompt: a message in the chat template if the tokenizer has one; otherwise, or if `raw`, the
    text. The messages of a conversation are converted by the chat template.

    config: of the model; decides whether it reads pictures. images: pictures of the message. options: of the chat
    template.
    """
    if options and (raw or tokenizer.chat_template is None):
        raise UserError(f"{', '.join(options)} belongs to a chat template: leave it out for a text without one.")
    if is_conversation(text):
        if raw or images:
            raise UserError(
                "A conversation goes through the chat template: leave out raw, and put pictures in messages."
            )
        return render(tokenizer, cast(Any, text), config, **options)
    if not isinstance(text, str) or (not images and (raw or tokenizer.chat_template is None)):
        return cast(Any, text)
    if raw:
        raise UserError("A picture's place in a prompt is the chat template's: leave out raw, or the pictures.")
    options = template_options(tokenizer, options)
    return render(tokenizer, [{"role": "user", "content": text, "images": images}], config, **options)

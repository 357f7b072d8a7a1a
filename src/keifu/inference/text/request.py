"""Generation request: converts sampled tokens to pieces of text, and ends at a stop token, stop string or limit."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Protocol, runtime_checkable

from jaxtyping import Bool
from torch import Tensor

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.chat.prompts import InsertedImages
from keifu.inference.text.sampling_params import SamplingParams


class StopText:
    """Filter that passes text on, but withholds an end that may become a stop string.

    found: whether a stop string has occurred. stop: that string. The text ends before the stop string that is first
    complete. If several are complete at the same character, the one that begins first counts. So the result does not
    depend on how the text is split into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.is_stopped, self.stop = False, ""
        self._pending_text = ""

    def push(self, text: str) -> str:
        """Return the text that cannot belong to a stop string any more."""
        text = self._pending_text + text
        matches = [(start + len(stop), start, stop) for stop in self.stops if (start := text.find(stop)) >= 0]
        self.is_stopped = bool(matches)
        _, end, self.stop = min(matches, default=(0, len(text) - self._beginning(text), ""))
        self._pending_text = "" if self.is_stopped else text[end:]
        return text[:end]

    def flush(self) -> str:
        """Return the withheld text at the end of the stream."""
        text, self._pending_text = self._pending_text, ""
        return text

    def _beginning(self, text: str) -> int:
        """Return the number of characters at the end of the text that begin a stop string."""
        longest = min(len(text), max(map(len, self.stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0)


@dataclass(frozen=True, slots=True)
class Piece:
    """One new token of a text.

    index: the number of its request in the engine.
    text: the characters that this token completes, often none; never a part of a stop string.
    log_probability: ln of the token's probability under the model; None if not requested.
    sampled_log_probability: the same under the distribution sampled from, after penalties, temperature and filters (0
        for greedy decoding); None if not requested.
    top_log_probabilities: the likeliest tokens here with ln of their probabilities under the model, in order.
    finish_reason: None while the text continues; "stop" (a stop token or a stop string), "length" (max_tokens reached)
        or "context" (the model's context is full).
    """

    index: int
    text: str
    token: int
    log_probability: float | None = None
    sampled_log_probability: float | None = None
    top_log_probabilities: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None


@runtime_checkable
class Constraint(Protocol):
    """Interface of a constraint on one sequence, which decides at each position which tokens are allowed."""

    def allowed(self) -> Bool[Tensor, " vocab"]:
        """Return a mask of the tokens that are allowed next, on the CPU. At least one is, such as the end token."""
        ...

    def accept(self, token: int) -> None:
        """Record that the token was chosen."""
        ...


class Request:
    """Prompt with settings, checked against the model's vocabulary and context. `take` adds a token and returns its
    `Piece`.

    constraint: of the text's format; None for any text. shown: special tokens that are not removed from the text.
    images: pictures among the prompt's tokens. Raises `UserError` if the prompt is empty or leaves no room in the
    context; it is never truncated. Without a tokenizer pieces have no text, and no stop token ends it.
    """

    def __init__(
        self, prompt: Sequence[int], sampling: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int,
        context_length: int, constraint: Constraint | None = None, visible_tokens: Iterable[int] = (),
        images: InsertedImages | None = None,
    ):  # fmt: skip
        self.images = images
        self.index, self.prompt, self.sampling = 0, list(prompt), sampling.seeded()  # set by the engine
        check_tokens([prompt], vocab_size)
        if (largest := max((token for token, _ in sampling.logit_bias), default=-1)) >= vocab_size:
            raise UserError(f"logit_bias names the token {largest}, but the model knows only 0 to {vocab_size - 1}.")
        room = context_length - len(prompt)
        if not prompt:
            raise UserError("The prompt is empty, and this tokenizer has no token that begins a text: give some text.")
        if room < 1:
            raise UserError(
                f"The prompt has {len(prompt)} tokens, but this model's context is {context_length} and must hold the "
                f"answer too: shorten it to at most {context_length - 1}."
            )
        max_tokens = sampling.max_tokens
        self.limit, self._full = (
            (room, "context") if max_tokens is None or max_tokens > room else (max_tokens, "length")
        )
        self.tokens: list[int] = []
        self.cached = 0  # number of tokens of the prompt whose keys and values were cached
        self.guessed = self.accepted = 0  # numbers of guessed tokens, and of right guesses
        self.constraint = constraint
        self._stop_ids = frozenset[int]() if tokenizer is None else tokenizer.stop_ids
        self._decoder = None if tokenizer is None else tokenizer.stream(visible_tokens=visible_tokens)
        self._text = StopText(sampling.stop)

    @property
    def stop_string(self) -> str:
        """Stop string that ended the text; "" for none."""
        return self._text.stop

    def take(self, token: float, largest: float, *log_probabilities: float) -> Piece:
        """Add a token and return its piece. The arguments are a row of `SampledTokens.figures`.

        An incomplete character at the end of the text is dropped.
        """
        if not math.isfinite(largest):
            raise UserError(
                f"The model's logits after {len(self.prompt) + len(self.tokens)} tokens are not finite (the largest is "
                f"{largest}): its weights are damaged, or its type is too narrow; load it in float32 or bfloat16."
            )
        self.tokens.append(int(token))
        if self.constraint is not None:
            self.constraint.accept(self.tokens[-1])
        ends = self.tokens[-1] in self._stop_ids
        text = "" if ends or self._decoder is None else self._text.push(self._decoder.push(self.tokens[-1]))
        reason = "stop" if ends or self._text.is_stopped else self._full if len(self.tokens) >= self.limit else None
        if reason:
            text += self._text.flush()
        if not self.sampling.log_probabilities:
            return Piece(self.index, text, self.tokens[-1], finish_reason=reason)
        log_probability, sampled, *likeliest = log_probabilities
        pairs = zip(map(int, likeliest[::2]), likeliest[1::2], strict=True)
        top = tuple(pairs)[: self.sampling.top_log_probabilities]
        return Piece(self.index, text, self.tokens[-1], log_probability, sampled, top, reason)


def prompt_tokens(tokenizer: Tokenizer | None, prompt: str | Sequence[int]) -> list[int]:
    """Return the ids of a prompt, with the BOS if the tokenizer adds one. An empty prompt is only the BOS, if there is
    one.

    Text cannot contain control tokens; pass ids to use them.
    """
    if not isinstance(prompt, str):
        try:
            return list(map(index, prompt))
        except TypeError as error:
            raise UserError(f"A prompt is {prompt!r}, which must be a text or a list of token ids.") from error
    assert tokenizer is not None, "a text is read by a tokenizer"
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return tokenizer.encode(prompt, special=True) or begin


def check_tokens(prompts: Iterable[Sequence[int]], vocab_size: int) -> None:
    """Raise `UserError` for tokens that the model has no embedding for."""
    for token in (t for prompt in prompts if prompt for t in (min(prompt), max(prompt))):
        if not 0 <= token < vocab_size:
            raise UserError(
                f"The prompt has the token {token}, but the model knows only 0 to {vocab_size - 1}: the tokenizer does "
                "not belong to this model."
            )

"""Shared by `keifu generate` and `keifu chat`: sampling options, display of the settings, and printing of text."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from keifu.commands.shared.terminal import say
from keifu.inference.text.sampling_params import SamplingParams, defaults, in_words
from keifu.ranges import Count, MinP, Penalty, RepetitionPenalty, Seed, Temperature, TopK, TopP

if TYPE_CHECKING:
    from keifu.inference.chat.prompts import ImagePrompt
    from keifu.inference.text.draft import Draft
    from keifu.inference.text.generate import Completion

OWN = tyro.conf.arg(help_behavior_hint="(unset: the model's own)")
FILTERS = ("top_k", "top_p", "min_p")
REPORTED = ("seed", "log_probabilities", "top_log_probabilities", "logit_bias")  # reported elsewhere, or no option


@dataclass(frozen=True)
class SamplingFlags:
    """How tokens are chosen; an option that is not given has the model's own value (`generation.defaults`)."""

    max_tokens: Annotated[Count | None, OWN] = None
    """The most tokens to write; 0: until the model stops or its context is full."""
    temperature: Annotated[Temperature | None, OWN] = None
    """Divides the logits; 0 always takes the likeliest token (greedy)."""
    top_k: Annotated[TopK | None, OWN] = None
    """Only the k likeliest tokens; 0: all."""
    top_p: Annotated[TopP | None, OWN] = None
    """Only the smallest set of likeliest tokens whose probability reaches p; 1: all."""
    min_p: Annotated[MinP | None, OWN] = None
    """Only tokens at least this fraction as likely as the likeliest; 0: all."""
    repetition_penalty: Annotated[RepetitionPenalty | None, OWN] = None
    """Divides positive and multiplies negative logits of tokens in the prompt or the output; 1: none."""
    presence_penalty: Annotated[Penalty | None, OWN] = None
    """Taken off the logit of each token in the output, once; 0: none."""
    frequency_penalty: Annotated[Penalty | None, OWN] = None
    """Taken off the logit of each token in the output, for each time it stands there; 0: none."""
    stop: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], OWN] = ()
    """A string at which the text ends, before it; may be given several times."""
    seed: Annotated[Seed | None, tyro.conf.arg(help_behavior_hint="(unset: a new one each time)")] = None
    """The same seed gives the same text."""

    def given(self) -> dict[str, Any]:
        """Return the options that were set, as fields of `SamplingParams`."""
        options = {name: value for name, value in vars(self).items() if value not in (None, ())}
        return {**options, "max_tokens": self.max_tokens or None} if self.max_tokens is not None else options


def choose_sampling(tokenizer: Any, flags: SamplingFlags, max_tokens: int) -> tuple[SamplingParams, str]:
    """Return the settings to use, with a seed, and a line that describes them. Warn on stderr about an option without
    effect."""
    given = flags.given()
    usual = defaults(tokenizer, max_tokens)
    sampling = replace(usual.sampling, **given).seeded()
    idle = [f"--{name.replace('_', '-')}" for name in FILTERS if name in given and sampling.temperature == 0]
    if idle:
        print(f"{' and '.join(idle)} changes nothing at temperature 0: give --temperature too.", file=sys.stderr)
    changed = [f"--{name.replace('_', '-')}" for name in given if name not in ("max_tokens", "stop", "seed")]
    return sampling, f"{in_words(sampling)} ({' '.join([usual.source, *(['except'] if changed else []), *changed])})"


def print_completion(done: "Completion", sampling: SamplingParams) -> None:
    """Print a finished text with its tokens, probabilities and settings, as JSON."""
    settings = {key: value for key, value in asdict(sampling).items() if key not in REPORTED}
    say(json.dumps({**vars(done), "sampling": settings}, ensure_ascii=False))


def print_text(
    model: Any, tokenizer: Any, prompt: "str | Sequence[int] | ImagePrompt", sampling: SamplingParams, as_json: bool,
    streamed: bool, guesses: "int | Draft | None" = None,
) -> str | None:  # fmt: skip
    """Print the model's continuation of a prompt: piece by piece if `streamed`, or with all details as JSON. Return the
    reason for its end, as in `Piece`."""
    from keifu.inference.text.generate import generate_batch, stream

    if as_json:
        [done] = generate_batch(model, tokenizer, [prompt], replace(sampling, log_probabilities=True), guesses=guesses)
        print_completion(done, sampling)
        return done.finish_reason
    text, reason = [], None
    for piece in stream(model, tokenizer, [prompt], sampling, guesses):
        reason = piece.finish_reason
        if streamed:
            say(piece.text, end="")
        else:
            text.append(piece.text)
    say("".join(text))
    return reason

"""Shared by `keifu generate` and `keifu chat`: sampling options, display of the settings, and printing of text."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from keifu.commands.shared.terminal import say
from keifu.inference.text.sampling_params import CHOOSING, SETTINGS, SamplingParams, defaults, in_words

if TYPE_CHECKING:
    from keifu.inference.chat.prompts import ImagePrompt
    from keifu.inference.text.draft import Draft
    from keifu.inference.text.generate import Completion

OPTIONS = [name for name, row in SETTINGS.items() if row.setting.on_command_line]
NOT_PRINTED = {"seed"} | (SETTINGS.keys() - {*OPTIONS})  # printed elsewhere, or no option
IDLE_IF_GREEDY = [name for name in CHOOSING if name != "temperature"]


def _field(name: str) -> tuple[str, Any, Any]:
    """Return the field of an option: its name, its type with the help text, and its value if it is not set."""
    row = SETTINGS[name]
    unset = "(unset: a new one each time)" if name == "seed" else "(unset: the model's own)"
    argument = tyro.conf.arg(help=row.setting.help, help_behavior_hint=unset)
    if row.neutral == ():
        return name, Annotated[tyro.conf.UseAppendAction[row.value_type], argument], ()
    return name, Annotated[row.value_type | None, argument], None


Options: Any = make_dataclass("Options", map(_field, OPTIONS), frozen=True)


@dataclass(frozen=True)
class SamplingFlags(Options):
    """How tokens are chosen; an option that is not set has the model's own value (`sampling_params.defaults`)."""

    def changes(self) -> dict[str, Any]:
        """Return the options that were set, as fields of `SamplingParams`."""
        options = {name: value for name, value in vars(self).items() if value not in (None, ())}
        return {**options, "max_tokens": self.max_tokens or None} if self.max_tokens is not None else options


def choose_sampling(tokenizer: Any, flags: SamplingFlags, max_tokens: int) -> tuple[SamplingParams, str]:
    """Return the settings to use, with a seed, and a line that describes them. Warn on stderr about an option without
    effect."""
    settings = flags.changes()
    default = defaults(tokenizer, max_tokens)
    sampling = replace(default.sampling, **settings).seeded()
    idle = [f"--{name.replace('_', '-')}" for name in IDLE_IF_GREEDY if name in settings and sampling.temperature == 0]
    if idle:
        print(f"{' and '.join(idle)} changes nothing at temperature 0: give --temperature too.", file=sys.stderr)
    changed = [f"--{name.replace('_', '-')}" for name in settings if name not in ("max_tokens", "stop", "seed")]
    return sampling, f"{in_words(sampling)} ({' '.join([default.source, *(['except'] if changed else []), *changed])})"


def print_completion(done: "Completion", sampling: SamplingParams, **more: Any) -> None:
    """Print a finished text with its tokens, probabilities and settings, as JSON. more: further fields."""
    settings = {key: value for key, value in asdict(sampling).items() if key not in NOT_PRINTED}
    say(json.dumps({**vars(done), "sampling": settings, **more}, ensure_ascii=False))


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

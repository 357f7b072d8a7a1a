"""Sampling parameters of a text request: how tokens are chosen, and where the text ends."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from keifu.errors import UserError, unknown
from keifu.ranges import check

ANSWER_TOKENS = 1024  # the most that an answer in a conversation has, unless another number is asked for


@dataclass(frozen=True)
class SamplingParams:
    """The settings of one request. The defaults draw from the model's own distribution, unchanged.

    Attributes:
        max_tokens: the most tokens to write; None writes until a stop or the end of the context.
        temperature: divides the logits; 0 always takes the likeliest token (greedy).
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the smallest set of likeliest tokens whose mass reaches p (Holtzman et al., 2020); 1 for all.
        min_p: only tokens at least this fraction as likely as the likeliest (Nguyen et al., 2024); 0 for all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the output
            (CTRL, Keskar et al., 2019); 1 for none.
        presence_penalty: taken off the logit of each token in the output, once (OpenAI's); 0 for none.
        frequency_penalty: taken off the logit of each token in the output, for each time it stands there; 0 for none.
        stop: strings at which the text ends, before them.
        seed: the same seed gives the same text; None draws a fresh one, which the answer reports.
        log_probabilities: report the log-probability of every token.
        top_log_probabilities: with them, those of so many likeliest tokens at every place (at most 20).
        logit_bias: pairs of a token and what is added to its logit (OpenAI's), before the temperature.

    A value out of its range is a `UserError`. `processors.py` has the order in which the settings act.
    """

    max_tokens: int | None = 256
    temperature: float | int = 1.0
    top_k: int = 0
    top_p: float | int = 1.0
    min_p: float | int = 0.0
    repetition_penalty: float | int = 1.0
    presence_penalty: float | int = 0.0
    frequency_penalty: float | int = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    log_probabilities: bool = False
    top_log_probabilities: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        check(vars(self))
        if not all(self.stop):
            raise UserError(f"stop is {self.stop!r}, which must be strings of at least one character.")
        if not all(isinstance(token, int) and token >= 0 and math.isfinite(bias) for token, bias in self.logit_bias):
            raise UserError(f"logit_bias is {self.logit_bias!r}, which must be pairs of a token's id and a number.")

    def seeded(self) -> "SamplingParams":
        """The same settings with a seed: a fresh one, below 2^53 so that JSON can hold it, if there is none."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(53))


class SamplingOptions(TypedDict, total=False):
    """Some of the fields of `SamplingParams`, by name; `stop` may be one string."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: str | Sequence[str]
    seed: int | None
    log_probabilities: bool
    top_log_probabilities: int
    logit_bias: tuple[tuple[int, float], ...]


def sampling_params_from(options: Mapping[str, Any]) -> SamplingParams:
    """The settings of these names; `stop` may be one string or several. An unknown name is a `UserError`."""
    known = [field.name for field in fields(SamplingParams)]
    for name in options:
        if name not in known:
            raise unknown("sampling option", name, known)
    stop = options.get("stop", ())
    return SamplingParams(**{**options, "stop": (stop,) if isinstance(stop, str) else tuple(stop or ())})

"""Sampling parameters of a text request: how tokens are chosen, where the text ends, and a model's default settings.

The defaults come from the model's generation_config.json, else from keifu. Then models with a chat template decode
greedily, because quantised or small ones often err when tokens are sampled. Base models, whose greedy text repeats
itself, sample with filters that exclude unlikely tokens.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from keifu.errors import UserError, require_known
from keifu.ranges import Bias, Count, Likeliest, MinP, Penalty, RepetitionPenalty, Seed, Temperature, TopK, TopP, check

if TYPE_CHECKING:
    from keifu.data.tokenizers.tokenizer import Tokenizer

ANSWER_TOKENS = 1024  # default maximum of an answer in a conversation


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

    max_tokens: Count | None = 256
    temperature: Temperature | int = 1.0
    top_k: TopK = 0
    top_p: TopP | int = 1.0
    min_p: MinP | int = 0.0
    repetition_penalty: RepetitionPenalty | int = 1.0
    presence_penalty: Penalty | int = 0.0
    frequency_penalty: Penalty | int = 0.0
    stop: tuple[str, ...] = ()
    seed: Seed | None = None
    log_probabilities: bool = False
    top_log_probabilities: Likeliest = 0
    logit_bias: tuple[tuple[int, Bias], ...] = ()

    def __post_init__(self) -> None:
        check(self)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop is {self.stop!r}, which must be strings of at least one character.")
        if not all(isinstance(token, int) and token >= 0 and math.isfinite(bias) for token, bias in self.logit_bias):
            raise UserError(f"logit_bias is {self.logit_bias!r}, which must be pairs of a token's id and a number.")

    def seeded(self) -> "SamplingParams":
        """Return the settings with a seed. If there is none, draw one below 2^53, which JSON can represent."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(53))


class SamplingOptions(TypedDict, total=False):
    """Fields of `SamplingParams` by name, all optional. `stop` may be one string, `logit_bias` a dictionary."""

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
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]]


def sampling_params_from(options: Mapping[str, Any]) -> SamplingParams:
    """Return settings from fields by name. `stop` may be one string, `logit_bias` a dictionary. Raises `UserError` for
    an unknown name."""
    known = [field.name for field in fields(SamplingParams)]
    for name in options:
        require_known("sampling option", name, known)
    stop, bias = options.get("stop", ()), options.get("logit_bias") or ()
    several = {"stop": (stop,) if isinstance(stop, str) else tuple(stop or ())}
    return SamplingParams(**{**options, **several, "logit_bias": tuple(dict(bias).items())})


BASE = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)
CHAT = replace(BASE, temperature=0)
CHOOSING = ("temperature", "top_k", "top_p", "min_p")
OTHERS = {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
UNSET = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers' defaults


class Defaults(NamedTuple):
    """Default settings of text generation, and their origin as the end of a sentence."""

    sampling: SamplingParams
    source: str


def defaults(tokenizer: "Tokenizer", max_tokens: int | None = 256) -> Defaults:
    """Return the default settings of the tokenizer's model.

    max_tokens: used if the model's settings have no maximum. generation_config.json is interpreted as in transformers:
    missing fields have transformers' values, and do_sample=false means greedy. But a file with a temperature or a
    filter and without do_sample means sampling, as in vLLM.
    """
    config = tokenizer.generation_config
    chat = tokenizer.chat_template is not None
    source = f"keifu's settings for a {'chat' if chat else 'base'} model"
    options: dict[str, Any] = {**vars(CHAT if chat else BASE), "max_tokens": max_tokens}
    if config.get("do_sample") is False:
        options["temperature"] = 0
    elif config.get("do_sample") or any(config.get(name) is not None for name in CHOOSING):
        options |= {name: config.get(name, UNSET[name]) for name in CHOOSING}
    options |= {ours: config[theirs] for theirs, ours in OTHERS.items() if theirs in config}
    options["stop"] = config.get("stop_strings") or ()
    if {"do_sample", *CHOOSING, *OTHERS, "stop_strings"} & config.keys():
        source = "the model's own settings"
    try:
        return Defaults(sampling_params_from(options), source)
    except UserError as error:
        raise UserError(f"In the model's generation_config.json, {error}") from error


def sampling_for(tokenizer: "Tokenizer", options: Mapping[str, Any], max_tokens: int | None = 256) -> SamplingParams:
    """Return the default settings, with `options` replacing fields of `SamplingParams`. Raises `UserError` for an
    unknown name."""
    return sampling_params_from({**vars(defaults(tokenizer, max_tokens).sampling), **options})


def in_words(sampling: SamplingParams) -> str:
    """Describe how tokens are chosen: "greedy", or "temperature 0.8, top-k 40, seed 3". Neutral settings are
    omitted."""
    values = vars(sampling)
    penalties = [name for name in values if name.endswith("_penalty")]
    names = ["temperature", *CHOOSING[1:], *penalties, "seed"] if sampling.temperature else penalties
    neutral = {**vars(SamplingParams()), "temperature": None}
    words = [f"{name.replace('_', '-')} {values[name]}" for name in names if values[name] != neutral[name]]
    return ", ".join([*([] if sampling.temperature else ["greedy"]), *words])

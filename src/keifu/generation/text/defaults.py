"""Default sampling settings of a model: those of its generation_config.json, else keifu's own.

Models with a chat template then answer greedily: quantised or small ones err often when tokens are sampled. Base
models, whose greedy text repeats itself, sample with filters that exclude unlikely tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.text.sampling_params import SamplingParams, sampling_params_from

BASE = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)
CHAT = replace(BASE, temperature=0)
CHOOSING = ("temperature", "top_k", "top_p", "min_p")
OTHERS = {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
UNSET = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers', where a model samples


class Defaults(NamedTuple):
    """Settings of text generation, and whose they are, as the end of a sentence."""

    sampling: SamplingParams
    source: str


def defaults(tokenizer: Tokenizer, max_tokens: int | None = 256) -> Defaults:
    """How the tokenizer's model generates text when nothing is said.

    `max_tokens` holds where the model's own settings name no number. What generation_config.json says of sampling is
    read as transformers reads it: fields that it leaves out have transformers' values, and do_sample false is greedy
    choice; but one that names a temperature or a filter without do_sample is taken at its word, as vLLM does.
    """
    own = tokenizer.generation_config
    chat = tokenizer.chat_template is not None
    source = f"keifu's settings for a {'chat' if chat else 'base'} model"
    found: dict[str, Any] = {**vars(CHAT if chat else BASE), "max_tokens": max_tokens}
    if own.get("do_sample") is False:
        found["temperature"] = 0
    elif own.get("do_sample") or any(own.get(name) is not None for name in CHOOSING):
        found |= {name: own.get(name, UNSET[name]) for name in CHOOSING}
    found |= {ours: own[theirs] for theirs, ours in OTHERS.items() if theirs in own}
    found["stop"] = own.get("stop_strings") or ()
    if {"do_sample", *CHOOSING, *OTHERS, "stop_strings"} & own.keys():
        source = "the model's own settings"
    try:
        return Defaults(sampling_params_from(found), source)
    except UserError as error:
        raise UserError(f"In the model's generation_config.json, {error}") from error


def sampling_for(tokenizer: Tokenizer, options: Mapping[str, Any], max_tokens: int | None = 256) -> SamplingParams:
    """The defaults with these fields of `SamplingParams` in their place; an unknown name is a `UserError`."""
    return sampling_params_from({**vars(defaults(tokenizer, max_tokens).sampling), **options})


def in_words(sampling: SamplingParams) -> str:
    """How tokens are chosen: "greedy", or "temperature 0.8, top-k 40, seed 3", without what changes nothing."""
    values = vars(sampling)
    penalties = [name for name in values if name.endswith("_penalty")]
    names = ["temperature", *CHOOSING[1:], *penalties, "seed"] if sampling.temperature else penalties
    neutral = {**vars(SamplingParams()), "temperature": None}
    told = [f"{name.replace('_', '-')} {values[name]}" for name in names if values[name] != neutral[name]]
    return ", ".join([*([] if sampling.temperature else ["greedy"]), *told])

"""Sampling parameters of a text request: how tokens are chosen, where the text ends, and a model's default settings.

The defaults come from the model's generation_config.json, else from keifu. Then models with a chat template decode
greedily, because quantised or small ones often err when tokens are sampled. Base models, whose greedy text repeats
itself, sample with filters that exclude unlikely tokens.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)  # fmt: skip

from keifu.errors import UserError, require_known
from keifu.ranges import (
    Bias,
    Count,
    Likeliest,
    MinP,
    Penalty,
    Range,
    RepetitionPenalty,
    Seed,
    Sigmas,
    Temperature,
    TopK,
    TopP,
    check,
    range_of,
)  # fmt: skip

if TYPE_CHECKING:
    from keifu.data.tokenizers.tokenizer import Tokenizer

ANSWER_TOKENS = 1024  # default maximum of an answer in a conversation
Stage = Literal["penalty", "before shortlist", "shortlist", "after shortlist"]  # in the order of application


@dataclass(frozen=True)
class Setting:
    """Row of a setting, next to its field in `SamplingParams`; the field has the name, the range and the neutral value.

    The engine's filters and penalties, the command line, the service's fields, the page, and the names of other
    programs are derived from these rows.

    Attributes:
        help: one sentence, for the command line, the service and the documentation; it says which value is neutral.
        stage: when `logits_processors` applies the function of this name; None if the setting changes no logits. A
            filter before the shortlist sees all tokens. One after it sees only those that top-k and top-p left.
        history: for a penalty, the field of `History` that the function takes.
        unset: value of a generation_config.json that sets other fields, if it is not the neutral one (transformers').
        generation_config, ollama: name in generation_config.json and in ollama's interface, if it is another one.
        on_command_line: whether the command line has the option.
    """

    help: str
    stage: Stage | None = None
    history: Literal["seen", "counts", ""] = ""
    unset: int | float | None = None
    generation_config: str = ""
    ollama: str = ""
    on_command_line: bool = True


@dataclass(frozen=True)
class SamplingParams:
    """The settings of one request. The defaults draw from the model's own distribution, unchanged."""

    max_tokens: Annotated[
        Count | None,
        Setting(
            "Maximum number of new tokens; no maximum but the context's: None, and 0 on the command line.",
            generation_config="max_new_tokens", ollama="num_predict",
        ),
    ] = 256  # fmt: skip
    temperature: Annotated[
        Temperature | int,
        Setting("Divisor of the logits; 0 always takes the likeliest token (greedy), 1: none.", "before shortlist"),
    ] = 1.0
    top_k: Annotated[TopK, Setting("Number of likeliest tokens to sample from; 0: all.", "shortlist", unset=50)] = 0
    top_p: Annotated[
        TopP | int,
        Setting(
            "Probability that the smallest set of likeliest tokens must reach (Holtzman et al., 2020); 1: all tokens.",
            "shortlist",
        ),
    ] = 1.0
    min_p: Annotated[
        MinP | int,
        Setting(
            "Least probability of a token, as a fraction of the likeliest one's (Nguyen et al., 2024); 0: all tokens.",
            "after shortlist",
        ),
    ] = 0.0
    top_n_sigma: Annotated[
        Sigmas | int,
        Setting(
            "Distance below the largest logit, in standard deviations (top-nσ, Tang et al., 2024); 0: all tokens.",
            "before shortlist",
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        RepetitionPenalty | int,
        Setting(
            "Divisor of positive and factor of negative logits of tokens in the prompt or the output "
            "(CTRL, Keskar et al., 2019); 1: none.",
            "penalty", history="seen", ollama="repeat_penalty",
        ),
    ] = 1.0  # fmt: skip
    presence_penalty: Annotated[
        Penalty | int,
        Setting(
            "Number that is subtracted once from the logit of each token in the output (OpenAI's); 0: none.",
            "penalty", history="counts",
        ),
    ] = 0.0  # fmt: skip
    frequency_penalty: Annotated[
        Penalty | int,
        Setting(
            "Number that is subtracted from a token's logit for each occurrence in the output (OpenAI's); 0: none.",
            "penalty", history="counts",
        ),
    ] = 0.0  # fmt: skip
    stop: Annotated[
        tuple[str, ...],
        Setting("String at which the text ends, before it; several are possible.", generation_config="stop_strings"),
    ] = ()
    seed: Annotated[
        Seed | None, Setting("Number that determines the text: the same seed gives the same text; unset: a new one.")
    ] = None
    log_probabilities: Annotated[
        bool, Setting("Whether the log-probability of every token is reported.", on_command_line=False)
    ] = False
    top_log_probabilities: Annotated[
        Likeliest,
        Setting("Number of likeliest tokens that are reported with them, at every position.", on_command_line=False),
    ] = 0
    logit_bias: Annotated[
        tuple[tuple[int, Bias], ...],
        Setting(
            "Pairs of a token and the number that is added to its logit (OpenAI's), before the temperature.",
            on_command_line=False,
        ),
    ] = ()

    def __post_init__(self) -> None:
        check(self)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop is {self.stop!r}, which must be strings of at least one character.")
        if not all(isinstance(token, int) and token >= 0 and math.isfinite(bias) for token, bias in self.logit_bias):
            raise UserError(f"logit_bias is {self.logit_bias!r}, which must be pairs of a token's id and a number.")

    def seeded(self) -> "SamplingParams":
        """Return the settings with a seed. If there is none, draw one below 2^53, which JSON can represent."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(53))


class SettingRow(NamedTuple):
    """Setting with the facts that its field declares. value_type: as Python writes it, with its range."""

    setting: Setting
    neutral: Any
    value_type: Any
    range: Range | None

    @property
    def number_type(self) -> type[int] | type[float] | None:
        """Type of a setting that is one number; None for any other setting."""
        number_type, *_ = get_args(self.value_type) or (self.value_type,)
        return number_type if number_type in (int, float) else None


def rows_of(settings_class: type[SamplingParams]) -> dict[str, SettingRow]:
    """Return the row of each field of `SamplingParams`, or of a class that adds fields to it."""
    hints = get_type_hints(settings_class, include_extras=True)
    rows = {}
    for field in fields(settings_class):
        value_type, *metadata = get_args(hints[field.name])  # of Annotated
        if get_origin(value_type) in (Union, UnionType):
            value_type = get_args(value_type)[0]
        elif isinstance(metadata[0], Range):  # Python flattens an Annotated type in another one
            value_type = Annotated[value_type, metadata[0]]
        rows[field.name] = SettingRow(metadata[-1], field.default, value_type, range_of(value_type))
    return rows


SETTINGS = rows_of(SamplingParams)
ATTRIBUTES = "\n".join(f"        {name}: {row.setting.help}" for name, row in SETTINGS.items())
SamplingParams.__doc__ = f"""{SamplingParams.__doc__}

    Attributes:
{ATTRIBUTES}

    A value out of its range is a `UserError`. `logits_processors` has the order in which the settings act.
    """


class SamplingOptions(TypedDict, total=False):
    """Fields of `SamplingParams` by name, all optional, for signatures. `stop` may be one string, `logit_bias` a
    dictionary."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    top_n_sigma: float
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
    field_names = [field.name for field in fields(SamplingParams)]
    for name in options:
        require_known("sampling option", name, field_names)
    stop, bias = options.get("stop", ()), options.get("logit_bias") or ()
    if not isinstance(stop, str | Sequence | None):
        raise UserError(f"stop is {stop!r}, which must be a string or a list of strings.")
    stop_texts = {"stop": (stop,) if isinstance(stop, str) else tuple(stop or ())}
    return SamplingParams(**{**options, **stop_texts, "logit_bias": tuple(dict(bias).items())})


BASE = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)
CHAT = replace(BASE, temperature=0)
PENALTIES = [name for name, row in SETTINGS.items() if row.setting.stage == "penalty"]
CHOOSING = [name for name, row in SETTINGS.items() if row.setting.stage and name not in PENALTIES]
OTHERS = {SETTINGS[name].setting.generation_config or name: name for name in ("max_tokens", *PENALTIES)}
UNSET = {  # transformers' defaults
    name: SETTINGS[name].neutral if SETTINGS[name].setting.unset is None else SETTINGS[name].setting.unset
    for name in CHOOSING
}


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
    names = [*CHOOSING, *PENALTIES, "seed"] if sampling.temperature else PENALTIES
    neutral = {name: row.neutral for name, row in SETTINGS.items()} | {"temperature": None}
    words = [f"{name.replace('_', '-')} {values[name]}" for name in names if values[name] != neutral[name]]
    return ", ".join([*([] if sampling.temperature else ["greedy"]), *words])

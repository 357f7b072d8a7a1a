"""Settings of a request: what is refused, and in which words."""

from dataclasses import replace
from typing import Any

import pytest

from keifu.errors import UserError
from keifu.inference.text.sampling_params import (
    SETTINGS,
    SamplingOptions,
    SamplingParams,
    in_words,
    sampling_params_from,
)

BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": 0}, "max_tokens must be a whole number from 1 .* not 0"),
    ({"temperature": -0.1}, "temperature must be 0 or a number .* not -0.1"),
    ({"temperature": float("nan")}, "temperature must be .* not nan"),
    ({"temperature": float("inf")}, "temperature must be .* not inf"),
    ({"top_k": -1}, "top_k must be .* not -1"),
    ({"top_p": 0.0}, "top_p must be a number above 0 and at most 1 .* not 0.0"),
    ({"top_p": 1.01}, "top_p must be .* not 1.01"),
    ({"min_p": 1.5}, "min_p must be a number from 0 to 1 .* not 1.5"),
    ({"top_n_sigma": -1.0}, "top_n_sigma must be a number from 0 to .* not -1.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must be a number .* not 0.0"),
    ({"presence_penalty": float("inf")}, "presence_penalty must be .* not inf"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty must be .* not nan"),
    ({"stop": ""}, "stop is .*strings of at least one character"),
    ({"stop": ["a", ""]}, "stop is .*strings of at least one character"),
    ({"seed": -1}, "seed must be a whole number from 0 .* not -1"),
    ({"seed": 2**63}, "seed must be .* not 9223372036854775808"),
    ({"top_log_probabilities": 21}, "top_log_probabilities must be a whole number from 0 to 20"),
    ({"logit_bias": ((1, float("inf")),)}, "logit_bias must be a number"),
    ({"temprature": 1.0}, "no sampling option 'temprature'. Did you mean 'temperature'?"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_settings_are_told_in_a_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("?", r"\?")):
        sampling_params_from(options)


def test_a_bias_may_be_a_dictionary() -> None:
    assert sampling_params_from({"logit_bias": {5: 1.0}}) == SamplingParams(logit_bias=((5, 1.0),))


def test_bounds_are_allowed() -> None:
    edge = {"max_tokens": None, "temperature": 0, "top_k": 0, "top_p": 1, "min_p": 1, "seed": 2**63 - 1}
    assert sampling_params_from({**edge, "stop": "x"}) == replace(SamplingParams(**edge), stop=("x",))


def test_seeds_are_fresh_unless_given() -> None:
    assert SamplingParams(seed=0).seeded() == SamplingParams(seed=0)
    drawn = {SamplingParams().seeded().seed for _ in range(20)}
    assert len(drawn) == 20 and None not in drawn


def test_each_setting_has_its_row_its_help_and_its_place_in_signatures() -> None:
    """`SamplingOptions` is written out, so that editors complete the options of `keifu.generate`."""
    assert SamplingOptions.__annotations__.keys() == SETTINGS.keys()
    for name, row in SETTINGS.items():
        assert row.setting.help.endswith(".") and f"{name}: {row.setting.help}" in (SamplingParams.__doc__ or "")
    assert {name for name, row in SETTINGS.items() if row.range} == SETTINGS.keys() - {"stop", "log_probabilities"}


@pytest.mark.parametrize("name", [name for name, row in SETTINGS.items() if row.setting.stage])
def test_a_setting_that_acts_is_shown_in_words(name: str) -> None:
    value = 5 if name == "top_k" else 0.5
    assert f"{name.replace('_', '-')} {value}" in in_words(replace(SamplingParams(), **{name: value}))

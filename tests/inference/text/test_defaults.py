"""How a model writes when nothing is said: its generation_config first, then keifu's settings for its kind."""

from typing import Any

import pytest
import transformers
from generation_toys import of_two_models
from torch import nn

from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.chat.conversation import Conversation
from keifu.inference.text.generate import generate, generate_batch
from keifu.inference.text.sampling_params import SamplingParams, defaults, in_words, sampling_for

BASE = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


def told(tokenizer: Tokenizer, **generation_config: Any) -> Tokenizer:
    return tokenizer.replace(generation_config=generation_config)


@pytest.fixture
def chatter(tokenizer: Tokenizer) -> Tokenizer:
    """Return one with a chat template."""
    return tokenizer.with_chat_template(CHATML)


def test_a_base_model_samples_with_filters(tokenizer: Tokenizer) -> None:
    assert defaults(tokenizer).sampling == SamplingParams(**BASE)
    assert defaults(tokenizer).source == "keifu's settings for a base model"


def test_a_chat_model_is_greedy(chatter: Tokenizer) -> None:
    assert defaults(chatter).sampling.temperature == 0
    assert defaults(chatter).source == "keifu's settings for a chat model"


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        {"do_sample": True, "top_k": 64, "top_p": 0.95},
        {"do_sample": True, "min_p": 0.1, "max_new_tokens": 77},
        {"do_sample": True},
    ],
)
def test_what_the_model_says_is_read_as_transformers_reads_it(own: dict[str, Any], chatter: Tokenizer) -> None:
    found, source = defaults(told(chatter, **own))
    theirs = transformers.GenerationConfig(**own)
    unset = transformers.GenerationConfig._get_default_generation_params()
    for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
        value = getattr(theirs, name)
        assert vars(found)[name] == (unset[name] if value is None else value), name
    assert found.min_p == own.get("min_p", 0) and found.max_tokens == own.get("max_new_tokens", 256)
    assert source == "the model's own settings"


def test_do_sample_false_is_greedy_whatever_else_stands_there(tokenizer: Tokenizer) -> None:
    assert defaults(told(tokenizer, do_sample=False, temperature=0.6)).sampling.temperature == 0


def test_a_temperature_without_do_sample_is_meant(chatter: Tokenizer) -> None:
    assert defaults(told(chatter, temperature=0.6)).sampling == SamplingParams(temperature=0.6, top_k=50)


def test_what_says_nothing_of_sampling_leaves_the_choice(tokenizer: Tokenizer, chatter: Tokenizer) -> None:
    own = {"eos_token_id": 3, "repetition_penalty": 1.2, "stop_strings": ["\n\n"], "temperature": None}
    assert defaults(told(tokenizer, **own)).sampling == SamplingParams(**BASE, repetition_penalty=1.2, stop=("\n\n",))
    assert defaults(told(chatter, **own)).sampling.temperature == 0
    assert defaults(told(tokenizer, eos_token_id=3)).source == "keifu's settings for a base model"


def test_an_option_takes_the_place_of_one_field(tokenizer: Tokenizer) -> None:
    own = told(tokenizer, do_sample=True, temperature=0.6, top_p=0.9, max_new_tokens=5)
    assert sampling_for(own, {"top_p": 0.5, "seed": 2}) == SamplingParams(5, 0.6, 50, 0.5, seed=2)
    assert sampling_for(own, {"max_tokens": None}).max_tokens is None
    with pytest.raises(UserError, match="Did you mean 'top_p'"):
        sampling_for(own, {"topp": 0.5})


def test_a_greedy_models_temperature_brings_the_filters_too(chatter: Tokenizer) -> None:
    for tokenizer in (chatter, told(chatter, do_sample=False)):
        assert sampling_for(tokenizer, {"temperature": 0.8}) == SamplingParams(**BASE)


def test_an_impossible_setting_names_its_file(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"generation_config\.json, top_k must be a whole number from 0"):
        defaults(told(tokenizer, do_sample=True, top_k=-1))


def test_in_words() -> None:
    penalised = SamplingParams(temperature=0, top_k=40, seed=3, repetition_penalty=1.1)
    assert in_words(penalised) == "greedy, repetition-penalty 1.1"
    assert in_words(SamplingParams(**BASE, seed=3)) == "temperature 0.8, top-k 40, top-p 0.95, min-p 0.05, seed 3"
    assert in_words(SamplingParams()) == "temperature 1.0"


@of_two_models
def test_generate_writes_by_the_defaults(model: nn.Module, tokenizer: Tokenizer, chatter: Tokenizer) -> None:
    [base] = generate_batch(model, tokenizer, ["Once"], SamplingParams(**BASE, max_tokens=9, seed=4))
    assert generate(model, tokenizer, "Once", max_tokens=9, seed=4) == base.text
    [plain] = generate_batch(model, tokenizer, ["Once"], SamplingParams(max_tokens=9, temperature=0))
    assert generate(model, chatter, "Once", raw=True, max_tokens=9) == plain.text


def test_a_chat_model_is_given_a_message(script: Any, chatter: Tokenizer) -> None:
    asked = chatter.render_chat([{"role": "user", "content": "Hi"}])
    answer = [*chatter.encode("はい"), chatter.eos_id]
    assert generate(script(answer, asked=len(asked)), chatter, "Hi") == "はい"
    assert generate(script(answer, asked=2), chatter, ["Hi"], raw=True) == ["はい"]
    assert "".join(Conversation(script(answer, asked=len(asked)), chatter).reply("Hi")) == "はい"


@pytest.mark.parametrize("stop", [3, 0.5, {"a": "b"}])
def test_stop_strings_of_another_kind_are_named(stop: Any) -> None:
    tokenizer = train_tokenizer("bpe", ["ab"], 260).replace(generation_config={"stop_strings": stop})
    with pytest.raises(UserError, match=r"In the model's generation_config.json, stop is .*a string or a list"):
        defaults(tokenizer)

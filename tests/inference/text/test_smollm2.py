"""A real model: SmolLM2-135M-Instruct from its GGUF; left out where the archive cannot be had."""

from typing import Any

import pytest

from keifu import checkpoints
from keifu.data.catalogue.catalogue import fetch
from keifu.errors import UserError
from keifu.inference.chat.conversation import Conversation
from keifu.inference.text.generate import generate, generate_batch
from keifu.inference.text.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    try:
        fetch("smollm2")
    except (UserError, OSError) as error:
        pytest.skip(f"SmolLM2 cannot be had here: {error}")
    return checkpoints.load("smollm2")


def test_it_knows_the_capital_of_france_and_what_was_said(smollm2: tuple[Any, Any]) -> None:
    talk = Conversation(*smollm2)
    assert "Paris" in "".join(talk.reply("What is the capital of France?", temperature=0, max_tokens=40))
    assert talk.finish_reason == "stop"
    assert "Paris" in "".join(talk.reply("Say the name of that city again.", temperature=0, max_tokens=20))


def test_it_answers_greedily_where_nothing_is_said(smollm2: tuple[Any, Any]) -> None:
    answers = {generate(*smollm2, "What is the capital of France?", max_tokens=12, seed=seed) for seed in (1, 2)}
    assert answers == {"The capital of France is Paris."}


@pytest.mark.slow
def test_padded_batch_equals_alone(smollm2: tuple[Any, Any]) -> None:
    prompts = ["The capital of Japan is", "日本の首都は", "def fibonacci(n):\n    "]
    settings = SamplingParams(max_tokens=12, temperature=0.7, top_p=0.9, seed=2, log_probabilities=True)
    together = generate_batch(*smollm2, prompts, settings)
    for prompt, completion in zip(prompts, together, strict=True):
        [alone] = generate_batch(*smollm2, [prompt], settings)
        assert (alone.tokens, alone.text) == (completion.tokens, completion.text)
        assert alone.log_probabilities == pytest.approx(completion.log_probabilities, abs=1e-3)


def test_stop_string(smollm2: tuple[Any, Any]) -> None:
    text = generate(*smollm2, "Count: 1, 2, 3, 4,", raw=True, max_tokens=20, stop=" 6")
    assert text == " 5,"

"""Text in and text out: characters, stop strings, ends, what is refused, and the public call."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from generation_toys import of_two_models
from torch import nn

import keifu
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.text.generate import Completion, generate, generate_batch, stream
from keifu.inference.text.request import Piece
from keifu.inference.text.sampling_params import SamplingParams

TEXT = "日本語の文章。👩‍👩‍👧 and café — naïve 🎌 fin"
GREEDY = SamplingParams(temperature=0, max_tokens=500)
ASK = [97]  # any one token


def say(
    script: Any, tokenizer: Tokenizer, text: str, sampling: SamplingParams = GREEDY, end: bool = True
) -> list[Piece]:
    """Return the pieces in which a model writes the text, byte by byte, and then ends it."""
    tokens = tokenizer.encode(text) + ([tokenizer.eos_id] if end else [])
    return list(stream(script(tokens), tokenizer, [ASK], sampling))


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_stream_never_gives_half_a_character(script: Any, tokenizer: Tokenizer) -> None:
    pieces = say(script, tokenizer, TEXT)
    assert joined(pieces) == TEXT
    assert len(pieces) > len(TEXT)  # it did come in bytes
    assert all("\ufffd" not in piece.text for piece in pieces)
    assert [piece.text for piece in pieces if piece.text] == list(TEXT)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


@pytest.mark.parametrize("length", range(1, 14))
def test_a_character_cut_by_max_tokens_is_left_out(script: Any, tokenizer: Tokenizer, length: int) -> None:
    [done] = generate_batch(
        script(tokenizer.encode("日本🎌語")), tokenizer, [ASK], SamplingParams(temperature=0, max_tokens=length)
    )
    whole = b"".join(map(tokenizer.token_bytes, done.tokens)).decode(errors="ignore")
    assert (done.text, done.finish_reason, len(done.tokens)) == (whole, "length", length)


@pytest.mark.parametrize("stop", ["語の", "。", "👧", " and", "f", "文章。👩\u200d👩", "n"])
def test_text_ends_before_a_stop_string_that_crosses_tokens(script: Any, tokenizer: Tokenizer, stop: str) -> None:
    pieces = say(script, tokenizer, TEXT, SamplingParams(temperature=0, stop=(stop, "never")))
    assert joined(pieces) == TEXT[: TEXT.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    written = b"".join(tokenizer.token_bytes(piece.token) for piece in pieces).decode()
    assert written == TEXT[: TEXT.index(stop) + len(stop)]  # and no token more was drawn
    for n in range(1, len(pieces)):
        assert TEXT[: TEXT.index(stop)].startswith(joined(pieces[:n]))


@pytest.mark.parametrize("end", [True, False])
def test_what_was_held_back_for_a_stop_string_comes_at_the_end(script: Any, tokenizer: Tokenizer, end: bool) -> None:
    sampling = SamplingParams(temperature=0, stop=("def!",), max_tokens=500 if end else 6)
    assert joined(say(script, tokenizer, "abcdef", sampling, end)) == "abcdef"


def test_stop_token_is_among_the_tokens_and_not_in_the_text(script: Any, tokenizer: Tokenizer) -> None:
    [done] = generate_batch(
        script([*tokenizer.encode("ab c"), tokenizer.eos_id]), tokenizer, [ASK], SamplingParams(seed=4)
    )
    expected = [*tokenizer.encode("ab c"), tokenizer.eos_id]
    assert done == Completion("ab c", expected, "stop", seed=4, prompt_tokens=1)


@pytest.mark.parametrize(
    ("max_tokens", "length", "reason"), [(3, 3, "length"), (9, 9, "length"), (10, 9, "context"), (None, 9, "context")]
)
def test_ends_by_length(script: Any, tokenizer: Tokenizer, max_tokens: int | None, length: int, reason: str) -> None:
    told = script([98], asked=3, context_length=12)
    [done] = generate_batch(told, tokenizer, [ASK * 3], SamplingParams(temperature=0, max_tokens=max_tokens))
    assert (done.finish_reason, len(done.tokens)) == (reason, length)


@of_two_models
def test_prompt_that_does_not_fit_is_refused_with_both_lengths(model: nn.Module, tokenizer: Tokenizer) -> None:
    for length in (67, 70):
        with pytest.raises(UserError, match=f"has {length} tokens, but this model's context is 67 .* at most 66"):
            stream(model, tokenizer, [ASK, ASK * length], GREEDY)  # at once, not at the first piece
    [done] = generate_batch(model, tokenizer, [ASK * 66], GREEDY)
    assert (done.finish_reason, len(done.tokens)) == ("context", 1)


@of_two_models
def test_empty_prompt_begins_a_text_or_is_refused(model: nn.Module, tokenizer: Tokenizer) -> None:
    bare, settings = Tokenizer(tokenizer.backend, {}), SamplingParams(max_tokens=9, seed=1)
    begin = [tokenizer.token_id("<|endoftext|>")]
    assert generate_batch(model, tokenizer, [""], settings) == generate_batch(model, tokenizer, [begin], settings)
    for prompt in ("", []):
        with pytest.raises(UserError, match="The prompt is empty"):
            generate_batch(model, bare, [prompt], settings)


@of_two_models
def test_tokens_that_the_model_does_not_know_are_refused(model: nn.Module, tokenizer: Tokenizer) -> None:
    for token in (261, -1):
        with pytest.raises(UserError, match=f"has the token {token}, but the model knows only 0 to 260"):
            stream(model, tokenizer, [ASK, [5, token, 6]], GREEDY)
    with pytest.raises(UserError, match="logit_bias names the token 261, but the model knows only 0 to 260"):
        stream(model, tokenizer, [ASK], replace(GREEDY, logit_bias=((261, 1.0),)))


@of_two_models
def test_damaged_weights_are_told(model: nn.Module, tokenizer: Tokenizer) -> None:
    with torch.no_grad():
        model.get_submodule("blocks.1.attention.out").weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="logits after 3 tokens are not finite .*nan"):
        generate(model, tokenizer, "abc")


def test_a_model_that_does_not_write(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="writes no text: Linear is not a language model"):
        generate(nn.Linear(2, 2), tokenizer, "abc")


@of_two_models
def test_as_many_settings_as_prompts(model: nn.Module, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="There are 2 prompts and 1 samplings"):
        stream(model, tokenizer, [ASK, ASK], [GREEDY])
    assert list(stream(model, tokenizer, [], GREEDY)) == generate_batch(model, tokenizer, [], GREEDY) == []


@of_two_models
def test_the_public_call(model: nn.Module, tokenizer: Tokenizer) -> None:
    options = {"max_tokens": 12, "temperature": 0.8, "seed": 1}
    text = keifu.generate(model, tokenizer, "Once upon a time", **options)
    assert isinstance(text, str) and text
    assert keifu.generate(model, tokenizer, ["x", "Once upon a time"], **options)[1] == text
    stopped = keifu.generate(model, tokenizer, "Once upon a time", **options, stop=text[-1])
    assert stopped == text[: text.index(text[-1])]
    with pytest.raises(UserError, match="Did you mean 'max_tokens'"):
        keifu.generate(model, tokenizer, "a", max_token=3)


@of_two_models
def test_pieces_of_a_batch_come_in_turn(model: nn.Module, tokenizer: Tokenizer) -> None:
    samplings = [SamplingParams(max_tokens=n, temperature=0) for n in (1, 4, 2)]
    bare = Tokenizer(tokenizer.backend, {})  # nothing ends a text before its length
    pieces = list(stream(model, bare, [[5], [6, 7], [8]], samplings))
    assert [piece.index for piece in pieces] == [0, 1, 2, 1, 2, 1, 1]
    assert [piece.index for piece in pieces if piece.finish_reason == "length"] == [0, 2, 1]


@of_two_models
def test_the_likeliest_tokens_are_reported_as_many_as_each_asks_for(model: nn.Module, tokenizer: Tokenizer) -> None:
    sampling = SamplingParams(max_tokens=3, temperature=0, log_probabilities=True)
    counts = [0, 2, 5]
    wanted = [replace(sampling, top_log_probabilities=count) for count in counts]
    for piece in stream(model, tokenizer, ["abc"] * 3, wanted):
        top = piece.top_log_probabilities
        assert len(top) == counts[piece.index]
        assert not top or top[0] == (piece.token, pytest.approx(piece.log_probability, abs=1e-5))
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True)


@of_two_models
def test_a_bias_of_a_hundred_decides(model: nn.Module, tokenizer: Tokenizer) -> None:
    sampling = SamplingParams(max_tokens=4, temperature=0, logit_bias=((97, 1e6),))
    assert [piece.token for piece in stream(model, tokenizer, ["xyz"], sampling)] == [97] * 4


def test_text_cannot_spell_control_tokens(script: Any, tokenizer: Tokenizer) -> None:
    told = script([98], asked=len("<|im_end|>"))
    [done] = generate_batch(told, tokenizer, ["<|im_end|>"], SamplingParams(max_tokens=1))
    assert done.prompt_tokens == len("<|im_end|>")

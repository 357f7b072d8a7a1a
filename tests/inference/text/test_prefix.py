"""Prompts that begin alike: what is shared is computed once, and what comes of it is as for one prompt at a time."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from generation_toys import of_kinds_of_memory, of_two_models
from torch import nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.text import likelihood
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.likelihood import (
    ScoredPair,
    first_context,
    join_tokens,
    likelihoods,
    score,
)
from keifu.inference.text.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=9, seed=0)


def some(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(261) for _ in range(n)]


def prompts(count: int, seed: int = 1) -> list[list[int]]:
    """Return prompts of which most share 30 tokens, and some fewer."""
    rng = random.Random(seed)
    base = some(rng, 30)
    return [base[: rng.choice((30, 30, 20, 5))] + some(rng, rng.randrange(1, 25)) for _ in range(count)]


def pairs_of(count: int) -> list[ScoredPair]:
    rng = random.Random(2)
    asked = [tuple(each) for each in prompts(count)]
    return [ScoredPair(each, tuple(some(rng, rng.randrange(1, 9)))) for each in asked for _ in range(1 + len(each) % 4)]


@of_kinds_of_memory
def test_likelihoods_are_those_of_one_pair_at_a_time(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [*pairs_of(4), pairs_of(4)[3]]
    alone, greedy = [], []
    for prompt, answer in pairs:
        whole, start = torch.tensor([[*prompt, *answer]]), len(prompt)
        alone.append(score(model, whole)[0, start - 1 :].tolist())
        with torch.inference_mode():
            greedy.append(torch.equal(model(whole)[0, start - 1 : -1].argmax(-1), whole[0, start:]))
    for step_tokens, batch_size in ((1, None), (50, 3), (10**6, 1)):
        monkeypatch.setattr(likelihood, "STEP_TOKENS", step_tokens)
        found = likelihoods(model, pairs, batch_size)
        assert [each.greedy for each in found] == greedy
        for each, expected in zip(found, alone, strict=True):
            assert each.log_probabilities == pytest.approx(expected, rel=1e-5, abs=1e-5)
            assert each.total == pytest.approx(sum(expected), rel=1e-5)


@of_two_models
def test_greedy_is_told_of_the_models_own_text(model: nn.Module, tokenizer: Tokenizer) -> None:
    [done] = generate_batch(model, Tokenizer(tokenizer.backend, {}), [[5, 6, 7]], GREEDY)
    own, other = tuple(done.tokens), (*done.tokens[:-1], (done.tokens[-1] + 1) % 261)
    found = likelihoods(
        model, [ScoredPair((5, 6, 7), own), ScoredPair((5, 6, 7), other), ScoredPair((5, 6, 7), own[:3])]
    )
    assert [each.greedy for each in found] == [True, False, True]


@of_two_models
def test_the_context_may_be_filled_to_its_last_token(model: nn.Module) -> None:
    rng = random.Random(3)
    full = [ScoredPair(tuple(some(rng, 66)), (4, 9)), ScoredPair(tuple(some(rng, 2)), tuple(some(rng, 66)))]
    mixed = likelihoods(model, [*full, *pairs_of(4)])
    assert mixed[:2] == likelihoods(model, full) and len(mixed[1].log_probabilities) == 66
    with pytest.raises(UserError, match="prompt of 66 tokens and its answer of 3 do not fit .* context of 67"):
        likelihoods(model, [ScoredPair((1,) * 66, (1, 2, 3))])


@of_two_models
@pytest.mark.parametrize("pair", [ScoredPair((), (1,)), ScoredPair((1,), ())])
def test_nothing_has_no_likelihood(model: nn.Module, pair: ScoredPair) -> None:
    with pytest.raises(UserError, match="must have a token each"):
        likelihoods(model, [pair])


@of_kinds_of_memory
def test_texts_are_those_of_one_prompt_at_a_time(model: nn.Module, tokenizer: Tokenizer) -> None:
    asked = prompts(6)
    settings = [replace(GREEDY, max_tokens=5, temperature=n % 2, seed=n, log_probabilities=True) for n in range(6)]
    found = generate_batch(model, tokenizer, asked, settings, 2)
    for prompt, sampling, done in zip(asked, settings, found, strict=True):
        [alone] = generate_batch(model, tokenizer, [prompt], sampling)
        assert (done.text, done.tokens, done.finish_reason) == (alone.text, alone.tokens, alone.finish_reason)
        assert done.log_probabilities == pytest.approx(alone.log_probabilities, rel=1e-4, abs=1e-4)


def test_what_is_shared_is_computed_once(tokenizer: Tokenizer, script: Any) -> None:
    rng = random.Random(4)
    base, counted, told = some(rng, 300), [], script([98])
    plain = told.hidden
    told.hidden = lambda tokens, state, padding=None: counted.append(tokens.numel()) or plain(tokens, state, padding)
    asked = [base + some(rng, 5) for _ in range(40)]
    likelihoods(told, [ScoredPair(tuple(each), (n,)) for each in asked for n in range(12)])
    assert sum(counted) == 300 + 40 * 5
    counted.clear()
    generate_batch(told, tokenizer, asked, replace(GREEDY, max_tokens=1))
    assert sum(counted) == 305 + 39 * (305 - 288)  # blocks of 16 tokens are shared


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """Train a byte-level BPE whose tokens begin with spaces, as those of GPT-2 do."""
    return train_tokenizer("bpe", ["the cat sat on the mat, the cats sat on the mats"] * 9, 300)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("the cat", " sat"),
        ("the cat ", "sat"),
        ("the  ", " cat"),
        ("the c", "ats on the mats"),
        ("", "the"),
        ("the\n", "cat"),
    ],
)
def test_an_answer_is_split_where_its_prompt_ends(words: Tokenizer, prompt: str, answer: str) -> None:
    [pair] = join_tokens(words, [(prompt, answer)])
    bare, moved = prompt.rstrip(), prompt[len(prompt.rstrip()) :] + answer
    front = words.encode(bare) or [words.bos_id]
    assert pair.prompt == tuple(front)
    whole = words.encode(bare + moved)
    assert pair.answer == tuple(whole[len(words.encode(bare)) :])


def test_an_answer_that_grows_into_its_prompt_is_encoded_apart(words: Tokenizer) -> None:
    grown = next(
        (a[:n], a[n:]) for a in ("the cat sat on the mats",) for n in range(1, len(a) - 1)
        if a[:n].strip() == a[:n] and len(words.encode(a)) <= len(words.encode(a[:n]))
    )  # fmt: skip
    [pair] = join_tokens(words, [grown])
    assert pair == (tuple(words.encode(grown[0])), tuple(words.encode(grown[1])))
    with pytest.raises(UserError, match="The answer '' has no tokens"):
        join_tokens(words, [("the cat", "")])


def test_a_tokenizer_that_begins_a_text_does_so_before_a_prompt(words: Tokenizer, tokenizer: Tokenizer) -> None:
    assert first_context(words, ["", "the"]) == []
    from keifu.data.tokenizers.tokenizer import put_around_text

    other = train_tokenizer("bpe", ["the cat"], 260)
    put_around_text(other.backend, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, bos=True, eos=True)
    framed = Tokenizer(other.backend, {"bos_token": "<|endoftext|>"})
    assert first_context(framed, ["the"]) == [framed.bos_id]
    [pair] = join_tokens(framed, [("the", " cat")])
    assert pair.prompt[0] == framed.bos_id and framed.bos_id not in (*pair.prompt[1:], *pair.answer)
    with pytest.raises(UserError, match="A prompt is empty, and this tokenizer has no token that begins a text"):
        join_tokens(Tokenizer(words.backend, {}), [("", "the")])


@of_kinds_of_memory
def test_greedy_choice_writes_an_answer_if_each_of_its_tokens_is_the_likeliest(model: nn.Module) -> None:
    """Of two tokens, the likeliest ones are both, only the first, only the last, or none."""
    prompt = (5, 6, 7)
    likeliest = lambda *ids: int(model(torch.tensor([ids]))[0, -1].argmax())  # noqa: E731
    with torch.inference_mode():
        first = likeliest(*prompt)
        other = (first + 1) % 40
        answers = [(start, likeliest(*prompt, start)) for start in (first, other)]
    answers += [(start, (last + 1) % 40) for start, last in answers]
    found = likelihoods(model, [ScoredPair(prompt, answer) for answer in answers])
    assert [each.greedy for each in found] == [True, False, False, False]

"""A thousand requests of mixed lengths and settings: what each writes alone it writes among the others, to the bit."""

import random
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from native_toys import toy
from quick import quick

from keifu.inference.text.draft import Draft
from keifu.inference.text.engine import Engine
from keifu.inference.text.paged import stored
from keifu.inference.text.paged.folder import CacheFolder
from keifu.inference.text.sampling_params import SamplingParams
from keifu.native.library import INSTRUCTIONS
from keifu.native.model import BLOCK_SIZE, NativeLM, pack

pytestmark = pytest.mark.usefixtures("opened")
Asked = tuple[list[int], SamplingParams]
Written = list[tuple[int, float | None, float | None]]
WEIGHTS = ("f32", "bf16", "int8", "int4")
KINDS = (
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.3, min_p=0.02, frequency_penalty=0.4),
    SamplingParams(temperature=0.7, top_k=30, repetition_penalty=1.3),
    SamplingParams(top_p=0.8, presence_penalty=0.5),
)


def requests(count: int) -> list[Asked]:
    """Return prompts of 1 to 49 tokens, of which some begin alike."""
    rng = random.Random(count)
    roots = [[rng.randrange(101) for _ in range(40)] for _ in range(3)]

    def asked(number: int) -> Asked:
        prompt = rng.choice(roots)[: rng.randrange(41)] + [rng.randrange(101) for _ in range(rng.randrange(1, 10))]
        return prompt, replace(rng.choice(KINDS), max_tokens=rng.randrange(1, 30), seed=number, log_probabilities=True)

    return [asked(number) for number in range(count)]


def alone(packed: NativeLM, asked: list[Asked]) -> list[Written]:
    return [write(Engine(packed, None, packed.runner(3)), [each], None)[0] for each in asked]


def write(engine: Engine, asked: list[Asked], arrivals: random.Random | None) -> list[Written]:
    """Return tokens and log-probabilities of each; with `arrivals` a few requests come between two steps."""
    waiting, found, added = list(reversed(asked)), [[] for _ in asked], 0
    while engine.work or waiting:
        for _ in range(min(len(waiting), arrivals.randrange(5) if arrivals else 1)):
            engine.add(engine.request(*waiting.pop()))
            added += 1
        for piece in engine.step():
            found[piece.index].append((piece.token, piece.log_probability, piece.sampled_log_probability))
    assert added == len(asked)
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_block_is_known_by_all_tokens_before_it(weights: str) -> None:
    """Prompts a+b and c+d, then a+d: the block d behind c holds other keys and values than d behind a."""
    packed = pack(toy("qwen2", 0.3), weights)
    a, b, c, d = ([(first + step) % 101 for step in range(BLOCK_SIZE)] for first in (0, 20, 50, 77))
    sampling = SamplingParams(max_tokens=6, seed=1, log_probabilities=True)
    asked = [([*first, *second, 5], sampling) for first, second in ((a, b), (c, d), (a, d))]
    engine = Engine(packed, None, packed.runner(20))
    found: list[Written] = []
    for prompt, params in asked:
        engine.add(engine.request(prompt, params))
        found.append([])
        while engine.work:
            found[-1] += [(each.token, each.log_probability, each.sampled_log_probability) for each in engine.step()]
    assert found == [write(Engine(packed, None, packed.runner(4)), [each], None)[0] for each in asked]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_cache_folder_changes_no_bit(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new engine reads two blocks of the first question from the folder. Other weights, formats and instruction sets
    do not."""
    monkeypatch.setattr(stored, "TOKENS", BLOCK_SIZE)
    model, document = toy("qwen2", 0.3), [(3 * place) % 101 for place in range(66)]
    sampling = SamplingParams(temperature=0, max_tokens=6, seed=1, log_probabilities=True)

    def restarted(packed: NativeLM, question: list[int]) -> tuple[list[Written], int]:
        folder = CacheFolder(tmp_path, 2**30)
        engine = Engine(packed, None, packed.runner(20), folder=folder)
        request = engine.request([*document, *question], sampling)
        engine.add(request)
        found = [(each.token, each.log_probability, each.sampled_log_probability) for each in engine.pieces()]
        folder.flush()
        return [found], request.cached

    packed = pack(model, weights)
    for question, cached in (([1, 2], 0), ([3], 64), ([1, 2], 64)):
        assert restarted(packed, question) == (alone(packed, [([*document, *question], sampling)]), cached)
    with torch.no_grad():
        next(model.parameters())[5, 5] += 1
    assert restarted(pack(model, weights), [3])[1] == 0
    assert restarted(pack(toy("qwen2", 0.3), "bf16" if weights == "f32" else "f32"), [3])[1] == 0
    assert restarted(pack(toy("qwen2", 0.3), weights), [3])[1] == 64
    library = packed.library
    before = library.call("instructions")
    library.call("use_instructions", INSTRUCTIONS.index("portable"))
    try:
        assert restarted(packed, [3])[1] == 0 or before == INSTRUCTIONS.index("portable")
    finally:
        library.call("use_instructions", before)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_guesses_change_no_bit(weights: str) -> None:
    """A prompt that repeats itself is guessed; the tokens and their probabilities are those without guesses."""
    packed = pack(toy("qwen2", 0.3), weights)
    sampling = SamplingParams(temperature=0, max_tokens=30, seed=1, log_probabilities=True)
    asked = [([3, 1, 4, 1, 5, 9] * 3 + [number], replace(sampling, temperature=number / 3)) for number in range(3)]
    engine = Engine(packed, None, packed.runner(20), guesses=5)
    assert write(engine, asked, None) == alone(packed, asked)
    assert engine.guessed > 0
    assert write(Engine(packed, None, packed.runner(20), guesses=None), asked, None) == alone(packed, asked)


@pytest.mark.parametrize(("weights", "drafted"), quick(product(WEIGHTS, WEIGHTS)))
def test_a_packed_draft_changes_no_bit(weights: str, drafted: str) -> None:
    """The draft has the same layers and other numbers, so that some of its guesses are right."""
    model = toy("qwen2", 0.3)
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    packed, asked = pack(model, weights), requests(8)
    engine = Engine(packed, None, packed.runner(40), step_tokens=200, guesses=Draft(pack(other, drafted), most=3))
    assert write(engine, asked, random.Random(2)) == alone(packed, asked)
    assert 0 < engine.accepted < engine.guessed


def check(kind: str, weights: str, count: int) -> None:
    """Check requests that arrive at random, up to 32 at a time, in steps of few tokens, in a pool so small that texts
    are preempted."""
    packed, asked = pack(toy(kind, 0.3), weights), requests(count)
    engine = Engine(packed, None, packed.runner(9), max_running=32, step_tokens=50)
    preempted, plain = [], engine.scheduler._preempt
    engine.scheduler._preempt = lambda s: preempted.append(s.number) or plain(s)  # type: ignore[method-assign]
    assert write(engine, asked, random.Random(2)) == alone(packed, asked)
    assert preempted or kind == "mistral", "windows of 7 leave room for all"


@pytest.mark.parametrize(("kind", "weights"), quick(product(["qwen2", "gemma3"], WEIGHTS)))
def test_no_text_depends_on_the_others(kind: str, weights: str) -> None:
    check(kind, weights, 24)


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma3", "gpt2", "palm"])
def test_no_text_of_a_thousand_depends_on_the_others(kind: str, weights: str, instructions: str) -> None:
    check(kind, weights, 1000)

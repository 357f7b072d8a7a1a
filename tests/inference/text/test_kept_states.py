"""Recurrent models and windows: shared beginnings and rejected guesses change no token of any text.

The toys' recurrent layers are made strong, and their states last, so that a wrong state gives other tokens: tests with
wrong states say so.
"""

import contextlib
import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from generation_toys import LLAMA
from torch import nn

from keifu.inference.text.draft import Draft
from keifu.inference.text.engine import Engine
from keifu.inference.text.model import causal
from keifu.inference.text.paged.fixed_states import FixedStates, KeptStates, is_border
from keifu.inference.text.runner import TorchRunner
from keifu.inference.text.sampling_params import SamplingParams
from keifu.inference.text.scheduler import Sequence
from keifu.layers.recurrent.gated_convolution import GatedConvolution
from keifu.layers.recurrent.gated_delta import GatedDeltaNet
from keifu.models import llama
from keifu.models.hybrid import lfm2, qwen3_5, qwen3_next

SIZE: dict[str, Any] = {**LLAMA, "head_dim": 8, "context_length": 400, "n_kv_heads": 2, "norm_eps": 0.01}
LINEAR: dict[str, Any] = {
    **SIZE, "rope_dim": 4, "n_linear_key_heads": 2, "n_linear_value_heads": 4, "linear_key_dim": 6,
    "linear_value_dim": 8, "expert_dim": 12, "shared_dim": 10, "n_layers": 2, "global_layers": (1,),
}  # fmt: skip
SHORT: dict[str, Any] = {"dim": 24, "convolution": 4, "global_layers": (1,)}
RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "qwen3-next": lambda: qwen3_next.build(qwen3_next.Config(**LINEAR, n_experts=4, n_experts_per_token=2)),
    "qwen3.5": lambda: qwen3_5.build(qwen3_5.Config(**LINEAR)),
    "lfm2": lambda: lfm2.build(
        lfm2.Config(**{key: value for key, value in SIZE.items() if key not in ("dim", "head_dim")}, **SHORT)
    ),
}
of_recurrent_models = pytest.mark.parametrize("name", RECURRENT)
Asked = tuple[list[int], SamplingParams]
GREEDY = SamplingParams(temperature=0, max_tokens=6, seed=0)


def telling(name: str) -> nn.Module:
    """Return a toy whose next token depends on its states, and whose states depend on all tokens."""
    torch.manual_seed(3)
    model = RECURRENT[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for layer in model.modules():
            if isinstance(layer, GatedDeltaNet):
                layer.log_rate.fill_(-5)
            if isinstance(layer, GatedDeltaNet | GatedConvolution):
                layer.output.weight.mul_(8)
    return model


class Counting(TorchRunner):
    """Counts the tokens that are computed, and the spans that begin from a kept state."""

    def __init__(self, model: nn.Module, blocks: int, n_states: int = 40):
        super().__init__(causal(model), blocks, 4, n_states)
        self.tokens = self.begun = 0

    def run(self, batch: Any, last: Any = None) -> torch.Tensor:
        self.tokens += sum(len(span.tokens) for span in batch)
        self.begun += sum(span.origin is not None for span in batch)
        return super().run(batch, last)


def texts(rng: random.Random, count: int) -> list[list[int]]:
    return [[rng.randrange(261) for _ in range(rng.randrange(1, 9))] for _ in range(count)]


def written(engine: Engine, asked: list[Asked], arrivals: random.Random | None = None) -> list[list[int]]:
    """Return the tokens of each request. arrivals: they come a few at a time, between steps."""
    waiting, found = [*asked], [list[int]() for _ in asked]
    while engine.work or waiting:
        for _ in range(len(waiting) if arrivals is None else arrivals.randrange(3)):
            if waiting:
                engine.add(engine.request(*waiting.pop(0)))
        for piece in engine.step():
            found[piece.index].append(piece.token)
    return found


def alone(model: nn.Module, asked: list[Asked]) -> list[list[int]]:
    """Return the tokens of each request in an engine of its own."""
    return [written(Engine(model, None, Counting(model, 200)), [one])[0] for one in asked]


def in_turn(engine: Engine, asked: list[Asked]) -> tuple[list[list[int]], list[int]]:
    """Return the tokens of requests that come one after another, and the number of tokens that were computed of each
    prompt."""
    found, counts, runner = [], [], engine.runner
    assert isinstance(runner, Counting)
    for prompt, sampling in asked:
        before = runner.tokens
        number = engine.add(engine.request(prompt, sampling))
        found.append([piece.token for piece in engine.pieces() if piece.index == number])
        counts.append(runner.tokens - before - len(found[-1]) + 1)
    return found, counts


def questions(seed: int, count: int, length: int = 203) -> list[Asked]:
    """Return requests that begin with the same tokens; the first is greedy, the others are sampled or greedy."""
    rng = random.Random(seed)
    document = [rng.randrange(261) for _ in range(length)]
    return [
        (document + own, replace(GREEDY, temperature=number % 2, seed=number))
        for number, own in enumerate(texts(rng, count))
    ]


@of_recurrent_models
def test_the_second_question_about_a_document_computes_an_eighth_of_it(name: str) -> None:
    """203 tokens are 50 blocks and three tokens of the next. The second question begins at the last border before
    them, block 48; the state after block 50 is kept then, so the third computes only its own tokens."""
    model, asked = telling(name), questions(1, 4)
    engine = Engine(model, None, Counting(model, 200))
    found, computed = in_turn(engine, asked)
    assert found == alone(model, asked)
    lengths = [len(prompt) for prompt, _ in asked]
    assert computed == [lengths[0], lengths[1] - 192, lengths[2] - 200, lengths[3] - 200]


@of_recurrent_models
def test_a_wrong_state_would_change_the_tokens(name: str) -> None:
    model, asked = telling(name), questions(1, 9)
    runner = Counting(model, 200)
    engine = Engine(model, None, runner)
    first, _ = in_turn(engine, asked[:1])

    @torch.inference_mode()
    def disturb() -> None:
        runner._pool.states.kept[:, ::2] += 1

    disturb()
    found, computed = in_turn(engine, asked[1:2])
    for each in asked[2:]:
        disturb()
        found += in_turn(engine, [each])[0]
    expected = alone(model, asked)
    assert first == expected[:1] and computed < [30]
    assert sum(ours != theirs for ours, theirs in zip(found, expected[1:], strict=True)) >= (2 if name == "lfm2" else 6)


@of_recurrent_models
def test_questions_that_come_together_compute_the_document_once(name: str) -> None:
    model, asked = telling(name), questions(2, 5)
    runner = Counting(model, 400)
    engine = Engine(model, None, runner, step_tokens=64)
    found = written(engine, asked)
    assert found == alone(model, asked)
    own = sum(len(prompt) - 200 for prompt, _ in asked) + sum(len(tokens) - 1 for tokens in found)
    assert runner.tokens == 200 + own


def mixed(seed: int, count: int) -> list[Asked]:
    """Return requests of which many begin alike: with parts of three documents, and with earlier prompts."""
    rng = random.Random(seed)
    roots = [[rng.randrange(261) for _ in range(70)] for _ in range(3)]
    asked: list[Asked] = []
    for number, own in enumerate(texts(rng, count)):
        prompt = rng.choice(roots)[: rng.randrange(71)] + own
        if asked and rng.random() < 0.3:
            prompt = rng.choice(asked)[0] + own
        asked.append(
            (prompt, replace(GREEDY, temperature=number % 3 / 2, max_tokens=rng.randrange(2, 16), seed=number))
        )
    return asked


@of_recurrent_models
@pytest.mark.parametrize(
    ("states", "blocks", "step_tokens", "guesses"),
    [
        pytest.param(40, 60, 40, 0, marks=pytest.mark.slow),
        pytest.param(3, 60, 24, 0, marks=pytest.mark.slow),
        (9, 60, 90, 3),
    ],
)
def test_no_text_depends_on_the_others(name: str, states: int, blocks: int, step_tokens: int, guesses: int) -> None:
    """Texts that arrive at random, in a pool so small that some are preempted, with few kept states and guesses."""
    model, asked = telling(name), mixed(5, 16)
    runner = Counting(model, blocks, states)
    engine = Engine(model, None, runner, max_running=8, step_tokens=step_tokens, guesses=guesses)
    assert engine.guessing.most == min(guesses, step_tokens // 8 - 1)
    preempted: list[int] = []
    plain = engine.scheduler._preempt
    engine.scheduler._preempt = lambda s: preempted.append(s.number) or plain(s)  # type: ignore[method-assign]
    assert written(engine, asked, random.Random(1)) == alone(model, asked)
    manager = engine.scheduler.blocks
    assert manager.states is not None and not +manager.states._users
    names, never = manager.states._slot_of, len([*manager.states._never_used])
    assert len(names) + len(manager.states._empty) + never == states, "a slot was lost"
    assert names.keys() <= manager._block_of.keys(), "a state is dropped with its last block"
    assert manager.free == blocks and not runner._pool.states._slots
    assert preempted and runner.begun > 4


@of_recurrent_models
def test_an_interrupted_step_begins_from_the_kept_state_again(name: str) -> None:
    model, asked = telling(name), questions(4, 6, 41)
    runner = Counting(model, 60, 3)
    plain, calls = runner.run, itertools.count()

    def run_badly(batch: Any) -> torch.Tensor:
        call = next(calls)
        if call % 3 == 1:
            raise KeyboardInterrupt
        logits = plain(batch)
        if call % 3 == 2:
            raise KeyboardInterrupt
        return logits

    runner.run = run_badly  # type: ignore[method-assign]
    engine = Engine(model, None, runner, max_running=3, step_tokens=12)
    found: list[list[int]] = [[] for _ in asked]
    for one in asked:
        engine.add(engine.request(*one))
    while engine.work:
        with contextlib.suppress(KeyboardInterrupt):
            for piece in engine.step():
                found[piece.index].append(piece.token)
    assert found == alone(model, asked)


def shaken(model: nn.Module, name: str) -> nn.Module:
    """Return a draft that is often right: the model with noise on its weights."""
    draft = RECURRENT[name]().eval()
    draft.load_state_dict(model.state_dict())
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.02 * parameter.std().nan_to_num() * torch.randn_like(parameter)
    return draft


def half_right(expected: list[list[int]]) -> Callable[[Sequence, int], None]:
    """Return a method that guesses the next tokens of each text, of which about a third are changed."""
    rng = random.Random(3)

    def guess(sequence: Sequence, most: int) -> None:
        start = len(sequence.request.tokens)
        right = expected[sequence.number][start : start + min(most, sequence.room)]
        sequence.guesses = [(token + (rng.random() < 0.35)) % 261 for token in right]

    return guess


@of_recurrent_models
def test_guesses_change_no_text_of_a_recurrent_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = telling(name), mixed(6, 12)
    expected = alone(model, asked)
    monkeypatch.setattr(Sequence, "guess", half_right(expected))
    engine = Engine(model, None, Counting(model, 60), max_running=4, guesses=4)
    assert written(engine, asked) == expected
    assert 0.3 < engine.accepted / engine.guessed < 0.7


@of_recurrent_models
def test_a_recurrent_draft_goes_back_too(name: str) -> None:
    model, asked = telling(name), mixed(6, 6)
    engine = Engine(model, None, Counting(model, 60), max_running=4, guesses=Draft(shaken(model, name), None, 3))
    assert written(engine, asked) == alone(model, asked)
    assert 0 < engine.accepted < engine.guessed
    runner = engine.drafter and engine.drafter.runner
    assert isinstance(runner, TorchRunner) and not runner._pool.states._slots


@of_recurrent_models
def test_a_draft_that_is_the_model_is_always_right(name: str) -> None:
    """A draft whose state does not go back would be wrong sometimes."""
    model, asked = telling(name), [(prompt, replace(GREEDY, max_tokens=18)) for prompt, _ in mixed(6, 3)]
    engine = Engine(model, None, Counting(model, 60), guesses=Draft(model, None, 3))
    written(engine, asked)
    assert engine.accepted == engine.guessed > 20


@of_recurrent_models
def test_a_state_that_does_not_go_back_would_change_the_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after all guesses instead of the one after the last right guess."""
    model, asked = telling(name), mixed(6, 12)
    expected = alone(model, asked)
    before = FixedStates._before

    def after_all_guesses(states: FixedStates, span: Any, free: Any) -> int:
        slots = states._slots.get(span.sequence, {})
        return slots[max(slots)] if span.start in slots else before(states, span, free)

    monkeypatch.setattr(FixedStates, "_before", after_all_guesses)
    monkeypatch.setattr(Sequence, "guess", half_right(expected))
    found = written(Engine(model, None, Counting(model, 200), guesses=4), asked)
    assert sum(ours != theirs for ours, theirs in zip(found, expected, strict=True)) >= 6


def windowed(window: int) -> nn.Module:
    torch.manual_seed(2)
    model = llama.build(llama.Config(**{**SIZE, "sliding_window": window, "n_layers": 3})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("window", [1, 4, 5, 30, 150])
def test_a_beginning_is_shared_when_the_window_has_left_its_first_blocks(window: int) -> None:
    """The pool has fewer blocks than two documents: the first blocks are gone when the second question comes."""
    model, [first, second, third] = windowed(window), questions(7, 3)
    [other] = questions(8, 1)
    asked = [first, other, second, third]
    engine = Engine(model, None, Counting(model, 98), step_tokens=32)
    found, computed = in_turn(engine, asked)
    assert found == alone(model, asked)
    lengths = [len(prompt) for prompt, _ in asked]
    assert computed == [*lengths[:2], *(length - 200 for length in lengths[2:])]
    assert engine.scheduler.blocks.free == 98


@pytest.mark.parametrize("contiguous", [False, True])
def test_windows_are_shared_in_any_mix(contiguous: bool) -> None:
    model, asked = windowed(13), mixed(8, 20)
    runner = Counting(model, 40)
    runner.contiguous = contiguous
    engine = Engine(model, None, runner, max_running=6, step_tokens=32)
    assert written(engine, asked, random.Random(1)) == alone(model, asked)
    assert engine.scheduler.blocks.free == 40
    assert runner.tokens < 0.8 * sum(len(prompt) + (sampling.max_tokens or 0) for prompt, sampling in asked)


def test_borders_are_close_enough_to_compute_an_eighth_again() -> None:
    borders = [number for number in range(1, 5000) if is_border(number)]
    assert borders[:10] == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40] and len(borders) < 70
    for first, second in itertools.pairwise([0, *borders]):
        assert second - 1 - first <= max(3, second / 8)


def test_the_least_recently_used_state_is_dropped_unless_a_sequence_begins_from_it() -> None:
    states = KeptStates(2)
    for name in (b"a", b"b"):
        slot = states.reserve()
        assert slot is not None
        states.remember(slot, name)
    first = states.use(b"a")
    assert states.reserve() is not None and b"a" in states and b"b" not in states
    assert states.reserve() is None, "one slot is reserved, and the other one has a user"
    states.release(first)
    assert states.reserve() == first and b"a" not in states

"""Steps that are launched before the tokens of the last one are read: every request gets what it gets without."""

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from generation_toys import LLAMA, TOYS
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from simulated_device import Graph, device, simulated  # noqa: E402

from keifu.data.tokenizers.tokenizer import Tokenizer  # noqa: E402
from keifu.errors import UserError  # noqa: E402
from keifu.inference.text import logits_processors, runner, sampler  # noqa: E402
from keifu.inference.text.engine import Engine  # noqa: E402
from keifu.inference.text.model import causal  # noqa: E402
from keifu.inference.text.paged import graphs  # noqa: E402
from keifu.inference.text.request import Piece, Request  # noqa: E402
from keifu.inference.text.runner import TorchRunner  # noqa: E402
from keifu.inference.text.sampler import Sampler  # noqa: E402
from keifu.inference.text.sampling_params import SamplingParams  # noqa: E402
from keifu.models import llama  # noqa: E402

QUICK = ("grouped", "window", "states of fixed size")
FEW = (0, 2, 6, 8)  # seeds of mixes that differ; of 6, texts are preempted


class TokenByToken(TorchRunner):
    """Computes every token by itself, so that no bit depends on the others of its step.

    grain: of the logits; a coarse one makes many tokens equally likely. ahead: steps launched before the last one's
    tokens were read.
    """

    def __init__(self, model: nn.Module, blocks: int, overlaps: bool, grain: float = 0.0):
        super().__init__(causal(model), blocks, 4)
        self.overlaps, self.grain, self.ahead, self.steps, self.tokens = overlaps, grain, 0, 0, 0

    def _run(self, batch: Any, last: Tensor | None) -> Tensor:
        self.steps, self.ahead = self.steps + 1, self.ahead + (last is not None)
        self.tokens += sum(len(span.tokens) for span in batch)
        rows = []
        for span in batch:
            for place, token in enumerate(span.tokens):
                wanted, sources = int(place >= len(span.tokens) - span.wanted), () if place else span.sources
                start = span.start + place
                borders = {end: slot for end, slot in span.borders.items() if end == start + 1}
                one = replace(span, tokens=[token], start=start, wanted=wanted, sources=sources, borders=borders)
                logits = super()._run([one], last)
                rows += [logits] if wanted else []
        found = torch.cat(rows) if rows else torch.empty(0, self.vocab_size)
        return found.div(self.grain).round() * self.grain if self.grain else found


class Alternating:
    """Allows even tokens after odd ones and the reverse."""

    def __init__(self):
        self.last = 0

    def allowed(self) -> Tensor:
        return torch.arange(261) % 2 != self.last % 2

    def accept(self, token: int) -> None:
        self.last = token


class Asked(NamedTuple):
    """A request, the step at which it comes, and the number of tokens after which it is given up."""

    prompt: list[int]
    sampling: SamplingParams
    constrained: bool
    comes: int
    patience: int


@dataclass
class Mix:
    """A random mix of requests and the limits of the engine that writes them."""

    asked: list[Asked]
    pool: int
    most: int
    step_tokens: int

    @classmethod
    def draw(cls, seed: int, kinds: list[SamplingParams]) -> "Mix":
        rng = random.Random(seed)
        roots = [[rng.randrange(261) for _ in range(24)] for _ in range(2)]
        together, patient = rng.random() < 0.4, rng.random() < 0.5

        def asked(number: int) -> Asked:
            prompt = rng.choice(roots)[: rng.randrange(4)] + [rng.randrange(261) for _ in range(rng.randrange(1, 9))]
            stops = tuple(chr(rng.randrange(32, 127)) for _ in range(rng.choice((0, 0, 0, 3))))
            sampling = replace(
                rng.choice(kinds), seed=number + 100 * seed, max_tokens=rng.choice((1, 2, 5, 14, 30, None)), stop=stops,
                log_probabilities=rng.random() < 0.7, top_log_probabilities=rng.randrange(3),
                logit_bias=((0, rng.choice((0.0, 0.0, 6.0))),),  # the token that ends a text
            )  # fmt: skip
            comes = 0 if together else rng.randrange(30)
            return Asked(prompt, sampling, rng.random() < 0.06, comes, 99 if patient else rng.choice((99, 0, 1, 4)))

        count = rng.randrange(2, 19)
        pool = rng.choice((18, 22, 500))
        return cls([asked(number) for number in range(count)], pool, rng.choice((2, 4, 16)), rng.choice((16, 64)))

    def write(self, runner: TokenByToken, tokenizer: Tokenizer) -> tuple[list[tuple[Any, ...]], int]:
        """Return the pieces and the usage of each request, and how often a text was preempted."""
        engine = Engine(runner.model, tokenizer, runner, self.most, self.step_tokens)  # type: ignore[arg-type]
        requests, pieces, preempted, steps = list[Request](), dict[int, list[Piece]](), 0, 0
        waiting = sorted(self.asked, key=lambda each: each.comes)
        while engine.work or waiting:
            while waiting and (waiting[0].comes <= steps or not engine.work):
                each = waiting.pop(0)
                constraint = Alternating() if each.constrained else None
                request = Request(each.prompt, each.sampling, tokenizer, 261, 67, constraint)
                requests.append(request)
                pieces[engine.add(request)] = []
                if not each.patience:
                    engine.abort(request.index)
            for piece in engine.step():
                pieces[piece.index].append(piece)
            steps, preempted = steps + 1, preempted + len(engine.scheduler.preempted)
            for each, request in zip(sorted(self.asked, key=lambda each: each.comes), requests, strict=False):
                if len(pieces[request.index]) >= each.patience:
                    del pieces[request.index][each.patience :]
                    engine.abort(request.index)
        assert engine.scheduler.blocks.free == runner.n_blocks and not engine._steps
        assert not runner._pool.states._slots
        return [(pieces[r.index], r.tokens, len(r.prompt), r.limit, r.cached) for r in requests], preempted


KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=5, repetition_penalty=1.3),
    SamplingParams(top_p=0.8, presence_penalty=0.5),
    SamplingParams(temperature=1.5, min_p=0.02, frequency_penalty=0.4),
]


@dataclass
class Count:
    """Counts of all mixes together: steps, those that were launched early, tokens that were dropped, preemptions."""

    steps: int = 0
    ahead: int = 0
    dropped: int = 0
    preempted: int = 0


def compare(model: nn.Module, tokenizer: Tokenizer, mixes: list[Mix], grain: float = 0.0) -> Count:
    """Write each mix in both ways; everything is equal to the last bit."""
    count = Count()
    for mix in mixes:
        plain, ahead = (TokenByToken(model, mix.pool, overlaps, grain) for overlaps in (False, True))
        expected, _ = mix.write(plain, tokenizer)
        found, preempted = mix.write(ahead, tokenizer)
        assert found == expected
        assert not plain.ahead
        count.steps, count.ahead = count.steps + ahead.steps, count.ahead + ahead.ahead
        count.dropped, count.preempted = count.dropped + ahead.tokens - plain.tokens, count.preempted + preempted
    return count


def small_window(model: nn.Module) -> bool:
    return TorchRunner(causal(model), 1).window is not None


@pytest.mark.parametrize(
    ("model", "seeds"),
    [(name, FEW) for name in QUICK] + [pytest.param(name, range(30), marks=pytest.mark.slow) for name in TOYS],
    indirect=["model"],
)
def test_every_request_gets_what_it_gets_without(model: nn.Module, tokenizer: Tokenizer, seeds: Iterable[int]) -> None:
    """Tokens, texts, figures, reasons and usage, with stops, constraints, ends that users give, and preemption."""
    count = compare(model, tokenizer, [Mix.draw(seed, KINDS) for seed in seeds])
    assert count.ahead > count.steps / 3 and count.dropped > 5
    assert count.preempted or small_window(model)  # which leaves blocks free


LIMITED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.5, top_k=5),
    SamplingParams(top_k=7, top_p=0.9, min_p=0.01, frequency_penalty=0.4),
]


@pytest.mark.parametrize(("model", "seeds"), [("grouped", 3), ("states of fixed size", 1)], indirect=["model"])
def test_a_token_that_the_shortlist_lacks_is_chosen_again(
    model: nn.Module, seeds: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tokens are equally likely: the step after them was launched with a wrong token, and is computed again."""
    monkeypatch.setattr(sampler, "LARGE", 261)
    monkeypatch.setattr(logits_processors, "SHORTLIST", 8)
    again, asked = list[int](), Sampler.__init__

    def watched(self: Sampler, requests: Any, *given: Any, **more: Any) -> None:
        again.append(len(given) == 2)
        asked(self, requests, *given, **more)

    monkeypatch.setattr(Sampler, "__init__", watched)
    count = compare(model, tokenizer, [Mix.draw(seed, LIMITED) for seed in range(seeds)], grain=6.0)
    assert count.ahead > 20 and sum(again) > 10
    again.clear()
    count = compare(model, tokenizer, [Mix.draw(3, [replace(LIMITED[1], top_k=0, top_p=0.9)])])
    assert not count.ahead and not sum(again)  # the host has to see whether the list was enough


class Damaged(TokenByToken):
    """Gives no logits after 6 tokens of the second request."""

    def _run(self, batch: Any, last: Tensor | None) -> Tensor:
        logits = super()._run(batch, last)
        for row, span in enumerate(batch):
            if span.sequence == 1 and span.start == 5:
                logits[row] = torch.nan
        return logits


@pytest.mark.parametrize("model", ["grouped", "states of fixed size"], indirect=True)
def test_an_error_of_one_request_changes_no_other(model: nn.Module, tokenizer: Tokenizer) -> None:
    """The step that was launched after the error is dropped, and what was not taken is chosen again."""
    found = []
    for runs in (TokenByToken, Damaged):
        for overlaps in (False, True):
            engine = Engine(model, tokenizer, runs(model, 100, overlaps))
            asked = [engine.request([3, 4, n], SamplingParams(max_tokens=20, seed=n)) for n in range(3)]
            for request in asked:
                engine.add(request)
            while engine.work:
                try:
                    engine.step()
                except UserError:
                    engine.abort(1)
            found.append([asked[0].tokens, asked[2].tokens])
    assert len(asked[1].tokens) == 3 and found == found[:1] * 4


@pytest.mark.parametrize("replays", [False, True])
def test_a_simulated_device_writes_the_same_in_both_ways(
    replays: bool, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where steps are replayed as graphs, which read the last tokens from memory of their own."""
    if replays:
        monkeypatch.setattr(runner, "has_kernel", lambda device: device.type == "sim")
        monkeypatch.setattr(graphs, "capture", Graph.capture)
        monkeypatch.setattr(graphs, "new_memory", object)
    torch.manual_seed(1)
    sizes: dict[str, Any] = {**LLAMA, "n_layers": 1, "head_dim": 8, "n_kv_heads": 2}
    model: Any = llama.build(llama.Config(**sizes)).bfloat16().eval()
    with simulated():
        count = compare(model.to(device()), tokenizer, [Mix.draw(3, KINDS)])
    assert count.ahead > count.steps / 2 and count.dropped > 0, count


@pytest.mark.parametrize("model", ["grouped"], indirect=True)
def test_a_request_that_comes_later_is_admitted_while_others_run(model: nn.Module, tokenizer: Tokenizer) -> None:
    """The first request writes for much longer than the second, so a step that ignored the second would be seen."""
    engine = Engine(model, tokenizer, TokenByToken(model, 100, overlaps=True))  # type: ignore[arg-type]
    bias = ((0, -100.0),)  # no text ends before its limit
    long, short = (engine.request([3, 4], SamplingParams(max_tokens=n, seed=n, logit_bias=bias)) for n in (40, 4))
    engine.add(long)
    for _ in range(6):
        engine.step()
    engine.add(short)
    while len(short.tokens) < 4:
        engine.step()
    assert 4 < len(long.tokens) < 40 / 2

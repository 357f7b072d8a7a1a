"""Steps that are launched before the tokens of the last one are read: every request gets what it gets without."""

import random
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.generation.text import logits_processors, sampler
from keifu.generation.text.engine import Engine
from keifu.generation.text.model import causal
from keifu.generation.text.request import Piece, Request
from keifu.generation.text.runner import TorchRunner
from keifu.generation.text.sampling_params import SamplingParams

QUICK = ("gpt2", "grouped", "window", "states of fixed size", "angles by length")


class TokenByToken(TorchRunner):
    """Computes every token by itself, so that no bit depends on the others of its step.

    grain: of the logits; a coarse one makes many tokens equally likely. ahead: steps launched before the last one's
    tokens were read.
    """

    def __init__(self, model: nn.Module, blocks: int, overlaps: bool, grain: float = 0.0):
        super().__init__(causal(model), blocks, 4)
        self.overlaps, self.grain, self.ahead, self.steps = overlaps, grain, 0, 0

    def _run(self, batch: Any, last: Tensor | None) -> Tensor:
        self.steps, self.ahead = self.steps + 1, self.ahead + (last is not None)
        rows = []
        for span in batch:
            for place, token in enumerate(span.tokens):
                wanted, sources = int(place >= len(span.tokens) - span.wanted), () if place else span.sources
                one = replace(span, tokens=[token], start=span.start + place, wanted=wanted, sources=sources)
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
            stops = tuple(chr(rng.randrange(32, 127)) for _ in range(rng.choice((0, 0, 9))))
            sampling = replace(
                rng.choice(kinds), seed=number + 100 * seed, max_tokens=rng.choice((1, 2, 5, 14, 30, None)), stop=stops,
                log_probabilities=rng.random() < 0.7, top_log_probabilities=rng.randrange(3),
                logit_bias=((256, rng.choice((0.0, 9.0))),),  # the token that ends a text
            )  # fmt: skip
            comes = 0 if together else rng.randrange(30)
            return Asked(prompt, sampling, rng.random() < 0.06, comes, 99 if patient else rng.choice((99, 0, 1, 4)))

        count = rng.randrange(2, 14)
        pool = rng.choice((24, 30, 500))
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


@pytest.mark.parametrize("model", QUICK, indirect=True)
def test_debug(model: nn.Module, tokenizer: Tokenizer) -> None:
    total = [0] * 6
    for seed in range(4):
        mix = Mix.draw(seed, KINDS)
        plain, ahead = TokenByToken(model, mix.pool, False), TokenByToken(model, mix.pool, True)
        expected, p1 = mix.write(plain, tokenizer)
        found, p2 = mix.write(ahead, tokenizer)
        for one, other in zip(found, expected, strict=True):
            assert one[:4] == other[:4], seed
            total[0] += one[4] != other[4]
            total[5] += bool(one[4])
        total[1] += ahead.ahead
        total[2] += ahead.steps
        total[3] += plain.steps
        total[4] += p2
    print(total, flush=True)

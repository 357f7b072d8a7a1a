"""Models that are computed natively: which ones are, and that texts are scored with the bits of their logits."""

import sys
from pathlib import Path

import pytest
import torch
from scored import score_sampled
from torch import Tensor

from keifu.errors import UserError
from keifu.inference.text.likelihood import (
    LikelihoodReader,
    ScoredPair,
    likelihoods,
    score,
    score_likeliest,
)
from keifu.inference.text.runner import TorchRunner, runner_of
from keifu.inference.text.sampling_params import SamplingParams
from keifu.native import library
from keifu.native.model import NativeLM, NativeRunner, pack

sys.path.insert(0, str(Path(__file__).parents[2] / "native"))
from native_toys import toy  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.usefixtures("opened")


@pytest.fixture(scope="module")
def packed() -> NativeLM:
    return pack(toy("qwen3"), "int8")


def tokens(length: int, seed: int) -> list[int]:
    return torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logs(packed: NativeLM, text: list[int]) -> Tensor:
    logits = packed(torch.tensor([text[:-1]]))[0]
    return logits - logits.logsumexp(-1, keepdim=True)


def test_bfloat16_runs_natively_unless_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy("llama")
    assert isinstance(runner_of(model), TorchRunner)
    model.to(torch.bfloat16)
    assert isinstance(runner_of(model), NativeRunner)
    monkeypatch.setenv(library.VARIABLE, "off")
    assert isinstance(runner_of(model), TorchRunner)


def test_score_has_the_bits_of_the_logits(packed: NativeLM) -> None:
    long = tokens(70, 1)
    rows = torch.tensor([long, tokens(70, 2)])
    found = score(packed, rows)
    for row, text in zip(found, rows.tolist(), strict=True):
        assert torch.equal(row, logs(packed, text).gather(1, torch.tensor(text[1:])[:, None])[:, 0])
    sampled = score_sampled(packed, rows[0], 40, SamplingParams(temperature=1.0, seed=0))
    assert torch.equal(sampled, found[0, 39:])
    likeliest = score_likeliest(packed, rows[0], 3)
    assert likeliest.values == found[0].tolist()
    assert [top[0][0] for top in likeliest.top] == logs(packed, long).argmax(-1).tolist()
    with pytest.raises(UserError, match="81 tokens, but this model's context is 80"):
        score(packed, torch.tensor([tokens(81, 3)]))


def pairs() -> list[ScoredPair]:
    """Return prompts that begin alike, some far, some whole; answers of one token, of several, and that begin alike."""
    head = tokens(40, 4)
    prompts = [tuple(head + tokens(length, seed)) for seed, length in enumerate([3, 30, 3, 0])] + [tuple(tokens(5, 9))]
    answers = [(7,), (8,), (8, 9), (8, 10), (3, 4, 5)]
    return [ScoredPair(prompt, answer) for prompt in prompts for answer in answers]


def test_likelihoods_have_the_bits_of_the_logits(packed: NativeLM) -> None:
    done: list[int] = []
    found = likelihoods(packed, pairs(), advance=done.append)
    assert done[-1] == 5
    for (prompt, answer), each in zip(pairs(), found, strict=True):
        expected = logs(packed, [*prompt, *answer])[-len(answer) :]
        assert list(each.log_probabilities) == [row[token].item() for row, token in zip(expected, answer, strict=True)]
        assert each.greedy == (expected.argmax(-1).tolist() == list(answer))


@pytest.mark.parametrize("n_blocks", [3, 5, 40])
def test_whatever_room_there_is_for_what_texts_share(packed: NativeLM, n_blocks: int) -> None:
    texts = [([*prompt, *answer], len(answer)) for prompt, answer in pairs()]
    reader = LikelihoodReader(packed.runner(n_blocks))
    for (text, wanted), logits in zip(texts, reader.read(texts), strict=True):
        assert torch.equal(logits, packed(torch.tensor([text]))[0, -wanted:])
    assert reader.blocks.free == n_blocks


def test_a_text_that_does_not_fit_the_memory_is_refused(packed: NativeLM) -> None:
    with pytest.raises(UserError, match="A text of 65 tokens does not fit .* which holds 64 tokens"):
        list(LikelihoodReader(packed.runner(2)).read([(tokens(64, 1), 3), (tokens(65, 2), 3)]))

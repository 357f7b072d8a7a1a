"""The bound of masked diffusion: exact for a model that looks at nothing, above the likelihood of the best one."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from keifu.commands.evaluate import select_task
from keifu.data.tokenizers.train import train_tokenizer
from keifu.evaluation.registry import EvalRequest
from keifu.evaluation.text import diffusion_bound


class Shares(nn.Module):
    """A predictor with one distribution for every mask."""

    def __init__(self, probabilities: list[float], length: int = 16):
        super().__init__()
        self.config = SimpleNamespace(context_length=length, mask_token=len(probabilities) - 1)
        self.logs = nn.Parameter(torch.tensor(probabilities).log())

    def predict_masked(self, tokens: Tensor) -> Tensor:
        return self.logs.expand(*tokens.shape, -1)


def test_a_model_that_looks_at_nothing_has_its_entropy() -> None:
    model, window = Shares([0.5, 0.25, 0.25, 0.0]), torch.tensor([0, 1, 2, 0] * 4)
    found = [diffusion_bound.bound(model, window, seed, batch_size=3) for seed in range(100)]
    assert sum(found) / 100 == pytest.approx(1.5 * math.log(2), rel=0.01)
    assert diffusion_bound.bound(model, window, 1) == pytest.approx(found[1])
    assert len(set(found)) > 50


class Copies(Shares):
    """Two tokens that are the same: a predictor that knows it, of a fair coin."""

    def predict_masked(self, tokens: Tensor) -> Tensor:
        other = tokens.flip(1)
        sure = nn.functional.one_hot(other, 3).float().log()
        return torch.where((other == 2)[..., None], self.logs, sure)


def test_the_bound_of_the_best_model_is_its_likelihood() -> None:
    """Both masked: 2 log 2 times 1; one masked: 0. In the mean log 2, which is -log p of the pair."""
    model = Copies([0.5, 0.5, 0.0], 2)
    found = [2 * diffusion_bound.bound(model, torch.tensor([1, 1]), seed) for seed in range(20)]
    assert sum(found) / 20 == pytest.approx(math.log(2), rel=1e-5)  # draws are spread: half of them have both masked


def test_the_command_gives_bits_per_byte_with_an_interval(tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abab" * 40)
    tokenizer = train_tokenizer("characters", ["ab"], 40)
    model = Shares([1 / tokenizer.vocab_size] * tokenizer.vocab_size + [0.0])
    task = select_task(model, str(text))
    assert task is diffusion_bound
    found = task.evaluate(model, tokenizer, EvalRequest(str(text), limit=5)).figures
    low, high = map(float, found["bits per byte, at most, 95% interval"].split(" to "))
    assert low <= found["bits per byte, at most"] <= high and found["tokens"] == 80
    assert found["bits per byte, at most"] == pytest.approx(math.log2(tokenizer.vocab_size), rel=0.1)

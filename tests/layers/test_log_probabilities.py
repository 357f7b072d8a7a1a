"""Log-probabilities of tokens against PyTorch's own, gradients too, also in several parts."""

import pytest
import torch

from keifu.layers.losses import head
from keifu.layers.losses.log_probabilities import token_log_probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("at_a_time", [2**25, 23 * 4])
def test_numbers_entropy_and_gradients(temperature: float, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_A_TIME", at_a_time)
    torch.manual_seed(2)
    hidden, weight = torch.randn(11, 6, requires_grad=True), torch.randn(23, 6, requires_grad=True)
    tokens, upstream = torch.randint(0, 23, (11,)), torch.randn(11)
    found, entropy = token_log_probabilities(hidden, weight, tokens, temperature)
    ours = torch.autograd.grad((found * upstream).sum(), (hidden, weight))
    logs = torch.log_softmax(hidden @ weight.T / temperature, -1)
    expected = logs.gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logs).entropy())
    for mine, theirs in zip(ours, torch.autograd.grad((expected * upstream).sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_of_nothing() -> None:
    found, entropy = token_log_probabilities(torch.zeros(0, 4), torch.randn(5, 4), torch.zeros(0, dtype=torch.long))
    assert found.shape == entropy.shape == (0,)

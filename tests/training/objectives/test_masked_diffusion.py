"""The loss of masked diffusion: by hand, split anywhere, with masking rates that are spread evenly."""

import pytest
import torch
import torch.nn.functional as F

from keifu.layers.counter_rng import uniform
from keifu.models.diffusion import llada
from keifu.processes import Processes
from keifu.training.objectives.diffusion import LEAST, add_masking_rates
from keifu.training.objectives.language_modeling import masked_diffusion

SIZES = {"vocab_size": 23, "context_length": 12, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}


class Rows:
    """The same tokens each time."""

    fingerprint = "toy"

    def __init__(self, rows: int = 8):
        self.tokens = torch.randint(22, (rows, 12), generator=torch.Generator().manual_seed(0))

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Return them."""
        return {"tokens": self.tokens}

    def validation(self):
        """Yield two batches."""
        yield from (self.batch(0), self.batch(1))


def build() -> llada.MaskedDiffusionLM:
    torch.manual_seed(0)
    return llada.build(llada.Config(**SIZES, mask_token=22))


def test_the_loss_is_that_of_masked_tokens_over_their_rate() -> None:
    model, batch = build(), add_masking_rates(Rows(), 3).batch(5)
    expected, hidden = torch.zeros(()), 0
    for tokens, rate, draw in zip(batch["tokens"], batch["rates"], batch["draws"], strict=True):
        masked = uniform(draw.expand(12), torch.arange(12)) < rate
        logits = model(tokens.masked_fill(masked, 22)[None])[0]
        expected = expected + F.cross_entropy(logits[masked], tokens[masked], reduction="sum") / rate
        hidden += int(masked.sum())
    found = masked_diffusion(model, batch)
    assert 0 < hidden < 96 and found.weight == 96
    torch.testing.assert_close(found.total, expected)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_batch_may_be_split_anywhere(rows: int) -> None:
    model, batch = build(), add_masking_rates(Rows(), 3).batch(5)
    parts = [masked_diffusion(model, part.batch) for part in Processes().micro_batches(batch, rows)]
    torch.testing.assert_close(sum(part.total for part in parts), masked_diffusion(model, batch).total)
    assert sum(part.weight for part in parts) == 96


def test_rates_are_uniform_and_spread_evenly_over_a_step() -> None:
    data = add_masking_rates(Rows(16), 1)
    rates = [data.batch(step)["rates"] for step in range(200)]
    assert all(row.min() >= LEAST and row.max() <= 1 for row in rates)
    means = torch.stack([row.mean() for row in rates])
    assert means.std() < 0.03  # of 16 independent ones: 0.29 / 4
    assert torch.stack(rates)[:, 0].std() > 0.25
    assert not torch.equal(rates[0], rates[1]) and torch.equal(rates[7], data.batch(7)["rates"])
    first, second = data.validation()
    assert torch.equal(first["rates"], next(data.validation())["rates"])
    both = torch.cat([first["rates"], second["rates"]]).sort().values
    assert both.diff().max() < 0.08  # the second batch goes on with the recurrence

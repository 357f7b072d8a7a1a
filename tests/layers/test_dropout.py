"""Dropout from a counter: the rate is exact, masks are independent, and each is a function of its key alone."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from keifu.layers.attention.attention import Attention, Scoring, attend
from keifu.layers.attention.masks import CausalMask
from keifu.layers.counter_rng import bits, bits16
from keifu.layers.dropout import LEVELS, Dropout, DropoutKeys, dropout_mask

CPU = torch.device("cpu")
ROWS, ELEMENTS = 32, 40_001


def row_keys(rows: int = ROWS, seed: int = 7) -> Tensor:
    return bits(torch.full((rows,), seed), torch.arange(rows))


def keyed(model: nn.Module, rows: int, step: int = 3, first: int = 0, seed: int = 5) -> nn.Module:
    DropoutKeys(model, seed, CPU).set(step, first, rows)
    return model.train()


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.003])
def test_the_rate_and_the_independence_of_masks_have_exact_bounds(rate: float) -> None:
    """All are sums of independent draws with a known variance: 5 standard deviations, once in a million."""
    dropped = round(rate * LEVELS)
    exact = dropped / LEVELS
    assert abs(exact - rate) <= 0.5 / LEVELS
    mask = dropout_mask(row_keys(), ROWS * ELEMENTS, dropped).double()
    z = (mask - exact) / math.sqrt(exact * (1 - exact))
    assert abs(z.mean()) * math.sqrt(z.numel()) < 5
    assert (z.mean(1).abs() * math.sqrt(ELEMENTS)).max() < 5  # of each row
    for apart in (1, 2, 3, 4, 5, 7, 8, 64, 256, 768):  # neighbours, and those that share a product of 64 bits
        assert abs((z[:, :-apart] * z[:, apart:]).mean()) * math.sqrt(ROWS * (ELEMENTS - apart)) < 5
    between_rows = (z @ z.T / math.sqrt(ELEMENTS)).fill_diagonal_(0)
    assert between_rows.abs().max() < 5.5


def test_all_values_of_16_bits_are_as_likely() -> None:
    numbers = bits16(row_keys(), ELEMENTS).long() + LEVELS // 2
    for places in (numbers[:, lane::4] for lane in range(4)):
        for part in (places >> 8, places & 255):
            expected = part.numel() / 256
            chi_square = ((torch.bincount(part.flatten(), minlength=256) - expected) ** 2 / expected).sum()
            assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_layers_steps_seeds_and_rows_have_masks_of_their_own() -> None:
    x = torch.ones(4, 8192)

    def masks(seed: int, step: int, first: int) -> list[Tensor]:
        layers = keyed(nn.Sequential(Dropout(0.5), Dropout(0.5)), 4, step, first, seed)
        return [row for layer in layers for row in layer(x).bool()]

    rows = torch.stack(masks(0, 0, 0) + masks(0, 1, 0) + masks(1, 0, 0) + masks(0, 0, 4)).double()
    together = ((2 * rows - 1) @ (2 * rows - 1).T / math.sqrt(8192)).fill_diagonal_(0)
    assert together.abs().max() < 5.5


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 4, 6)])
def test_a_row_has_its_mask_alone_in_any_part_and_beside_others_of_its_own(shape: tuple[int, ...]) -> None:
    whole = keyed(Dropout(0.4), 6)(torch.ones(6, *shape))
    for first, rows in ((0, 1), (2, 3), (5, 1)):
        part = keyed(Dropout(0.4), rows, first=first)(torch.ones(rows, *shape))
        assert torch.equal(part, whole[first : first + rows])
    folded = keyed(Dropout(0.4), 6)(torch.ones(12, *shape))
    assert torch.equal(keyed(Dropout(0.4), 2, first=4)(torch.ones(4, *shape)), folded[8:])
    assert not torch.equal(folded[0], folded[1])


def test_what_is_kept_is_scaled_so_that_the_mean_stays() -> None:
    x = torch.randn(8, 50, requires_grad=True)
    y = keyed(Dropout(0.3), 8)(x)
    scale = LEVELS / (LEVELS - round(0.3 * LEVELS))
    assert scale == pytest.approx(1 / 0.7, rel=1e-4)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] * scale)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(kept, scale, 0.0))


def test_evaluation_drops_nothing_and_without_keys_torchs_generator_draws() -> None:
    x = torch.ones(4, 500)
    layer = keyed(Dropout(0.5), 4)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(keyed(Dropout(0.0), 4)(x), x)
    layer.train().keys.clear()
    torch.manual_seed(1)
    expected = nn.functional.dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(layer(x), expected)
    assert torch.equal(keyed(Dropout(1.0), 4)(x), torch.zeros_like(x))


def test_an_input_that_is_not_made_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="must be the 4 rows: it has 15 elements"):
        keyed(Dropout(0.5), 4)(torch.ones(5, 3))


def test_attention_drops_weights_as_the_formula_says() -> None:
    q, k, v = (torch.randn(2, 4, 5, 8, requires_grad=True) for _ in range(3))
    layer = keyed(Dropout(0.4), 2)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    weights = (q @ k.mT / 8**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
    expected = (layer(weights) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(q, k, v, "causal", Scoring(layer)), expected)
    whole = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(q, k, v, "causal", Scoring(layer.eval())), whole)


def test_a_layer_computed_again_in_the_backward_pass_has_the_same_mask() -> None:
    def gradients(again: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = keyed(Attention(8, 2, dropout=0.5), 3)
        x = torch.randn(3, 5, 8, requires_grad=True)
        mask = CausalMask(0, 5)
        y = checkpoint(model, x, mask, use_reentrant=False, preserve_rng_state=False) if again else model(x, mask)
        y.square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_a_copy_of_a_model_has_keys_of_its_own() -> None:
    model = keyed(nn.Sequential(Dropout(0.5)), 2)
    other = copy.deepcopy(model)
    model[0].keys.clear()
    assert other[0].keys.table is not None and model[0].keys.table is None

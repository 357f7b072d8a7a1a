"""Adafactor without factoring: against transformers, torch and the formulas in float64; joined matrices by parts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_toys import Sequences, objective, run, settings, toy, weights
from transformers.optimization import Adafactor as Theirs

from keifu.layers.linear import JoinedLinear
from keifu.training.loop import train
from keifu.training.optim.adafactor import Adafactor
from keifu.training.optim.optimizers import Optimizers
from keifu.training.run import checkpoint

Moves = list[list[Tensor]]


def case(seed: int, shapes: list[tuple[int, ...]]) -> tuple[list[Tensor], Moves]:
    """Return tensors of very different sizes, one nearly 0, and gradients of many sizes, a third of their numbers 0."""
    torch.manual_seed(seed)
    start = [torch.randn(shape) * 10 ** (i - 2) for i, shape in enumerate(shapes)]
    start[0] *= 1e-4
    moves = [[torch.randn(shape) * 10 ** (k % 5 - 3) for shape in shapes] for k in range(12)]
    for gradients in moves:
        for gradient in gradients:
            gradient.view(-1)[::3] = 0
    return start, moves


def moved(optimizer: type, start: list[Tensor], moves: Moves, **options) -> list[nn.Parameter]:
    made = [nn.Parameter(tensor.clone()) for tensor in start]
    acting = optimizer(made, **options)
    for gradients in moves:
        for parameter, gradient in zip(made, gradients, strict=True):
            parameter.grad = gradient.clone()
        acting.step()
    return made


def near(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.view_as(a), rtol=0, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [1e-2, 0.3])
def test_it_is_transformers_adafactor_on_tensors_of_one_axis(seed: int, rate: float) -> None:
    start, moves = case(seed, [(5,), (77,), (1,), (13, 7), (4, 3, 5)])
    flat, flat_moves = [x.flatten() for x in start], [[x.flatten() for x in each] for each in moves]  # never factored
    theirs = moved(Theirs, flat, flat_moves, lr=rate, beta1=0.9, relative_step=False, scale_parameter=True)
    near(moved(Adafactor, start, moves, lr=rate), theirs)


def test_without_momentum_it_is_torchs_on_tensors_of_one_axis() -> None:
    start, moves = case(4, [(6,), (50,)])
    theirs = moved(torch.optim.Adafactor, start, moves, lr=1e-2, eps=(1e-15, 1e-3), foreach=False)  # ε₁ is squared
    near(moved(Adafactor, start, moves, lr=1e-2, beta1=0.0), theirs)


def by_the_formulas(x: np.ndarray, moves: list[np.ndarray], rate: float, decay: float) -> np.ndarray:
    """Return the weights after these gradients, by the docstring's formulas in float64."""
    squares, mean = np.zeros_like(x), np.zeros_like(x)
    for k, gradient in enumerate(moves, 1):
        beta2 = 1 - k**-0.8
        squares = beta2 * squares + (1 - beta2) * (gradient**2 + 1e-30)
        update = gradient / np.sqrt(squares)
        update /= max(1.0, np.sqrt(np.mean(update**2)))
        mean = 0.9 * mean + 0.1 * rate * max(1e-3, np.sqrt(np.mean(x**2))) * update
        x = (1 - decay * rate**2) * x - mean
    return x


@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_the_decay_is_the_rates_square(decay: float) -> None:
    start, moves = case(5, [(3, 4), (9,), (7, 6)])
    ours = moved(Adafactor, start, moves, lr=0.2, weight_decay=decay)
    for i, parameter in enumerate(ours):
        expected = by_the_formulas(start[i].double().numpy(), [m[i].double().numpy() for m in moves], 0.2, decay)
        got = parameter.detach().double().numpy()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_rate_of_zero_changes_nothing_and_a_tensor_without_a_gradient_keeps_its_count() -> None:
    one, other = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    optimizer = Adafactor([one, other], lr=0.0, weight_decay=1.0)
    before = one.detach().clone()
    for step in range(3):
        one.grad, other.grad = torch.randn(4), torch.randn(4) if step == 1 else None
        optimizer.step()
    assert torch.equal(one, before)
    assert [float(optimizer.state[p]["step"]) for p in (one, other)] == [3, 1]


def test_a_joined_layer_is_updated_as_its_parts() -> None:
    torch.manual_seed(0)
    joined = nn.ModuleList([JoinedLinear(8, (6, 10)), nn.Linear(8, 8)])
    with torch.no_grad():
        joined[0].weight[:6] *= 100  # parts of very different sizes
        joined[0].bias[6:] *= 100
    alone = nn.ModuleList([nn.Linear(8, 6), nn.Linear(8, 10), nn.Linear(8, 8)])
    with torch.no_grad():
        for part, rows, bias in zip(
            alone, joined[0].weight.split((6, 10)), joined[0].bias.split((6, 10)), strict=False
        ):
            part.weight.copy_(rows)
            part.bias.copy_(bias)
        alone[2].load_state_dict(joined[1].state_dict())
    x = torch.randn(5, 8)
    for model in (joined, alone):
        optimisers = Optimizers(model, settings(optimizer="adafactor", warmup=0, weight_decay=1.0))
        for step in range(3):
            torch.cat([layer(x) for layer in model], -1).square().sum().backward()
            optimisers.step(step)
    torch.testing.assert_close(joined[0].weight, torch.cat([alone[0].weight, alone[1].weight]))
    torch.testing.assert_close(joined[0].bias, torch.cat([alone[0].bias, alone[1].bias]))


def test_every_tensor_is_its_own_and_what_decays_has_two_axes() -> None:
    model = toy()
    model.scale = nn.Parameter(torch.ones(()))  # no axis at all
    optimisers = Optimizers(model, settings(optimizer="adafactor", weight_decay=0.3, betas=(0.8, 0.99)))
    assert optimisers.all.keys() == {"adafactor"} and optimisers.rates(5).keys() == {"learning_rate"}
    groups = optimisers.all["adafactor"].param_groups
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decays["layers.0.weight"] == decays["embedding.weight"] == 0.3
    assert decays["layers.0.bias"] == decays["norm.weight"] == decays["scale"] == 0.0
    assert {group["beta1"] for group in groups} == {0.8}


def test_the_toy_is_learned_and_resuming_is_bitwise(tmp_path: Path) -> None:
    changed = settings(steps=60, optimizer="adafactor", learning_rate=5e-2, weight_decay=1.0, save_every=20)
    whole, parts = toy(dropout=0.1), toy(dropout=0.1)
    summary = train(whole, objective, Sequences(rows=16), changed, run(tmp_path / "whole"))
    assert summary.figures["validation_loss"] < 1.4
    train(parts, objective, Sequences(rows=16), changed, run(tmp_path / "parts"))
    checkpoint.remove(tmp_path / "parts", 60)
    again = toy(3, dropout=0.1)
    train(again, objective, Sequences(rows=16), changed, run(tmp_path / "parts", resume=True))
    assert all(torch.equal(weights(again)[name], tensor) for name, tensor in weights(whole).items())
    ours, theirs = (checkpoint.latest(tmp_path / name)[0].tensors for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "optimisers.adafactor.layers.0.weight.square" in ours

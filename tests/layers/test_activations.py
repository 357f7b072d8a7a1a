"""Activations and the simple losses against torch's modules, transformers' table and their formulas."""

import math

import pytest
import torch
from torch import nn

from keifu.layers.activations import ACTIVATIONS, activation
from keifu.recipes.neurons.mlp import LOSSES

X = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([0.0, -0.0, 1e-4, -1e-4, 60.0, -60.0])])
MODULES = {
    "identity": nn.Identity(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "ramp": nn.ReLU(),
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    "elu": nn.ELU(),
    "softplus": nn.Softplus(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "swish": nn.SiLU(),
    "mish": nn.Mish(),
}
PUBLISHED = {"quick_gelu", "relu2"}  # which torch does not have


@pytest.mark.parametrize("name", sorted(MODULES))
def test_torch_gives_the_same_numbers(name):
    assert torch.equal(activation(name)(X), MODULES[name](X))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_transformers_gives_the_same_numbers(name):
    from transformers.activations import ACT2FN

    assert torch.equal(activation(name)(X), ACT2FN[name](X))


def test_every_activation_is_checked_against_something_and_keeps_the_dtype():
    assert set(MODULES) | PUBLISHED | {"step"} == set(ACTIVATIONS)
    assert all(f(X.to(torch.bfloat16)).dtype == torch.bfloat16 for f in ACTIVATIONS.values())


def test_the_step_is_one_at_zero_and_refuses_a_gradient():
    x = torch.tensor([-1.0, -1e-30, -0.0, 0.0, 2.0], requires_grad=True)
    y = activation("step")(x)
    assert y.tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="derivative is zero everywhere"):
        y.sum().backward()


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="no activation 'gelu_tan'. Did you mean 'gelu_tanh'"):
        activation("gelu_tan")


def test_losses_are_the_row_sums_of_their_formulas():
    outputs, targets = torch.tensor([[0.2, -1.0, 3.0], [0.0, 0.0, 0.0]]), torch.eye(3)[[2, 0]]
    p = torch.softmax(outputs, -1)
    expected = {
        "cross_entropy": -math.log(p[0, 2]) - math.log(p[1, 0]),
        "binary_cross_entropy": float(nn.BCELoss(reduction="sum")(torch.sigmoid(outputs), targets) / 3),
        "mean_squared_error": (0.04 + 1 + 4 + 1) / 3,
        "mean_absolute_error": (0.2 + 1 + 2 + 1) / 3,
    }
    assert {name: float(loss(outputs, targets)) for name, loss in LOSSES.items()} == pytest.approx(expected, rel=1e-5)

"""The product for a single row against the general one, with its gradients."""

import pytest
import torch
import torch.nn.functional as F

from keifu.layers.linear import JoinedLinear, Linear, linear


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_torch_with_gradients(shape, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    bias = torch.randn(7, requires_grad=True) if with_bias else None
    ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)
    inputs = [t for t in (x, weight, bias) if t is not None]
    got, expected = (torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs))
    torch.testing.assert_close(got, expected)


def test_modules_use_it_and_keep_torchs_names():
    layer = JoinedLinear(5, (4, 2, 2))
    assert layer.parts == (4, 2, 2) and layer.weight.shape == (8, 5)
    assert set(dict(Linear(5, 3).named_parameters())) == {"weight", "bias"}
    x = torch.randn(1, 5)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))

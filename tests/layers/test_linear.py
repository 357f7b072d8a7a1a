"""The product for a single row, and oneDNN's, against PyTorch's general one, with their gradients."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from keifu.layers import linear as linears
from keifu.layers.linear import JoinedLinear, Linear, linear, product
from keifu.training.hardware.flops import count_flops


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as on AMD's processors with AVX-512, whatever this one is."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(linears, "USES_ONEDNN", True)


def uses_onednn(y: torch.Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_OneDnnBackward"


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


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("shape", [(2, 96), (7, 96), (3, 5, 96), (2, 3, 4, 96)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_onednn_equals_torch_with_gradients_of_gradients(shape, with_bias):
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), nn.Parameter(torch.randn(130, 96) / 10)
    bias = torch.randn(130, requires_grad=True) if with_bias else None
    ours, theirs = linear(x, weight, bias), F.linear(x, weight, bias)
    assert uses_onednn(ours)
    torch.testing.assert_close(ours, theirs)
    inputs = [t for t in (x, weight, bias) if t is not None]
    first = [torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True) for y in (ours, theirs)]
    torch.testing.assert_close(*first, rtol=1e-4, atol=1e-4)
    second = [torch.autograd.grad(each[0].square().sum(), [x, weight]) for each in first]
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("onednn")
def test_onednn_gives_a_row_the_same_bits_beside_any_others():
    torch.manual_seed(0)
    x, weight = torch.randn(70, 96), torch.randn(130, 96)
    whole = linear(x, weight)
    for rows in (2, 3, 5, 8, 31, 64):
        assert torch.equal(linear(x[:rows], weight), whole[:rows])


@pytest.mark.usefixtures("onednn")
def test_onednn_multiplies_views_and_counts_its_operations():
    torch.manual_seed(0)
    a, b = torch.randn(96, 7).T.requires_grad_(), torch.randn(130, 96).T
    ours = product(a, b)
    assert uses_onednn(ours)
    torch.testing.assert_close(ours, a @ b)
    assert count_flops(lambda: product(a, b).sum().backward()) == 2 * 2 * 7 * 96 * 130


@pytest.mark.usefixtures("onednn")
def test_what_onednn_is_not_given(monkeypatch):
    x, weight = torch.randn(4, 96, requires_grad=True), torch.randn(130, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    for other in (linear(x.double(), weight.double()), linear(x[:, :8], weight[:, :8]), linear(x[:0], weight)):
        assert not uses_onednn(other)
    of_one = partial(linear, weight=weight)
    torch.testing.assert_close(torch.func.vmap(of_one)(x.view(2, 2, 96)).flatten(0, 1), of_one(x))
    torch.testing.assert_close(torch.func.grad(lambda x: of_one(x).sum())(x), weight.sum(0).expand(4, -1))
    traced = torch.jit.trace(lambda x: linear(x, weight), x.detach(), check_trace=False)
    torch.testing.assert_close(traced(x), of_one(x))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not uses_onednn(linear(x, weight))


@pytest.mark.usefixtures("onednn")
def test_onednn_is_not_given_columns_of_a_wider_matrix():
    x, wide = torch.randn(3, 256), torch.randn(256, 512, requires_grad=True)
    assert uses_onednn(linear(x, wide[:, :256].contiguous()))
    for part in (wide[:, :256], wide[:, :256].mT):
        y = linear(x, part)
        assert not uses_onednn(y)
        torch.testing.assert_close(y, x @ part.mT, rtol=1e-4, atol=1e-4)
        assert not uses_onednn(product(x, part.mT))

"""Frozen matrices in 4 bits: GGUF's bytes, and the outputs and gradients of the numbers that they hold."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from torch import nn

from keifu.errors import UserError
from keifu.layers.linear import JoinedLinear
from keifu.layers.lora import AdaptedLinear, LoraSettings, Target, attach, merge, quantize_bases
from keifu.layers.quantized import QuantizedLinear, pack, unpack


def test_blocks_are_those_of_gguf() -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    theirs = quantize(weight.numpy(), GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(pack(weight).numpy(), theirs.reshape(-1, 18))
    again = unpack(pack(weight), "Q4_0").view_as(weight)
    assert torch.equal(again[3], weight[3]) and float((again - weight).square().mean().sqrt()) < 0.1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_unpacked_matrix(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 96, bias).to(dtype)
    layer = QuantizedLinear(plain)
    plain.weight = nn.Parameter(layer.weight)
    inputs = [torch.randn(2, 5, 64, dtype=dtype).requires_grad_() for _ in range(1)] * 2
    outputs = [each(x) for each, x in zip((plain, layer), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    wanted = [[x, plain.bias] if bias else [x] for x in inputs]
    gradients = [torch.autograd.grad(y.square().sum(), each) for y, each in zip(outputs, wanted, strict=True)]
    torch.testing.assert_close(gradients[1], gradients[0])


def adapted() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(JoinedLinear(64, (32, 32)), nn.Tanh(), nn.Linear(64, 64))
    targets = [Target("0", 32, 32, "k"), Target("2", 0, 64, "out")]
    made = attach(model, dict.fromkeys(targets, LoraSettings(4, dora=False)))
    for module in made.modules():
        if isinstance(module, AdaptedLinear):
            for part in module.parts:
                nn.init.normal_(part.b, std=0.1)
    return quantize_bases(made)  # pyright: ignore[reportReturnType]


def test_a_matrix_in_blocks_takes_no_adapter() -> None:
    model = nn.Sequential(nn.Linear(64, 64), QuantizedLinear(nn.Linear(64, 64)))
    with pytest.raises(UserError, match="^The matrix of 1 is packed in blocks: load the model without "):
        attach(model, {Target(name, 0, 64, name): LoraSettings() for name in ("0", "1")})
    assert all(p.requires_grad for p in model[0].parameters()) and type(model[0]) is nn.Linear


def test_a_step_trains_adapters_alone_and_keeps_no_matrix() -> None:
    model, x = adapted(), torch.randn(3, 64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x).square().mean().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"{layer}.adapters.0.{end}" for layer in (0, 2) for end in "ab"
    }
    assert not any(tensor.shape == (64, 64) for tensor in saved)
    assert not any("blocks" in name for name in model.state_dict())
    held = sum(t.nbytes for t in model.buffers())
    assert held == 2 * 64 * 64 // 32 * 18


def test_merged_layers_compute_the_same_without_adapters() -> None:
    model, x = adapted(), torch.randn(3, 64)
    expected = model(x)
    merged = merge(model)
    assert isinstance(merged[0], JoinedLinear) and merged[0].parts == (32, 32)
    torch.testing.assert_close(merged(x), expected)


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(UserError, match="40 inputs are no whole blocks of 32: leave --lora.base at float"):
        QuantizedLinear(nn.Linear(40, 8))

"""Muon: its updates are the equations and those of torch; it takes hidden matrices, and a joined one as its parts."""

import numpy as np
import pytest
import torch
from torch import nn
from training_toys import settings, toy

from keifu.errors import UserError
from keifu.layers.linear import JoinedLinear
from keifu.models import seq2seq
from keifu.training.optim.muon import StackedMuon, orthogonalize
from keifu.training.optim.optimizers import Optimizers, hidden_matrices


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Return five steps of x → a x + (b A + c A²) x with A = x xᵀ, from Frobenius norm 1 (Jordan et al., 2024)."""
    a, b, c = 3.4445, -4.775, 2.0315
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def test_three_updates_are_the_equations() -> None:
    """A tall, a wide and a square matrix. Momentum is a mean of gradients, looked ahead (Nesterov); a tall matrix has
    the root of its rows by its columns as a factor, and a wide one 1."""
    torch.manual_seed(2)
    shapes = [(12, 3), (3, 12), (5, 5)]
    model = nn.ModuleList([nn.Linear(columns, rows, bias=False) for rows, columns in shapes])
    chosen = settings(
        optimizer="muon", matrix_rate=0.05, momentum=0.6, weight_decay=0.2, precision="float32", schedule="constant",
        warmup=0,
    )  # fmt: skip
    optimizers, layers = Optimizers(model, chosen), list(model)
    expected = [layer.weight.detach().double().numpy() for layer in layers]
    means = [np.zeros(shape) for shape in shapes]
    for step in range(3):
        for number, layer in enumerate(layers):
            layer.weight.grad = torch.randn_like(layer.weight)
            gradient, factor = layer.weight.grad.double().numpy(), (2, 1, 1)[number]
            means[number] = 0.6 * means[number] + 0.4 * gradient
            update = newton_schulz(0.6 * means[number] + 0.4 * gradient)
            expected[number] = expected[number] * (1 - 0.05 * 0.2) - 0.05 * factor * update
        optimizers.step(step)
    for layer, weight in zip(layers, expected, strict=True):
        assert layer.weight.detach().numpy() == pytest.approx(weight, abs=1e-5)


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model = toy()
    assert set(hidden_matrices(model)) == {"layers.0.weight", "layers.1.weight"}
    optimisers = Optimizers(model, settings(optimizer="muon"))
    names = {kind: {n for g in o.param_groups for n in g["param_names"]} for kind, o in optimisers.all.items()}
    assert names["muon"] == {"layers.0.weight", "layers.1.weight"}
    assert "layers.0.bias" in names["adamw"] and "head.weight" in names["adamw"]
    assert not names["adamw"] & {"layers.0.weight", "layers.1.weight"}


def test_muon_takes_the_matrices_of_a_recurrent_translator_but_not_its_head() -> None:
    """It has no numbered layers, so a run with Muon was silently one with AdamW."""
    sizes = {"dim": 6, "embedding_dim": 4, "attention_dim": 5, "maxout_dim": 3}
    model = seq2seq.build(seq2seq.Config(vocab_size=11, context_length=9, **sizes))
    gates = {f"{layer}.{side}.weight" for layer in ("encoder.forwards", "encoder.backwards", "decoder.gru")
             for side in ("input", "recurrent")}  # fmt: skip
    others = {f"decoder.{name}.weight" for name in ("first", "attention.query", "attention.key")}
    assert hidden_matrices(model) == gates | others | {"output.pairs.weight"}


def test_muon_refuses_a_model_without_linear_layers() -> None:
    with pytest.raises(UserError, match="has none: choose optimizer adamw"):
        hidden_matrices(torch.nn.Embedding(3, 2))


def test_muon_treats_a_joined_matrix_as_its_parts() -> None:
    torch.manual_seed(0)
    joined = nn.ModuleList([JoinedLinear(8, (6, 10), bias=False), nn.Linear(8, 8, bias=True)])
    alone = nn.ModuleList([nn.Linear(8, 6, bias=False), nn.Linear(8, 10, bias=False), nn.Linear(8, 8, bias=True)])
    with torch.no_grad():
        for part, rows in zip(alone, joined[0].weight.split((6, 10)), strict=False):
            part.weight.copy_(rows)
        alone[2].load_state_dict(joined[1].state_dict())
    x = torch.randn(5, 8)
    for model in (joined, alone):
        optimisers = Optimizers(model, settings(optimizer="muon", warmup=0))
        for step in range(3):
            outputs = torch.cat([layer(x) for layer in model], -1)
            outputs.square().sum().backward()
            optimisers.step(step)
    torch.testing.assert_close(joined[0].weight, torch.cat([alone[0].weight, alone[1].weight]))


def test_stacked_muon_is_torchs_muon(monkeypatch) -> None:
    monkeypatch.setattr("keifu.training.optim.muon.STACK", 100)  # two matrices of the smaller shapes
    shapes = [(6, 8), (8, 6), (6, 8), (5, 5), (8, 6), (6, 8), (12, 10), (12, 10)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    rates = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    stacked = StackedMuon(ours, {}, torch.bfloat16, **rates)
    for optimizer, matrices in ((stacked, ours), (torch.optim.Muon(theirs, **rates), theirs)):
        torch.manual_seed(1)
        for _ in range(3):
            for matrix in matrices:
                matrix.grad = torch.randn_like(matrix)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=0)  # an update is 0.02 large, and made in bfloat16


def test_orthogonal_brings_singular_values_near_one() -> None:
    x = torch.randn(3, 24, 16)
    values = torch.linalg.svdvals(orthogonalize(x, (3.4445, -4.775, 2.0315), 5, 1e-7).float())
    assert values.min() > 0.5 and values.max() < 1.3

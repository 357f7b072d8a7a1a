"""The multi-layer network: its arithmetic, its gradient, its start, its config.json, and the step that cannot learn."""

import json

import pytest
import torch

from keifu.layers.activations import ACTIVATIONS
from keifu.models.mlp import SIZES, Config, build, forward_gain, from_published, to_published
from keifu.recipes.neurons.mlp import LOSSES

TABLE = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])


def test_it_computes_what_the_formula_says():
    model = build(Config(dim=3, hidden_dims=(4, 5), n_outputs=2, activation="tanh", output="sigmoid"))
    model.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    model.scale.copy_(torch.tensor([2.0, 1.0, 0.5]))
    x = torch.randn(7, 3)
    state = model.state_dict()
    h = (x - state["mean"]) / state["scale"]
    for layer, function in enumerate([torch.tanh, torch.tanh, torch.sigmoid]):
        h = function(h @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"])
    torch.testing.assert_close(model(x), h)
    assert torch.equal(model.predict(x), h.argmax(-1))


def test_back_propagation_is_the_papers():
    """∂E/∂w = y_i · y_j (1 - y_j) · Σ_k δ_k w_jk, equations 4 to 7, written out for one hidden layer."""
    model = build(Config(dim=2, hidden_dims=(3,), n_outputs=1, activation="sigmoid", output="sigmoid"))
    targets = torch.tensor([[0.0], [1], [1], [0]])
    (0.5 * LOSSES["mean_squared_error"](model(TABLE), targets)).backward()
    first, last = model.layers
    hidden = torch.sigmoid(first(TABLE))
    y = torch.sigmoid(last(hidden))
    delta = (y - targets) * y * (1 - y)
    below = (delta @ last.weight) * hidden * (1 - hidden)
    torch.testing.assert_close(last.weight.grad, delta.T @ hidden)
    torch.testing.assert_close(first.weight.grad, below.T @ TABLE)


@pytest.mark.parametrize("hidden_dims", [(), (1,), (3, 2, 5, 4)])
def test_any_number_of_hidden_layers(hidden_dims):
    model = build(Config(dim=2, hidden_dims=hidden_dims, n_outputs=3))
    assert len(model.layers) == len(hidden_dims) + 1
    assert model(TABLE).shape == (4, 3)


def test_a_step_network_computes_but_says_why_it_cannot_learn():
    model = build(Config(hidden_dims=(2,), n_outputs=1, activation="step", output="step"))
    for layer, weight, bias in zip(
        model.layers, ([[1.0, 1], [-1, -1]], [[1.0, 1]]), ([-0.5, 1.5], [-1.5]), strict=True
    ):
        layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
    assert model(TABLE).flatten().tolist() == [0, 1, 1, 0]  # XOR by hand, as McCulloch and Pitts would
    with pytest.raises(ValueError, match="derivative is zero everywhere.*choose another activation"):
        model(TABLE).sum().backward()


def test_the_start_keeps_the_size_of_what_passes_through():
    assert forward_gain(ACTIVATIONS["relu"]) == pytest.approx(2**0.5, rel=1e-3)  # He et al. (2015)
    for name in ("relu", "tanh", "sigmoid", "gelu", "silu"):
        model, x = build(Config(dim=300, hidden_dims=(300,) * 6, n_outputs=300, activation=name)), torch.randn(200, 300)
        assert 0.6 < float(model(x).detach().std()) < 1.6, name


def test_config_json_and_back():
    config = Config(3, (7, 5), 2, "gelu", "sigmoid", 0.25, ("no", "yes"))
    assert from_published(json.loads(json.dumps(to_published(config)))) == config
    assert all(from_published(to_published(config)) == config for config in SIZES.values())


def test_dropout_acts_only_in_training():
    model = build(Config(dim=2, hidden_dims=(64,), dropout=0.5)).eval()
    assert torch.equal(model(TABLE), model(TABLE))
    model.train()
    assert not torch.equal(model(TABLE), model(TABLE))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hidden_dims": (4, 0)}, "at least one unit"),
        ({"dropout": 1.0}, "dropout must be a number from 0 and below 1"),
        ({"classes": ("a",)}, "2 outputs and 1 names"),
        ({"activation": "rellu"}, "Did you mean 'relu'"),
        ({"output": "sigmoyd"}, "Did you mean 'sigmoid'"),
    ],
)
def test_impossible_configurations_say_what_is_wrong(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(Config(**options))

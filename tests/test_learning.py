"""Every model learns: each is trained on a toy set until it knows it by heart, in seconds."""

import pytest
import torch

from keifu.layers.losses import LOSSES
from keifu.models import gpt1, gpt2, gpt3, llama, mlp, palm, perceptron
from keifu.training.objectives import causal
from keifu.training.optimisers import Optimisers
from keifu.training.settings import Settings
from keifu.training.step import Stepper

CPU = torch.device("cpu")
SMALL = {"vocab_size": 31, "context_length": 16, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
LANGUAGE_MODELS = {
    "gpt1": (gpt1, gpt1.Config(**SMALL, dropout=0.0)),
    "gpt2": (gpt2, gpt2.Config(**SMALL, dropout=0.0)),
    "gpt3": (gpt3, gpt3.Config(**SMALL, band=4)),
    "palm": (palm, palm.Config(**SMALL, head_dim=12)),
    "llama": (llama, llama.Config(**SMALL, n_kv_heads=2)),
    "mistral": (llama, llama.Config(**SMALL, n_kv_heads=1, sliding_window=5, tied=True)),
    "qwen2": (llama, llama.Config(**SMALL, qkv_bias=True)),
}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_language_model_learns_rows_by_heart(name, optimizer):
    module, config = LANGUAGE_MODELS[name]
    torch.manual_seed(0)
    model = module.build(config).train()
    settings = Settings(steps=150, batch_size=8, optimizer=optimizer, learning_rate=1e-2, weight_decay=0.0)
    optimisers = Optimisers(model, settings)
    stepper = Stepper(model, causal, causal, optimisers, CPU, torch.float32, 8, 1.0, 0)
    batch = {"tokens": torch.randint(0, 31, (8, 13))}
    losses = []
    for step in range(settings.steps):
        gradient = stepper.gradient(step, batch, lambda: False)
        losses.append(gradient.sums.means()["loss"])
        optimisers.step(step)
    assert losses[0] > 3.0  # nothing was known: log 31 is 3.43
    # The first token of a row cannot be known from anything before it, so a row's second token may stay open.
    assert losses[-1] < 0.35


def test_a_network_learns_a_table_by_heart():
    torch.manual_seed(0)
    config = mlp.Config(dim=5, hidden_dims=(32,), n_outputs=3, activation="relu")
    model, x, labels = mlp.build(config), torch.randn(24, 5), torch.randint(0, 3, (24,))
    targets = torch.nn.functional.one_hot(labels, 3).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(300):
        optimizer.zero_grad()
        LOSSES["cross_entropy"](model(x), targets).backward()
        optimizer.step()
    assert (model(x).argmax(-1) == labels).all()


def test_a_neuron_learns_a_plane():
    torch.manual_seed(0)
    neuron, x = perceptron.build(perceptron.Config(3)), torch.randn(40, 3)
    x = x[(x @ torch.tensor([1.0, -2.0, 0.5]) - 0.3).abs() > 0.3]
    targets = (x @ torch.tensor([1.0, -2.0, 0.5]) - 0.3 >= 0).double()
    for _ in range(100):
        for row, target in zip(x.double(), targets, strict=True):
            neuron.correct(row, float(target))
    assert (neuron(x.double()) == targets).all()

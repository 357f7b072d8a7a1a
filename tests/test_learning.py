"""Every model learns: each is trained on a toy set until it knows it by heart, in seconds."""

import pytest
import torch

from keifu.layers.losses import LOSSES
from keifu.models import bert, gpt1, gpt2, gpt3, llama, mlp, palm, perceptron, seq2seq, transformer
from keifu.training.masked import masked
from keifu.training.objectives import causal, translation
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


PAIRS = {"vocab_size": 31, "context_length": 16, "dim": 32}
RECURRENT = {**PAIRS, "embedding_dim": 24, "attention_dim": 32, "maxout_dim": 32}
TRANSLATORS = {
    "seq2seq-attention": (seq2seq, seq2seq.Config(**RECURRENT)),
    "seq2seq-fixed": (seq2seq, seq2seq.Config(**RECURRENT, context="fixed")),
    "seq2seq-plain": (seq2seq, seq2seq.Config(**RECURRENT, encoder="forward", context="none", output="state")),
    "transformer": (transformer, transformer.Config(**SMALL, dropout=0.0)),
    "transformer-apart": (transformer, transformer.Config(**SMALL, dropout=0.0, shared=False, tied=False)),
}


@pytest.mark.parametrize("name", TRANSLATORS)
def test_an_encoder_decoder_learns_pairs_by_heart(name):
    module, config = TRANSLATORS[name]
    torch.manual_seed(0)
    model = module.build(config).train()
    settings = Settings(steps=150, batch_size=8, learning_rate=1e-2, weight_decay=0.0)
    optimisers = Optimisers(model, settings)
    stepper = Stepper(model, translation, translation, optimisers, CPU, torch.float32, 8, 1.0, 0)
    lengths = torch.randint(2, 8, (2, 8, 1))
    masks = [torch.arange(7) < lengths[0], torch.arange(9) < lengths[1] + 2]
    batch = {"source": torch.randint(3, 31, (8, 7)), "target": torch.randint(3, 31, (8, 9))}
    batch |= {"source_mask": masks[0], "target_mask": masks[1]}
    losses = []
    for step in range(settings.steps):
        gradient = stepper.gradient(step, batch, lambda: False)
        losses.append(gradient.sums.means()["loss"])
        optimisers.step(step)
    assert losses[0] > 3.0 and losses[-1] < 0.3


def test_bert_learns_masked_words_and_neighbours_by_heart():
    torch.manual_seed(0)
    model = bert.build(bert.Config(**SMALL, dropout=0.0)).train()
    settings = Settings(steps=150, batch_size=8, learning_rate=5e-3, weight_decay=0.0)
    optimisers = Optimisers(model, settings)
    stepper = Stepper(model, masked, masked, optimisers, CPU, torch.float32, 8, 1.0, 0)
    tokens, places = torch.randint(1, 31, (8, 13)), torch.stack([torch.randperm(13)[:3] for _ in range(8)])
    batch = {
        "tokens": tokens.scatter(1, places, 0), "targets": tokens.gather(1, places), "places": places,
        "segments": (torch.arange(13) > 6).long().expand(8, 13), "random_next": torch.randint(0, 2, (8,)),
        "mask": torch.ones(8, 13, dtype=torch.bool), "word_weight": torch.full((8,), 104 / 24),
        "pair_weight": torch.full((8,), 104 / 8),
    }  # fmt: skip
    losses = []
    for step in range(settings.steps):
        losses.append(stepper.gradient(step, batch, lambda: False).sums.means()["loss"])
        optimisers.step(step)
    assert losses[0] > 3.9  # nothing was known: log 31 + log 2 is 4.13
    assert losses[-1] < 0.05


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

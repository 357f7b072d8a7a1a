"""What is seen from outside is what the model computes: weights that sum to one, see nothing hidden, and are the same
numbers as the softmax written out."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from keifu.errors import UserError
from keifu.models import gpt2, llama

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _attention_maps import draw_maps, record_attention

CONFIG = {"vocab_size": 31, "context_length": 16, "dim": 24, "hidden_dim": 32, "n_layers": 2, "n_heads": 4}


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_maps_of_a_causal_model(n_kv_heads):
    torch.manual_seed(0)
    model = llama.build(llama.Config(**CONFIG, n_kv_heads=n_kv_heads)).eval()
    with torch.no_grad(), record_attention(model) as maps:
        model(torch.randint(0, 31, (2, 7)))
    assert list(maps) == ["blocks.0.attention", "blocks.1.attention"]
    for [weights] in maps.values():
        assert weights.shape == (2, 4, 7, 7)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 7))
        assert weights.triu(1).abs().max() == 0


def test_they_are_the_softmax_of_the_products():
    torch.manual_seed(0)
    model = gpt2.build(gpt2.Config(**CONFIG)).eval()
    tokens = torch.randint(0, 31, (1, 5))
    with torch.no_grad(), record_attention(model) as maps:
        model(tokens)
        x = model.embedding(tokens) + model.positions(torch.arange(5))
        block = model.blocks[0]
        q, k, _ = block.attention.qkv(block.attention_norm(x)).unflatten(-1, (12, 6)).transpose(1, 2).split(4, 1)
        scores = (q @ k.mT / 6**0.5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(maps["blocks.0.attention"][0], scores.softmax(-1))


def test_a_softmax_written_out_is_seen_and_the_hooks_are_gone_after():
    class Additive(nn.Module):
        def forward(self, x):
            return x.softmax(-1) @ x.T

    model = nn.Sequential(Additive())
    with record_attention(model) as maps:
        model(torch.eye(3))
    model(torch.eye(3))
    assert [len(each) for each in maps.values()] == [1] and list(maps) == ["0"]


def test_no_map_is_an_error():
    with pytest.raises(UserError, match="no attention"):
        draw_maps({}, [], [])

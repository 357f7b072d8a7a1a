"""What is seen from outside is what the model computes: weights that sum to one, see nothing hidden, and are the same
numbers as the softmax written out."""

import pytest
import torch
from torch import nn

from keifu.inference.embeddings.attention_maps import inspect_text, record_attention
from keifu.layers.attention.masks import CausalMask
from keifu.layers.attention.positions import Positions
from keifu.models import gemma3, gpt2, llama

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
        output = model(torch.eye(3))
    torch.testing.assert_close(output, model(torch.eye(3)))
    assert [len(each) for each in maps.values()] == [1] and list(maps) == ["0"]


def test_the_lens_ends_with_what_the_model_says():
    torch.manual_seed(0)
    model = llama.build(llama.Config(**CONFIG, n_kv_heads=2)).eval()
    found = inspect_text(model, [3, 1, 4, 1, 5], top=3)
    with torch.no_grad():
        last = model(torch.tensor([[3, 1, 4, 1, 5]]))[0].softmax(-1).topk(3)
        first = model.blocks[0](model.embedding(torch.tensor([[3, 1, 4, 1, 5]])), **places(5))
        first = model.logits(model.norm(first))[0].softmax(-1).topk(3)
    for layer, expected in zip(found.lens, (first, last), strict=True):
        assert [[token for token, _ in place] for place in layer] == expected.indices.tolist()
        values = torch.tensor([[value for _, value in place] for place in layer])
        torch.testing.assert_close(values, expected.values)
    assert [each.shape for each in found.attention.values()] == [(4, 5, 5)] * 2
    assert not any(block._forward_hooks for block in model.blocks)


def places(length: int) -> dict[str, object]:
    return {"mask": CausalMask(0, length, None, torch.device("cpu")), "positions": Positions(torch.arange(length))}


def test_a_window_shorter_than_the_text_leaves_the_layers_that_see_all():
    torch.manual_seed(0)
    config = {**CONFIG, "n_layers": 6, "head_dim": 6, "n_kv_heads": 2, "sliding_window": 4}
    found = inspect_text(gemma3.build(gemma3.Config(**config)).eval(), range(9))
    for weights in found.attention.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 9))
    assert len(found.lens) == 6

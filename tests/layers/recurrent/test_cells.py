"""Recurrent layers of decoders equal torch's networks bit for bit, and decode as they read."""

from typing import Any

import pytest
import torch
from torch import nn

from keifu.layers.recurrent.cells import LSTM, RNN, RecurrentBlock, ResetAfterGRU
from keifu.layers.transformer.decoder import DecoderLM

KINDS = [RNN, ResetAfterGRU, LSTM]


def decoder(kind: type[RNN], dim: int, layers: int) -> DecoderLM:
    torch.manual_seed(0)
    blocks = [RecurrentBlock(kind(dim)) for _ in range(layers)]
    return DecoderLM(nn.Embedding(11, dim), blocks, nn.Identity(), None, nn.Linear(dim, 11))


def layers_of(model: DecoderLM) -> list[Any]:
    blocks: list[Any] = list(model.blocks)
    return [block.attention.network for block in blocks]


def published(model: DecoderLM, kind: type[RNN], dim: int) -> nn.RNNBase:
    """Return torch's network with the weights of all layers."""
    weights = {
        name.replace("_l0", f"_l{layer}"): weight
        for layer, network in enumerate(layers_of(model))
        for name, weight in network.state_dict().items()
    }
    deep = kind.kind(dim, dim, len(model.blocks), batch_first=True)
    deep.load_state_dict(weights)
    return deep


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dim", "layers"), [(7, 1), (13, 3), (32, 2)])
@torch.no_grad()
def test_layers_equal_torch_bit_for_bit_also_with_a_carried_state(kind: type[RNN], dim: int, layers: int) -> None:
    model, tokens = decoder(kind, dim, layers), torch.arange(3 * 9).view(3, 9) % 11
    network, x = published(model, kind, dim), model.embedding(tokens)
    assert torch.equal(model.hidden(tokens), network(x)[0])
    state = model.new_state(3, 9)
    first, carried = network(x[:, :5])
    assert torch.equal(model.hidden(tokens[:, :5], state), first)
    later, y = model.hidden(tokens[:, 5:], state), x[:, 5:]
    torch.testing.assert_close(later, network(x[:, 5:], carried)[0], rtol=1e-6, atol=1e-6)
    if kind is LSTM:
        assert torch.equal(later, network(x[:, 5:], carried)[0])
    parts: Any = carried if kind is LSTM else (carried,)
    for layer, one in enumerate(layers_of(model)):  # torch's layers, one after another
        before = tuple(part[layer : layer + 1].clone() for part in parts)
        y = one(y, before if kind is LSTM else before[0])[0]
    assert torch.equal(later, y)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_token_by_token_equals_the_whole_sequence(kind: type[RNN]) -> None:
    model, tokens = decoder(kind, 13, 2), torch.arange(2 * 8).view(2, 8) % 11
    state = model.new_state(2, 8)
    steps = [model(tokens[:, i : i + 1], state) for i in range(8)]
    torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_a_document_does_not_reach_the_next(kind: type[RNN]) -> None:
    model, tokens = decoder(kind, 13, 2), torch.arange(2 * 8).view(2, 8) % 11
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1, 1, 1]])
    y = model.hidden(tokens, documents=documents)
    for row, begin, end in [(0, 0, 3), (0, 3, 7), (0, 7, 8), (1, 0, 5), (1, 5, 8)]:
        alone = model.hidden(tokens[row : row + 1, begin:end])
        torch.testing.assert_close(y[row : row + 1, begin:end], alone, rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert all(weight.grad is not None for weight in model.blocks.parameters())


@torch.no_grad()
def test_left_padding_does_not_reach_the_tokens() -> None:
    model, tokens = decoder(LSTM, 13, 2), torch.tensor([[0, 0, 3, 4, 5]])
    padded = model.hidden(tokens, padding=torch.tensor([2]))[:, 2:]
    torch.testing.assert_close(padded, model.hidden(tokens[:, 2:]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_remembering_lstm_keeps_its_cell() -> None:
    layer = LSTM(5)
    layer.remember(30.0)
    _, after = layer._recur(torch.zeros(1, 4, 5), torch.full((1, 10), 3.0))
    assert (after[:, 5:] > 1.0).all()

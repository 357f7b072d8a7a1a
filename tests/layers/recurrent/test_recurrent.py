"""The recurrence against torch.nn.GRU and against the papers' formulas, forwards and backwards."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from keifu.layers.recurrent.attention_decoder import AdditiveAttention
from keifu.layers.recurrent.gru import GRU, BidirectionalEncoder, EncoderOutput, ForwardEncoder

LENGTHS = torch.tensor([5, 1, 7, 3])
MASK = torch.arange(7) < LENGTHS[:, None]


def torchs(ours: list[GRU]) -> nn.GRU:
    """Return torch's layer with our weights."""
    theirs = nn.GRU(3, 6, batch_first=True, bidirectional=len(ours) == 2).double()
    names = [("input", "ih"), ("recurrent", "hh")]
    for gru, end in zip(ours, ("", "_reverse"), strict=False):
        for (name, their), kind in [(pair, kind) for pair in names for kind in ("weight", "bias")]:
            theirs.get_parameter(f"{kind}_{their}_l0{end}").data = vars(gru)["_modules"][name].get_parameter(kind).data
    return theirs


@pytest.mark.parametrize("kind", [ForwardEncoder, BidirectionalEncoder])
def test_an_encoder_is_torchs_gru_on_padded_rows(kind):
    encoder = kind(3, 6).double()
    directions = list(encoder.children())
    theirs, x = torchs(directions), torch.randn(4, 7, 3, dtype=torch.double, requires_grad=True)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    states, last = theirs(packed)
    expected = pad_packed_sequence(states, batch_first=True)[0]
    reading = encoder(x, MASK)
    assert torch.allclose(reading.states[MASK], expected[MASK])
    assert torch.allclose(reading.ends, last.transpose(0, 1).flatten(1))

    wanted = torch.randn_like(expected)
    parameters = [x, *(gru.get_parameter(f"{part}.weight") for gru in directions for part in ("input", "recurrent"))]
    parameters += [gru.get_parameter(f"{part}.bias") for gru in directions for part in ("input", "recurrent")]
    got = torch.autograd.grad((reading.states * wanted)[MASK].sum() + reading.ends.square().sum(), parameters)
    assert not got[0][~MASK].any()  # nothing of the padding was used
    same = [x, *(p for suffix in ("", "_reverse")[: len(directions)] for p in their_weights(theirs, "weight", suffix))]
    same += [p for suffix in ("", "_reverse")[: len(directions)] for p in their_weights(theirs, "bias", suffix)]
    right = torch.autograd.grad((expected * wanted)[MASK].sum() + last.square().sum(), same)
    assert all(torch.allclose(a, b) for a, b in zip(got, right, strict=True))


def their_weights(gru: nn.GRU, kind: str, suffix: str) -> list[nn.Parameter]:
    return [gru.get_parameter(f"{kind}_{part}_l0{suffix}") for part in ("ih", "hh")]


def test_the_papers_update_gate_is_one_minus_torchs():
    """h' = (1 - z) h + z n, as Cho and Bahdanau write it, is the same network with z's weights negated."""
    gru, x, h = GRU(3, 6), torch.randn(1, 2, 3), torch.randn(2, 6)
    expected = gru(gru.input(x), h)[0]
    given, product = (layer(y).chunk(3, -1) for layer, y in ((gru.input, x[0]), (gru.recurrent, h)))
    reset, z = (given[0] + product[0]).sigmoid(), (-given[1] - product[1]).sigmoid()
    assert torch.allclose((1 - z) * h + z * (given[2] + reset * product[2]).tanh(), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [ForwardEncoder, BidirectionalEncoder])
def test_a_source_without_a_token_is_refused(kind):
    with pytest.raises(ValueError, match="has no token"):
        kind(3, 6)(torch.zeros(2, 4, 3), torch.tensor([[True, True, False, False], [False] * 4]))


def plainly(x, memory, states, context_weight, attention, recurrent, state):
    """Compute section A.1.2 step by step, by autograd, the context itself made and multiplied in each step."""
    made, shares = [state], []
    for given in x:
        scores = (attention.query(state)[:, None] + attention.key(states)).tanh() @ attention.v
        share = (scores + memory.hidden).softmax(-1)
        context = (share[:, :, None] * states).sum(1)
        whole, product = given + context @ context_weight.T, recurrent(state)
        reset, update = (whole[:, :12] + product[:, :12]).sigmoid().chunk(2, -1)
        new = (whole[:, 12:] + reset * product[:, 12:]).tanh()
        state = (1 - update) * new + update * state
        made.append(state)
        shares.append(share)
    return torch.stack(made), torch.stack(shares)


def test_attention_is_the_papers_forwards_and_backwards():
    attention, gru = AdditiveAttention(6, 8, 5).double(), GRU(3, 6).double()
    nn.init.normal_(attention.v)
    x, states, state, weight = (
        torch.randn(*shape, dtype=torch.double, requires_grad=True)
        for shape in ((9, 4, 18), (4, 7, 8), (4, 6), (18, 8))
    )
    leaves = [x, states, state, weight, *attention.parameters(), *gru.recurrent.parameters()]
    memory = attention.memory(EncoderOutput(states, states[:, 0], MASK), weight)
    ours = attention(x, memory, gru.recurrent, state)
    theirs = plainly(x, memory, states, weight, attention, gru.recurrent, state)
    wanted = [torch.randn_like(tensor) for tensor in theirs]
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not ours[1].transpose(0, 1)[~MASK[:, None].expand(-1, 9, -1)].any()
    got, right = (
        torch.autograd.grad(sum((a * b).sum() for a, b in zip(each, wanted, strict=True)), leaves)
        for each in (ours, theirs)
    )
    assert all(torch.allclose(a, b) for a, b in zip(got, right, strict=True))


def test_autocast_multiplies_in_bfloat16_and_keeps_states_in_float32():
    encoder, x = BidirectionalEncoder(16, 32), torch.randn(4, 7, 16)
    exact = encoder(x, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        reading = encoder(x, MASK)
    assert reading.states.dtype == torch.float32 and not torch.equal(reading.states, exact.states)
    assert torch.allclose(reading.states[MASK], exact.states[MASK], atol=0.02)
    reading.ends.sum().backward()
    assert encoder.forwards.recurrent.weight.grad.dtype == torch.float32

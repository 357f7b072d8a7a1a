"""Gated DeltaNet: chunks give what the rule gives token by token; documents, padding and states do not mix."""

import pytest
import torch
from torch import Tensor

from keifu.errors import UserError
from keifu.layers.attention.kv_cache import KVState
from keifu.layers.attention.masks import CausalMask, DocumentMask
from keifu.layers.recurrent.gated_delta import (
    GatedDeltaNet,
    GroupedInputs,
    Heads,
    SeparateInputs,
    Signals,
    delta_rule,
)


def signals(length: int, batch: int = 2, heads: int = 3, key_dim: int = 5, value_dim: int = 4) -> Signals:
    random = torch.Generator().manual_seed(length)
    q, k = (torch.randn(batch, heads, length, key_dim, generator=random, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, heads, length, value_dim, generator=random, dtype=torch.float64)
    strength, decay = (torch.rand(batch, heads, length, generator=random, dtype=torch.float64) for _ in range(2))
    return Signals(q, k / k.norm(dim=-1, keepdim=True), v, strength, -3 * decay)


def by_the_paper(given: Signals, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return S ← α S (I - β k kᵀ) + β v kᵀ with the matrices transposed, token by token (Yang et al., 2024, equation
    10)."""
    outputs = []
    for t in range(given.q.shape[2]):
        q, k, v = (x[:, :, t] for x in given[:3])
        strength, decay = (x[:, :, t, None, None] for x in given[3:])
        erased = torch.eye(k.shape[-1], dtype=k.dtype) - strength * k[..., :, None] * k[..., None, :]
        state = decay.exp() * erased @ state + strength * k[..., :, None] * v[..., None, :]
        outputs.append((state.mT @ q[..., None])[..., 0])
    return torch.stack(outputs, 2), state


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
def test_chunks_follow_the_rule(length: int) -> None:
    given, start = signals(length), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    for found, expected in zip(delta_rule(given, start), by_the_paper(given, start), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_documents_of_a_row_are_computed_as_if_alone() -> None:
    given, empty = signals(150), torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    for cut in (1, 63, 64, 100, 128, 149):
        segments = (torch.arange(150) >= cut).long().expand(2, -1)
        found, _ = delta_rule(given, empty, segments)
        parts = [Signals(*(x[:, :, part] for x in given)) for part in (slice(0, cut), slice(cut, None))]
        expected = torch.cat([by_the_paper(part, empty)[0] for part in parts], 2)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def layer(inputs: type = GroupedInputs, size: int = 4) -> GatedDeltaNet:
    torch.manual_seed(1)
    return GatedDeltaNet(12, Heads(2, 4, 5, 3), inputs, size)


@pytest.mark.parametrize("inputs", [GroupedInputs, SeparateInputs])
@pytest.mark.parametrize("size", [1, 2, 4])
@torch.no_grad()
def test_documents_and_padding_reach_no_other_token(inputs: type, size: int) -> None:
    mixer, x = layer(inputs, size), torch.randn(2, 9, 12)
    alone = torch.cat([mixer(x[:, :3]), mixer(x[:, 3:7]), mixer(x[:, 7:])], 1)
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]).expand(2, -1)
    torch.testing.assert_close(mixer(x, DocumentMask(documents)), alone)
    padded = mixer(x, CausalMask(0, 9, torch.tensor([0, 5])))
    torch.testing.assert_close(padded[0], mixer(x[:1])[0])
    torch.testing.assert_close(padded[1, 5:], mixer(x[1:, 5:])[0])


@torch.no_grad()
def test_a_state_goes_on_with_rows_of_different_lengths() -> None:
    mixer, x = layer(), torch.randn(2, 11, 12)
    whole = mixer(x), mixer(x[1:, 3:])
    state, found = KVState([mixer.cache_shape], 2, 20, x), []
    for start, end, padding in ((0, 5, torch.tensor([0, 3])), (5, 6, None), (6, 11, None)):
        state.positions(end - start, padding)
        found.append(mixer(x[:, start:end], cache=state.layer(0)))
        state.advance()
    y = torch.cat(found, 1)
    torch.testing.assert_close(y[0], whole[0][0])
    torch.testing.assert_close(y[1, 3:], whole[1][0])
    assert state.lengths == [11, 8]
    before = state.fixed[0].clone()
    state.positions(1)
    mixer(x[:, :1], cache=state.layer(0))  # and no advance: the pass was interrupted
    assert torch.equal(state.fixed[0], before)
    state.select(torch.tensor([1, 0, 0]))
    assert torch.equal(state.fixed[0], before[[1, 0, 0]])


def test_every_parameter_learns() -> None:
    mixer = layer()
    mixer(torch.randn(2, 70, 12)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in mixer.parameters())


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="3 heads of keys must divide the 4 heads of values"):
        GatedDeltaNet(12, Heads(3, 4, 5, 3), GroupedInputs)

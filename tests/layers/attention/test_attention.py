"""Attention against its formula: groups, windows, masks, both ways of computing it, and impossible shapes."""

import pytest
import torch

from keifu.layers.attention import attention, packed
from keifu.layers.attention.attention import Attention, CrossAttention, Scoring, attend
from keifu.layers.attention.masks import CausalMask, PaddingMask


def formula(q, k, v, allowed, scale=None, cap=None, sinks=None):
    """Return softmax(q kᵀ / √d) v for each head, in a loop; a cap on the scores, and sinks in the denominator."""
    heads = []
    for h in range(q.shape[1]):
        kv = h * k.shape[1] // q.shape[1]
        scores = q[:, h] @ k[:, kv].mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if cap is None else cap * (scores / cap).tanh()
        scores = scores.masked_fill(~allowed, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[h].expand(*scores.shape[:-1], 1)], -1)
        heads.append(scores.softmax(-1)[..., : k.shape[2]] @ v[:, kv])
    return torch.cat(heads, -1)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("length,seen", [(7, 7), (1, 9), (3, 9)])
@pytest.mark.parametrize("window", [None, 2, 5])
@pytest.mark.parametrize("written_out", [False, True])
def test_attend_is_the_formula(kv_heads, length, seen, window, written_out, monkeypatch):
    monkeypatch.setattr(attention, "_short", lambda q, k: written_out)
    torch.manual_seed(1)
    q = torch.randn(2, 6, length, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, seen, 4, dtype=torch.float64) for _ in range(2))
    places, keys = torch.arange(seen - length, seen)[:, None], torch.arange(seen)
    allowed = (keys <= places) & (keys > places - (window or seen))
    visible = CausalMask(seen - length, length).visible(seen, window)
    torch.testing.assert_close(attend(q, k, v, visible), formula(q, k, v, allowed))


@pytest.mark.parametrize(
    ("cap", "sinks"), [(None, None), (0.5, None), (None, [-2.0, 0.0, 1.0, 3.0, 9.0, 30.0]), (None, [-50.0] * 6)]
)
@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize("kv_heads,length,seen,window", [(1, 7, 7, None), (2, 1, 9, None), (2, 3, 9, 5), (6, 9, 9, 2)])
def test_caps_and_sinks_are_the_formula(cap, scale, kv_heads, length, seen, window, sinks):
    torch.manual_seed(1)
    q = torch.randn(2, 6, length, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, seen, 4, dtype=torch.float64) for _ in range(2))
    sinks = None if sinks is None else torch.tensor(sinks, dtype=torch.float64, requires_grad=True)
    places, keys = torch.arange(seen - length, seen)[:, None], torch.arange(seen)
    allowed = (keys <= places) & (keys > places - (window or seen))
    visible = CausalMask(seen - length, length).visible(seen, window)
    expected = formula(q, k, v, allowed, scale, cap, sinks)
    found = attend(q, k, v, visible, Scoring(None, scale, cap, sinks))
    torch.testing.assert_close(found, expected)
    learned = [q] if sinks is None else [q, sinks]
    for ours, theirs in zip(
        torch.autograd.grad(found.sin().sum(), learned),
        torch.autograd.grad(expected.sin().sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_written_out_way_has_the_same_gradient_in_bfloat16():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 33, 8).bfloat16().requires_grad_() for _ in range(3))
    gradients = []
    for inputs in ([q, k, v], [x.detach().float().requires_grad_() for x in (q, k, v)]):
        attend(*inputs, "causal").float().square().sum().backward()
        gradients.append([x.grad.float() for x in inputs])
    for half, whole in zip(*gradients, strict=True):  # eight bits round by 0.4%, a few times over
        assert float((half - whole).norm() / whole.norm()) < 0.012


def test_padding_is_not_seen_and_gives_no_nan():
    torch.manual_seed(0)
    layer, x = Attention(12, 3, n_kv_heads=1), torch.randn(2, 5, 12)
    padded = layer(x, CausalMask(0, 5, torch.tensor([0, 2])))
    alone = layer(x[1:, 2:], CausalMask(0, 3))
    torch.testing.assert_close(padded[1:, 2:], alone)
    assert padded.isfinite().all()


def test_cross_attention_sees_real_tokens_only():
    torch.manual_seed(0)
    layer, x, context = CrossAttention(8, 2, context_dim=6), torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    out = layer(x, layer.project(context), PaddingMask(real))
    short = layer(x[1:], layer.project(context[1:, :3]), PaddingMask())
    torch.testing.assert_close(out[1:], short)


@pytest.mark.parametrize("arguments,named", [((10, 3), "n_heads (3)"), ((12, 6, 4), "n_kv_heads (4)")])
def test_impossible_heads_are_named(arguments, named):
    with pytest.raises(ValueError) as error:
        Attention(*arguments)
    assert named in str(error.value)


def test_the_packed_kernel_splits_no_keys_in_deterministic_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """How it splits them depends on the longest sequence of a batch."""
    splits: list[int | None] = []
    monkeypatch.setattr(packed, "kernel", lambda: lambda q, *given, num_splits, **more: splits.append(num_splits) or q)
    x, ends = torch.zeros(3, 2, 8), torch.tensor([0, 3])
    for wanted in (True, False):
        torch.use_deterministic_algorithms(wanted)
        packed.attend_packed(x, x, x, packed.Bounds(ends, ends, 3, 3), None, Scoring())
    assert splits == [1, None]

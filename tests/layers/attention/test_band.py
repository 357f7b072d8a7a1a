"""Attention within a window, in blocks, is the masked form: outputs, gradients, padding, caches; never a square."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from keifu.layers.attention import attention
from keifu.layers.attention.attention import Attention, Scoring, attend
from keifu.layers.attention.kv_cache import KVState
from keifu.layers.attention.masks import Band, CausalMask


def masked(start: int, length: int, window: int, padding: torch.Tensor | None = None) -> torch.Tensor:
    """Return which of all keys each query may see, [batch, 1, length, start + length], written down at once."""
    queries, keys = torch.arange(start, start + length)[:, None], torch.arange(start + length)
    allowed = ((keys <= queries) & (keys > queries - window))[None, None]
    if padding is not None:
        allowed = allowed & (keys >= padding[:, None, None, None]) | (keys == queries)
    return allowed


def tensors(length: int, start: int = 0, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = (3, 4, length, 6), (3, kv_heads, start + length, 6), (3, kv_heads, start + length, 6)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("window", [1, 2, 5, 8])
@pytest.mark.parametrize(("start", "length"), [(0, 9), (0, 16), (0, 37), (3, 11), (40, 24)])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_are_the_masked_form_with_gradients(window, start, length, padded):
    padding = torch.tensor([0, 2, 7]) if padded else None
    visible = CausalMask(start, length, padding).visible(start + length, window)
    assert isinstance(visible, Band)
    inputs = tensors(length, start)
    weights, results = torch.randn(3, length, 24, dtype=torch.float64), []
    for seen in (visible, masked(start, length, window, padding)):
        y = attend(*inputs, seen, Scoring(scale=0.7))
        results.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
    torch.testing.assert_close(*results)


def test_blocks_in_bfloat16_have_the_gradient_of_float32():
    inputs, gradients = tensors(37, dtype=torch.bfloat16), []
    visible = CausalMask(0, 37).visible(37, 5)
    for given in (inputs, [x.detach().float().requires_grad_() for x in inputs]):
        assert attention._short(given[0], given[1]) == (given is inputs)  # both ways of computing
        attend(*given, visible).float().square().sum().backward()
        gradients.append([x.grad.float() for x in given])
    for half, whole in zip(*gradients, strict=True):  # eight bits round by 0.4%, a few times over
        assert float((half - whole).norm() / whole.norm()) < 0.012


@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("cuts", [[30], [3, 30], [12, 29, 30], [8, 16, 17, 30], list(range(1, 31))])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_pieces_through_a_cache_are_the_whole(window, cuts, padded):
    layer, x = Attention(12, 4, 2, window=window), torch.randn(3, 30, 12)
    padding = torch.tensor([0, 2, 9]) if padded else None
    state, pieces = KVState([(2, 3)], 3, 30, x), []
    for start, end in pairwise([0, *cuts]):
        state.positions(end - start, None if padding is None else (padding - start).clamp(0, end - start))
        pieces.append(layer(x[:, start:end], cache=state.layer(0)))
        state.advance()
    layer.window = None
    heads = layer.qkv(x).unflatten(-1, (-1, 3)).transpose(1, 2).split([4, 2, 2], 1)
    whole = layer.out(attend(*heads, masked(0, 30, window, padding)))
    real = torch.arange(30) >= (torch.zeros(3, 1) if padding is None else padding[:, None])
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real])


class Largest(TorchDispatchMode):
    """Notes the most elements that any tensor has that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in made)])
        return out


@pytest.mark.parametrize("dropout", [0.0, 0.1])  # with dropout torch writes the scores down
@pytest.mark.parametrize("padded", [False, True])
def test_memory_grows_with_the_length_not_with_its_square(dropout, padded):
    largest = []
    for length in (128, 256, 512):
        layer, x = Attention(8, 2, window=8, dropout=dropout), torch.randn(2, length, 8)
        with Largest() as seen:
            layer(x, CausalMask(0, length, torch.tensor([0, 5]) if padded else None)).sum().backward()
        largest.append(seen.elements)
    assert largest[1] == 2 * largest[0] and largest[2] == 4 * largest[0]
    assert largest[2] < 512 * 512


def test_work_grows_with_the_length_not_with_its_square():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(length: int, window: int | None) -> int:
        layer, x = Attention(8, 2, window=window, dropout=0.1), torch.randn(1, length, 8)
        with FlopCounterMode(display=False) as counter:
            layer(x, CausalMask(0, length)).sum().backward()
        return counter.get_total_flops()

    assert flops(512, 8) == 2 * flops(256, 8)
    assert flops(512, None) > 3 * flops(256, None)

"""Attention over a text and a grid: DALL-E's masks, and the sparse way to compute them against the dense one."""

import pytest
import torch

from keifu.layers.attention.axial import Grid, GridAttention, grid_attend
from keifu.layers.attention.kv_cache import KVState

PATTERNS = ("row", "column", "convolution", "full")


def test_the_masks_of_figure_11() -> None:
    """A text of 6 and a grid of 4 x 4; the window is 3 x 3 there."""
    grid = Grid(6, 4, 4, kernel=3)
    seen = {
        "row": lambda q, k: q - 4 <= k <= q,  # the previous five, the last one in the same column of the row before
        "column": lambda q, k: k <= q and k % 4 == q % 4,
        "convolution": lambda q, k: q - k in (0, 1, 3, 4, 5),  # and on behind the edge, as row
        "full": lambda q, k: k <= q,
    }
    for pattern, sees in seen.items():
        mask = grid.visible(pattern)
        assert torch.equal(mask[:6], torch.ones(6, 22, dtype=torch.bool).tril())
        assert mask[6:, :6].all()
        expected = torch.tensor([[sees(q, k) for k in range(16)] for q in range(16)])
        assert torch.equal(mask[6:, 6:], expected), pattern
        for place in (0, 3, 9, 15):
            assert grid.seen_from(pattern, place).tolist() == mask[6 + place].nonzero().flatten().tolist()


def test_the_papers_window_and_lengths() -> None:
    grid = Grid(256, 32, 32)
    assert len(grid.offsets("convolution")) == 5 * 11 + 6 and len(grid.offsets("row")) == 33
    assert [grid.rows_seen(pattern) for pattern in PATTERNS[:3]] == [2, 32, 7]
    assert all(grid.pays(pattern) for pattern in PATTERNS[:3]) and not Grid(1, 4, 4).pays("convolution")


@pytest.mark.parametrize("shape", [(5, 6, 7, 3), (3, 9, 5, 5), (2, 3, 4, 11), (1, 14, 3, 7)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparse_is_dense_in_both_directions(pattern, shape) -> None:
    grid = Grid(*shape)
    length = grid.prefix + grid.cells
    q, k, v = (torch.randn(2, 3, length, 6, requires_grad=True) for _ in range(3))
    scores = (q @ k.mT * 6**-0.5).masked_fill(~grid.visible(pattern), -torch.inf)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    found = grid_attend(q, k, v, grid, pattern)
    assert (found - expected).abs().max() < 1e-6
    back = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, (q, k, v), back) for y in (found, expected)), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_place_by_place_is_the_whole(pattern) -> None:
    grid = Grid(4, 5, 3, kernel=3)
    layer, x = GridAttention(12, 2, grid, pattern), torch.randn(2, 19, 12)
    state, parts = KVState([(2, 6)], 2, 19, x), []
    for start, end in ((0, 4), *((place, place + 1) for place in range(4, 19))):
        state.positions(end - start)
        parts.append(layer(x[:, start:end], cache=state.layer(0)))
        state.advance()
    assert (torch.cat(parts, 1) - layer(x)).abs().max() < 1e-6

"""Axial sparse attention for a text followed by a grid of image tokens (DALL-E).

A grid position attends to the text and to few earlier positions: its row, its column or its neighbourhood (Ramesh et
al., 2021, appendix B.1 and figure 11). Axes: batch, heads, length = prefix + cells, head_dim; prefix = tokens before
the grid; cells = grid positions in raster order, row by row; window = positions that a row of the grid may attend to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.layers.attention.attention import Attention, Hidden, attend
from keifu.layers.attention.kv_cache import LayerCache

Pattern = Literal["row", "column", "convolution", "full"]
Heads = Float[Tensor, "batch heads length head_dim"]
Cells = Float[Tensor, "batch heads cells head_dim"]
Groups = Float[Tensor, "batch heads groups length head_dim"]
Windows = Float[Tensor, "batch heads groups window head_dim"]
Text = tuple[Float[Tensor, "batch heads prefix head_dim"], Float[Tensor, "batch heads prefix head_dim"]]


@dataclass(frozen=True)
class Grid:
    """A grid after `prefix` tokens: its height and width, and the side of the window of the pattern "convolution"."""

    prefix: int
    height: int
    width: int
    kernel: int = 11

    @property
    def cells(self) -> int:
        """Return the number of positions of the grid."""
        return self.height * self.width

    def offsets(self, pattern: Pattern) -> tuple[int, ...]:
        """Return the distances in raster order of the positions that one position attends to; 0 is itself.

        row: as many as a row has, plus one, so that the last is directly above. column: those above. convolution: the
        earlier half of a square window. At the left edge, row and convolution continue in the previous row (figure 11).
        """
        half = self.kernel // 2
        window = {down * self.width + across for down in range(half + 1) for across in range(-half, half + 1)}
        patterns = {
            "row": range(self.width + 1),
            "column": range(0, self.cells, self.width),
            "convolution": sorted(offset for offset in window if offset >= 0),
            "full": range(self.cells),
        }
        return tuple(offset for offset in patterns[pattern] if offset < self.cells)

    def visible(self, pattern: Pattern) -> Bool[Tensor, "length length"]:
        """Return the mask of an axial attention: text sees earlier tokens; a grid position sees the whole text and its
        `offsets`."""
        length = self.prefix + self.cells
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        positions = torch.arange(self.cells)
        mask[self.prefix :, self.prefix :] &= self._near(positions[:, None], positions, pattern)
        return mask

    def window(self, pattern: Pattern) -> Bool[Tensor, "rows columns window"]:
        """Return for each row of the grid which of its window each position sees. The window is the row itself and the
        rows above that it attends to. Positions before the first row are masked."""
        above = (self.rows_seen(pattern) - 1) * self.width
        queries = torch.arange(self.cells).view(self.height, self.width, 1)
        keys = torch.arange(self.height)[:, None, None] * self.width + torch.arange(-above, self.width)
        return self._near(queries, keys, pattern) & (keys >= 0)

    def _near(self, queries: Int[Tensor, "..."], keys: Int[Tensor, "..."], pattern: Pattern) -> Bool[Tensor, "..."]:
        return torch.isin(queries - keys, torch.tensor(self.offsets(pattern)))

    def seen_from(self, pattern: Pattern, position: int) -> Int[Tensor, " seen"]:
        """Return the indices of the tokens that one grid position sees; the last is itself."""
        earlier = [self.prefix + position - offset for offset in reversed(self.offsets(pattern)) if offset <= position]
        return torch.cat([torch.arange(self.prefix), torch.tensor(earlier)])

    def rows_seen(self, pattern: Pattern) -> int:
        """Return the number of rows that a row of the grid attends to, including itself."""
        return min(self.height, 1 - (-max(self.offsets(pattern)) // self.width))

    def pays(self, pattern: Pattern) -> bool:
        """Return whether attention to the few visible positions is less work than masked attention to all."""
        return pattern == "column" or 2 * self.rows_seen(pattern) <= self.height


class GridAttention(Attention):
    """`Attention` whose grid positions see what a pattern allows. Only visible positions are computed if that is
    faster."""

    def __init__(self, dim: int, n_heads: int, grid: Grid, pattern: Pattern):
        super().__init__(dim, n_heads)
        self.grid = grid
        self.pattern: Pattern = pattern

    def forward(self, x: Hidden, cache: LayerCache | None = None) -> Hidden:
        """Attend from all tokens. With a cache: from the text and the grid's first positions, or from one new
        position."""
        heads = self.qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        q, k, v = (part.transpose(1, 2) for part in heads.unbind(2))
        if cache is None:
            return self.out(grid_attend(q, k, v, self.grid, self.pattern))
        k, v = cache.append(k, v)
        if x.shape[1] > 1:
            return self.out(attend(q, k, v, "causal"))
        visible = _table(Grid.seen_from, x.device, self.grid, self.pattern, k.shape[2] - 1 - self.grid.prefix)
        return self.out(attend(q, k[:, :, visible], v[:, :, visible]))


@lru_cache(maxsize=8192)
def _table(make: Callable[..., Tensor], device: torch.device, *arguments: Any) -> Tensor:
    """Return a table of a grid, computed once. It is not an inference tensor, since training may use it too."""
    with torch.inference_mode(False):
        return make(*arguments).to(device)


def grid_attend(q: Heads, k: Heads, v: Heads, grid: Grid, pattern: Pattern) -> Hidden:
    """Attend over a text and a whole grid; return the result of each token with the heads joined."""
    if pattern == "full":
        return attend(q, k, v, "causal")
    if not grid.pays(pattern):
        return attend(q, k, v, _table(Grid.visible, q.device, grid, pattern)[None, None])
    before = k[:, :, : grid.prefix], v[:, :, : grid.prefix]
    text = attend(q[:, :, : grid.prefix], *before, "causal")
    q, k, v = (x[:, :, grid.prefix :] for x in (q, k, v))
    attended = (_columns if pattern == "column" else _rows)(q, k, v, before, grid, pattern)
    return torch.cat([text, attended.transpose(1, 2).flatten(2)], 1)


def _columns(q: Cells, k: Cells, v: Cells, before: Text, grid: Grid, pattern: Pattern) -> Cells:
    """Attend within columns. The grid is transposed, so that a column is contiguous (figure 11, c)."""
    q, k, v = (x.unflatten(2, (grid.height, grid.width)).transpose(2, 3) for x in (q, k, v))
    causal = torch.ones(grid.height, grid.height, dtype=torch.bool, device=q.device).tril()
    return _assemble(q, k, v, before, causal).transpose(2, 3).flatten(2, 3)


def _rows(q: Cells, k: Cells, v: Cells, before: Text, grid: Grid, pattern: Pattern) -> Cells:
    """Attend from each row of the grid to itself and to the few rows above that its offsets reach."""
    above = (grid.rows_seen(pattern) - 1) * grid.width
    q = q.unflatten(2, (grid.height, grid.width))
    k, v = (F.pad(x, (0, 0, above, 0)).unfold(2, above + grid.width, grid.width).mT for x in (k, v))
    return _assemble(q, k, v, before, _table(Grid.window, q.device, grid, pattern)).flatten(2, 3)


def _assemble(q: Groups, k: Windows, v: Windows, before: Text, mask: Bool[Tensor, "... length window"]) -> Groups:
    """Attend from groups of positions to the whole text and, if the mask allows, to a window for each group, in one
    softmax.

    The text's keys are not repeated for each group.
    """
    scale = q.shape[-1] ** -0.5
    groups, length = q.shape[2:4]
    text = (q.flatten(2, 3) @ before[0].mT).unflatten(2, (groups, length)) * scale
    near = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    shares = torch.cat([text, near], -1).softmax(-1)
    of_text, of_near = shares.split([text.shape[-1], near.shape[-1]], -1)
    return (of_text.flatten(2, 3) @ before[1]).unflatten(2, (groups, length)) + of_near @ v

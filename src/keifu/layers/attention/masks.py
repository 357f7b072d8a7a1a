"""Several documents in one row: who sees whom, and where each begins; knows no attention.

Axes: batch, length. `documents` [batch, length] numbers the document of each token; equal neighbours belong together.

Attention within a window, cut into blocks so that its cost grows with the window and not with the square of the
length; knows no model and no softmax.

A block is as many queries as the window is wide. All that they may see lies among the block's own keys and those of the
block before, so a block is a small attention of its own, and a long text is a batch of them.

Axes: batch, length = queries, seen = keys, heads, window = queries of a block, both = keys of two blocks,
folded = batch · blocks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class DocumentMask:
    """Each token sees itself and those before it in its own document; one object serves all layers of a pass."""

    def __init__(self, documents: Int[Tensor, "batch length"]):
        places = torch.arange(documents.shape[1], device=documents.device)
        self.apart = places[:, None] - places
        self.same = (documents[:, :, None] == documents[:, None]) & (self.apart >= 0)

    def visible(self, seen: int, window: int | None) -> Bool[Tensor, "batch 1 length seen"]:
        near = self.same if window is None else self.same & (self.apart < window)
        return near[:, None]


def positions_in(documents: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """How far each token is from the beginning of its document."""
    places = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(begins, places, 0).cummax(1).values


Keys = Float[Tensor, "batch kv_heads seen head_dim"]
Cut = tuple[
    Float[Tensor, "folded heads window head_dim"],
    Float[Tensor, "folded kv_heads both head_dim"],
    Float[Tensor, "folded kv_heads both head_dim"],
    Bool[Tensor, "folded 1 window both"],
]


@dataclass(frozen=True)
class Band:
    """What the queries of each block may see; rows of padding make it differ from text to text."""

    mask: Bool[Tensor, "#batch blocks window both"]

    def cut(self, q: Float[Tensor, "batch heads length head_dim"], k: Keys, v: Keys) -> Cut:
        """Queries, keys, values and mask with the blocks as rows of the batch.

        Keys begin a window before the queries: what is missing there, and what the last block lacks, is zeros that
        nobody sees; what lies before is left out.
        """
        batch, (blocks, window) = len(q), self.mask.shape[1:3]
        front, rest = window - (k.shape[2] - q.shape[2]), blocks * window - q.shape[2]
        queries = F.pad(q, (0, 0, 0, rest)).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
        mask = self.mask.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
        keys, values = (self._pairs(F.pad(x, (0, 0, front, rest))) for x in (k, v))
        return queries, keys, values, mask

    def _pairs(self, x: Keys) -> Float[Tensor, "folded kv_heads both head_dim"]:
        """Each block's keys after those of the block before."""
        blocks = x.unflatten(2, (-1, self.mask.shape[2])).transpose(1, 2)
        return torch.cat([blocks[:, :-1], blocks[:, 1:]], 3).flatten(0, 1)

    def join(self, y: Float[Tensor, "folded window dim"], length: int) -> Float[Tensor, "batch length dim"]:
        """The blocks as whole texts again."""
        return y.unflatten(0, (-1, self.mask.shape[1])).flatten(1, 2)[:, :length]


def band(
    start: int,
    length: int,
    seen: int,
    window: int,
    padding: Int[Tensor, " batch"] | None = None,
    device: torch.device | None = None,
) -> Band:
    """Each token sees itself and the `window` - 1 before it, but no left padding.

    `start` tokens came in earlier passes, `length` are in this one; the last `seen` of all are there as keys.
    """
    first = torch.arange(-(-length // window), device=device)[:, None, None] * window + start
    queries = first + torch.arange(window, device=device)[:, None]
    keys = first + torch.arange(-window, window, device=device)
    mask = ((keys <= queries) & (keys > queries - window) & (keys >= start + length - seen))[None]
    if padding is not None:  # a padding token sees itself, so that no row of the softmax is empty
        mask = mask & (keys >= padding[:, None, None, None]) | (keys == queries)
    return Band(mask)

"""Attention masks: causal, padding, block-diagonal for several documents in a row, and banded for sliding windows.

For a sliding window, the sequence is cut into blocks, so that the cost grows with length · window and not with the
square of the length. A block has as many queries as the window is wide. All keys that they may see are in this block
and the one before, so that each block is a small attention, and a long sequence becomes a batch of blocks.

Axes: batch, length = queries, seen = keys, heads, window = queries of a block, both = keys of two blocks, folded =
batch · blocks. `documents` (batch, length) numbers the document of each token; equal neighbours belong together.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch length"]


class DocumentMask:
    """Each token sees itself and earlier tokens of its document. One object serves all layers of a pass."""

    def __init__(self, documents: Tokens):
        self.documents = documents
        positions = torch.arange(documents.shape[1], device=documents.device)
        self.distance = positions[:, None] - positions
        self.same = (documents[:, :, None] == documents[:, None]) & (self.distance >= 0)

    def visible(self, n_keys: int, window: int | None) -> Bool[Tensor, "batch 1 length seen"]:
        near = self.same if window is None else self.same & (self.distance < window)
        return near[:, None]


def segments_of(mask: "CausalMask | DocumentMask | None", length: int) -> Int[Tensor, "batch length"] | None:
    """Return the document number of each token, with left padding as one document; None if a row is one sequence."""
    if isinstance(mask, DocumentMask):
        return mask.documents
    if mask is None or mask.padding is None:
        return None
    return (torch.arange(length, device=mask.padding.device) >= mask.padding[:, None]).long()


def positions_in(documents: Tokens) -> Tokens:
    """Return each token's position within its document, from 0."""
    positions = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return positions - torch.where(begins, positions, 0).cummax(1).values


def real_tokens(tokens: Tokens, end: int | None) -> Bool[Tensor, "batch length"]:
    """Return the mask of real tokens: True up to and including the first end token, or everywhere without one."""
    ends = tokens == end if end is not None else torch.zeros_like(tokens, dtype=torch.bool)
    return ends.cumsum(1) - ends.long() == 0


Keys = Float[Tensor, "batch kv_heads seen head_dim"]
Cut = tuple[
    Float[Tensor, "folded heads window head_dim"],
    Float[Tensor, "folded kv_heads both head_dim"],
    Float[Tensor, "folded kv_heads both head_dim"],
    Bool[Tensor, "folded 1 window both"],
]


@dataclass(frozen=True)
class Band:
    """Mask of the keys that the queries of each block may see. With padding it differs between sequences."""

    mask: Bool[Tensor, "#batch blocks window both"]

    def cut(self, q: Float[Tensor, "batch heads length head_dim"], k: Keys, v: Keys) -> Cut:
        """Cut queries, keys, values and mask into blocks, which become sequences of the batch.

        Keys begin a window before the queries. Missing keys there, and at the end of the last block, are zeros that are
        masked; earlier keys are left out.
        """
        batch, (blocks, window) = len(q), self.mask.shape[1:3]
        front, end_padding = window - (k.shape[2] - q.shape[2]), blocks * window - q.shape[2]
        queries = F.pad(q, (0, 0, 0, end_padding)).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
        mask = self.mask.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
        keys, values = (self._pairs(F.pad(x, (0, 0, front, end_padding))) for x in (k, v))
        return queries, keys, values, mask

    def _pairs(self, x: Keys) -> Float[Tensor, "folded kv_heads both head_dim"]:
        """Join each block's keys to those of the block before."""
        blocks = x.unflatten(2, (-1, self.mask.shape[2])).transpose(1, 2)
        return torch.cat([blocks[:, :-1], blocks[:, 1:]], 3).flatten(0, 1)

    def join(self, y: Float[Tensor, "folded window dim"], length: int) -> Float[Tensor, "batch length dim"]:
        """Join the blocks into whole sequences again."""
        return y.unflatten(0, (-1, self.mask.shape[1])).flatten(1, 2)[:, :length]


def band(
    start: int, length: int, n_keys: int, window: int, padding: Int[Tensor, " batch"] | None = None,
    device: torch.device | None = None,
) -> Band:  # fmt: skip
    """Return the mask in which each token sees itself and the `window` - 1 tokens before it, but no left padding.

    start: tokens of earlier passes. length: tokens of this pass. n_keys: number of keys, the last ones of all tokens.
    """
    first = torch.arange(-(-length // window), device=device)[:, None, None] * window + start
    queries = first + torch.arange(window, device=device)[:, None]
    keys = first + torch.arange(-window, window, device=device)
    mask = ((keys <= queries) & (keys > queries - window) & (keys >= start + length - n_keys))[None]
    if padding is not None:  # a padding token sees itself, so that no row of the softmax is empty
        mask = mask & (keys >= padding[:, None, None, None]) | (keys == queries)
    return Band(mask)


Biases = Float[Tensor, "#batch heads #length seen"]  # added to the scores; -inf where a key is not visible
Visible = Bool[Tensor, "#batch 1 #length seen"] | Biases | Band | Literal["causal"] | None


@runtime_checkable
class Mask(Protocol):
    """Interface of a mask: which keys each query may attend to.

    `visible(seen, window)` returns None for all keys, "causal" for the lower triangle, a `Band` if there are more
    queries than the window is wide, and otherwise a tensor: boolean, or numbers that are added to the scores.
    """

    def visible(self, n_keys: int, window: int | None) -> Visible: ...


class CausalMask:
    """Each token sees itself and earlier tokens, but no left padding. One object serves all layers of a pass.

    start: tokens of earlier passes. length: tokens of this pass. padding (batch,): number of padding tokens of each
    row. The mask is on `device`, or on the device of `padding`.
    """

    def __init__(
        self, start: int, length: int, padding: Int[Tensor, " batch"] | None = None, device: torch.device | None = None
    ):
        self.start, self.length, self.padding = start, length, padding
        self.device = device if padding is None else padding.device
        self._cache: dict[tuple[int, int | None], Visible] = {}

    def visible(self, n_keys: int, window: int | None) -> Visible:
        window = None if window is None or window >= n_keys else window
        if (n_keys, window) not in self._cache:
            self._cache[n_keys, window] = self._make(n_keys, window)
        return self._cache[n_keys, window]

    def _make(self, n_keys: int, window: int | None) -> Visible:
        if self.padding is None and window is None and (self.length == 1 or self.length == n_keys):
            return None if self.length == 1 else "causal"
        if window is not None and self.length > window:
            return band(self.start, self.length, n_keys, window, self.padding, self.device)
        end = self.start + self.length
        queries = torch.arange(self.start, end, device=self.device)[:, None]
        keys = torch.arange(end - n_keys, end, device=self.device)[None]
        mask = keys <= queries
        if window is not None:
            mask &= keys > queries - window
        if self.padding is not None:  # a padding token sees itself, so that no row of the softmax is empty
            mask = mask & (keys >= self.padding[:, None, None]) | (keys == queries)
        return mask.reshape(-1, 1, self.length, n_keys)


class RaggedMask:
    """Each token sees tokens up to its position, if rows have different lengths; see `KVState`.

    positions: the queries' positions. The keys are the last ones before position `end`.
    """

    def __init__(self, positions: Tokens, end: int):
        self.positions, self.end = positions[:, None, :, None], end
        self._cache: dict[tuple[int, int | None], Tensor] = {}

    def visible(self, n_keys: int, window: int | None) -> Bool[Tensor, "batch 1 length seen"]:
        if (n_keys, window) not in self._cache:
            keys = torch.arange(self.end - n_keys, self.end, device=self.positions.device)
            near = keys <= self.positions
            self._cache[n_keys, window] = near if window is None else near & (keys > self.positions - window)
        return self._cache[n_keys, window]


class PaddingMask:
    """Every query sees every real token, in both directions. `real` is True on real tokens."""

    def __init__(self, real: Bool[Tensor, "batch seen"] | None = None):
        self.mask = None if real is None else real[:, None, None, :]

    def visible(self, n_keys: int, window: int | None) -> Visible:
        return self.mask


class CausalPaddingMask(PaddingMask):
    """Each token sees itself and earlier real tokens. `real` is True on real tokens."""

    def __init__(self, real: Bool[Tensor, "batch length"]):
        causal = torch.ones(2 * real.shape[1:], dtype=torch.bool, device=real.device).tril()
        self.mask = ((real[:, None] & causal) | torch.eye(real.shape[1], dtype=torch.bool, device=real.device))[:, None]

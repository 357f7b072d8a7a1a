"""Key-value cache: the keys and values of all earlier tokens for all layers of a model, in memory allocated once.

Each row of a batch has its own length; rows of different lengths need no padding. A layer may store a state of fixed
size for each row instead. Axes: rows, heads = heads of keys and values, length = new tokens of a pass, seen = tokens
that a pass attends to, head_dim, numbers = of a state of fixed size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from keifu.layers.attention.attention import CacheShape, Rule, Scoring, attend
from keifu.layers.attention.masks import CausalMask, Mask, RaggedMask

New = Float[Tensor, "rows heads length head_dim"]
Seen = Float[Tensor, "rows heads seen head_dim"]


class KVState:
    """Cache of `rows` rows with space for `capacity` tokens each. `lengths`: the number of tokens in each row.

    layers: the `CacheShape` of each layer, or its first two fields. A pass begins with `positions`, which returns the
    positions of its tokens; then each layer uses its part (`layer`); `advance` ends the pass. A pass that is
    interrupted earlier does not change the state.
    """

    sequence_lengths = None  # the positions determine them

    def __init__(self, layers: Sequence[CacheShape | tuple[int, int]], rows: int, capacity: int, like: Tensor):
        shapes = [layer if isinstance(layer, CacheShape) else CacheShape(*layer) for layer in layers]
        self.keys, self.values = (  # zeros, not empty: masked positions are read too, and NaN would spread
            [like.new_zeros(rows, shape.heads, capacity, shape.widths[part]) for shape in shapes] for part in (0, 1)
        )
        self.fixed = [like.new_zeros(rows, shape.fixed, dtype=torch.float32) for shape in shapes]
        self.lengths = [0] * rows
        self._pass: Pass | None = None

    @property
    def capacity(self) -> int:
        """The number of tokens that a row has space for."""
        return self.keys[0].shape[2]

    @property
    def longest(self) -> int:
        """The largest number of tokens in a row."""
        return max(self.lengths, default=0)

    @property
    def device(self) -> torch.device:
        """Return the device of the keys and values."""
        return self.keys[0].device

    @property
    def token_bytes(self) -> int:
        """Return the bytes of the keys and values of one token of one row."""
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in (*self.keys, *self.values))

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row that do not depend on its number of tokens."""
        return sum(4 * x.shape[1] for x in self.fixed)

    def positions(self, length: int, padding: Int[Tensor, " rows"] | None = None) -> Int[Tensor, "*rows length"]:
        """Begin a pass of `length` tokens per row. Return their positions, (length,) if all rows have the same.

        padding: number of padding tokens at the beginning of each row; these are not stored. Raises ValueError if the
        capacity is exceeded.
        """
        pads = [0] * len(self.lengths) if padding is None else padding.tolist()
        self._pass = Pass(self.lengths, length, pads, self.device)
        if (end := max(self._pass.ends, default=0)) > self.capacity:
            raise ValueError(f"The cache has room for {self.capacity} tokens and was given {end}; make a larger one.")
        return self._pass.positions

    def layer(self, index: int) -> "LayerCache":
        """Return the cache of one layer in the current pass."""
        assert self._pass is not None, "`positions` begins a pass"
        return LayerCache(self.keys[index], self.values[index], self._pass, self.fixed[index], index)

    def advance(self) -> None:
        """End the pass. Its tokens stay in the cache."""
        assert self._pass is not None, "`positions` begins a pass"
        self.fixed = [self._pass.fixed.get(index, before) for index, before in enumerate(self.fixed)]
        self.lengths, self._pass = self._pass.ends, None

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows, in this order. A row may be repeated.

        If the number of rows does not grow, the memory is reused, and rows that keep their index are not copied. Pass
        `rows` on the CPU, so that the host need not wait for a GPU.
        """
        longest, count = self.longest, len(rows)
        same = len(set(self.lengths)) == 1
        self.lengths = self.lengths[:1] * count if same else [self.lengths[row] for row in rows.tolist()]
        moved = (rows != torch.arange(count, device=rows.device)).nonzero()[:, 0]
        parts = rows, moved, rows[moved]
        indices, into, origin = torch.cat(parts).to(self.device).split([*map(len, parts)])
        self.fixed = [x[indices] for x in self.fixed]
        if count > len(self.keys[0]):
            self.keys, self.values = ([x[indices] for x in tensors] for tensors in (self.keys, self.values))
            return
        for tensors in (self.keys, self.values):
            for x in tensors:
                x[into, :, :longest] = x[origin, :, :longest]
        self.keys, self.values = ([x[:count] for x in tensors] for tensors in (self.keys, self.values))


class Pass:
    """Positions of the new tokens of each row, and their mask. One object serves all layers of a pass."""

    def __init__(self, starts: Sequence[int], length: int, pads: Sequence[int], device: torch.device):
        self.starts, self.pads = starts, pads
        self.fixed: dict[int, Tensor] = {}  # fixed-size states after this pass, by layer
        self.ends = [start + length - pad for start, pad in zip(starts, pads, strict=True)]
        self.even = len(set(starts)) <= 1 and not any(pads)
        self.first, self.last = min(starts, default=0), max(self.ends, default=0)
        if self.even:
            self.positions = torch.arange(self.first, self.last, device=device)
            self.mask = CausalMask(self.first, length, None, device)
            return
        first, before = (torch.tensor(values, device=device)[:, None] for values in (starts, pads))
        self.positions = first + (torch.arange(length, device=device) - before).clamp(min=0)
        self.mask = RaggedMask(self.positions, self.last)

    def write(self, buffer: Float[Tensor, "rows heads capacity head_dim"], new: New) -> None:
        """Append the new tokens of each row, without its padding."""
        if self.even:
            buffer[:, :, self.first : self.last] = new
        elif new.shape[2] == 1:
            buffer[torch.arange(len(buffer), device=buffer.device), :, self.positions[:, 0]] = new[:, :, 0]
        else:
            for row, (start, end, pad) in enumerate(zip(self.starts, self.ends, self.pads, strict=True)):
                buffer[row, :, start:end] = new[row, :, pad:]


class LayerCache:
    """The keys and values of one layer, and its fixed-size state, during a pass."""

    def __init__(self, keys: Tensor, values: Tensor, now: Pass, fixed: Tensor, index: int):
        self.keys, self.values, self._pass, self._fixed, self._index = keys, values, now, fixed, index

    def append(self, keys: New | None, values: New | None, window: int | None = None) -> tuple[Seen, Seen]:
        """Append keys and values and return all, or with a window only those that some new token sees.

        Without values the keys are used as values too. Without keys nothing is appended.
        """
        now = self._pass
        if keys is not None:
            now.write(self.keys, keys)
        if values is not None:
            now.write(self.values, values)
        first = 0 if window is None else max(0, now.first - window + 1)
        stored = self.values if self.values.shape[-1] else self.keys
        return self.keys[:, :, first : now.last], stored[:, :, first : now.last]

    def attend(
        self, q: Float[Tensor, "rows q_heads length head_dim"], keys: New | None, values: New | None,
        window: int | None, scoring: Scoring,
    ) -> Float[Tensor, "rows length dim"]:  # fmt: skip
        """Attend from the new tokens to the earlier ones and themselves; see `attend`."""
        all_keys, all_values = self.append(keys, values, window)
        return attend(q, all_keys, all_values, self._pass.mask.visible(all_keys.shape[2], window), scoring)

    def recur(self, rule: Rule, x: Float[Tensor, "rows length channels"]) -> Float[Tensor, "rows length out"]:
        """Apply `rule` to the new tokens and the state, and return its output. The new state is stored when the pass
        ends.

        Rows with padding are computed one by one, without it.
        """
        if not any(self._pass.pads):
            y, self._pass.fixed[self._index] = rule(x, self._fixed)
            return y
        parts = [rule(x[row, None, pad:], self._fixed[row, None]) for row, pad in enumerate(self._pass.pads)]
        self._pass.fixed[self._index] = torch.cat([state for _, state in parts])
        return torch.cat([F.pad(y, (0, 0, x.shape[1] - y.shape[1], 0)) for y, _ in parts])


class PassCache:
    """Keys and values of one layer in a pass without earlier tokens, for the layers that use them too."""

    def __init__(self, mask: Mask | None):
        self.mask = mask
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(
        self, q: Float[Tensor, "rows q_heads length head_dim"], keys: New | None, values: New | None,
        window: int | None, scoring: Scoring,
    ) -> Float[Tensor, "rows length dim"]:  # fmt: skip
        """Store keys and values, if there are any, and attend from all tokens."""
        if keys is not None:
            self.keys, self.values = keys, keys if values is None else values
        assert self.keys is not None and self.values is not None, "the first layer has keys"
        visible = None if self.mask is None else self.mask.visible(self.keys.shape[2], window)
        return attend(q, self.keys, self.values, visible, scoring)

    def recur(self, rule: Rule, x: Float[Tensor, "rows length channels"]) -> Float[Tensor, "rows length out"]:
        """Raise an error, because no layer shares a state of fixed size."""
        raise NotImplementedError

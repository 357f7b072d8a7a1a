"""Key-value caches: keys and values of the tokens so far, in memory allocated once.

Axes: batch, heads = heads of keys and values, length = tokens, head_dim.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

KeysValues = tuple[Float[Tensor, "batch heads seen head_dim"], Float[Tensor, "batch heads seen head_dim"]]


class KeyValueCache:
    """Room for `capacity` tokens; `append` writes the new ones behind the old and returns views of all."""

    def __init__(self, batch: int, heads: int, capacity: int, head_dim: int, like: Tensor):
        self.keys = like.new_empty(batch, heads, capacity, head_dim)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(
        self, keys: Float[Tensor, "batch heads length head_dim"], values: Float[Tensor, "batch heads length head_dim"]
    ) -> KeysValues:
        """All keys and values seen, the given ones last. More than the capacity is a `ValueError`."""
        end, capacity = self.length + keys.shape[2], self.keys.shape[2]
        if end > capacity:
            raise ValueError(f"The cache has room for {capacity} tokens and was given {end}; make a larger one.")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    @property
    def earliest(self) -> int:
        """The smallest length that `rollback` can go back to."""
        return 0

    def rollback(self, length: int) -> None:
        """Forgets all tokens but the first `length`."""
        _check_rollback(length, self.earliest, self.length)
        self.length = length

    def reserve(self, capacity: int) -> None:
        """Makes room for `capacity` tokens in all, if there is less; what is held stays."""
        if capacity > self.keys.shape[2]:
            self.keys, self.values = (_shift(x[:, :, : self.length], capacity) for x in (self.keys, self.values))

    def whole(self, batch: int, capacity: int) -> "KeyValueCache":
        """An empty cache for `batch` rows of the same layer that forgets nothing: any length can be gone back to."""
        return KeyValueCache(batch, self.keys.shape[1], capacity, self.keys.shape[3], self.keys)

    def begin(self, beginning: "KeyValueCache", padding: Sequence[int]) -> None:
        """Every row begins with what the one row of `beginning` holds, behind so much padding, and all end together.

        What a row's padding leaves no room for is left out: the row goes on from an earlier token.
        """
        length = beginning.length
        for row, front in enumerate(padding):
            front = min(front, length)
            for own, given in ((self.keys, beginning.keys), (self.values, beginning.values)):
                own[row, :, :front] = 0.0  # nobody sees it, but nothing times NaN is NaN
                own[row, :, front:length] = given[0, :, : length - front]
        self.length = length

    def select(self, rows: Int[Tensor, " kept"], start: int = 0) -> None:
        """Keeps only these rows of the batch, without their first `start` tokens, which must be padding.

        As many rows or fewer stay in the memory that they have, and those that keep their place are not touched.
        """
        if not start and len(rows) <= len(self.keys):
            moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
            for held in (self.keys[:, :, : self.length], self.values[:, :, : self.length]):
                held[moved] = held[rows[moved]]
            self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]
            return
        capacity, held = self.keys.shape[2] - start, slice(start, self.length)
        self.keys, self.values = (_shift(x[:, :, held][rows], capacity) for x in (self.keys, self.values))
        self.length -= start


class WholeWindowCache(KeyValueCache):
    """Holds all tokens and shows what a sliding window sees: a `WindowCache` that can go back to any length."""

    def __init__(self, batch: int, heads: int, capacity: int, head_dim: int, like: Tensor, window: int):
        super().__init__(batch, heads, capacity, head_dim, like)
        self.window = window

    def append(
        self, keys: Float[Tensor, "batch heads length head_dim"], values: Float[Tensor, "batch heads length head_dim"]
    ) -> KeysValues:
        """The keys and values that the given tokens may see, oldest first, the given ones last."""
        all_keys, all_values = super().append(keys, values)
        first = max(0, self.length - keys.shape[2] - self.window + 1)
        return all_keys[:, :, first:], all_values[:, :, first:]


class WindowCache:
    """Keeps what a sliding window still sees: the last `window` - 1 tokens and the new ones.

    The buffer has twice the room of the window; when it is full the part still needed moves to the front, so that a
    token costs a constant amount of copying on average.
    """

    def __init__(self, batch: int, heads: int, window: int, head_dim: int, like: Tensor):
        self.keys = like.new_empty(batch, heads, 2 * window, head_dim)
        self.values = torch.empty_like(self.keys)
        self.window, self.length, self.used = window, 0, 0

    def append(
        self, keys: Float[Tensor, "batch heads length head_dim"], values: Float[Tensor, "batch heads length head_dim"]
    ) -> KeysValues:
        """The keys and values that the given tokens may see, oldest first, the given ones last."""
        new, keep = keys.shape[2], min(self.used, self.window - 1)
        self.length += new
        if keep + new > self.keys.shape[2]:  # a long prompt: attend to it as it is, keep only its end
            joined = self._joined(keep, keys, values)
            self.used = self.window - 1
            self.keys[:, :, : self.used], self.values[:, :, : self.used] = (
                x[:, :, x.shape[2] - self.used :] for x in joined
            )
            return joined
        if self.used + new > self.keys.shape[2]:
            for buffer in (self.keys, self.values):
                buffer[:, :, :keep] = buffer[:, :, self.used - keep : self.used].clone()
            self.used = keep
        end, start = self.used + new, self.used - keep if self.used > keep else 0
        self.keys[:, :, self.used : end], self.values[:, :, self.used : end] = keys, values
        self.used = end
        return self.keys[:, :, start:end], self.values[:, :, start:end]

    @property
    def earliest(self) -> int:
        """The smallest length that `rollback` can go back to: there the window must still be whole."""
        dropped = self.length - self.used
        return dropped + self.window - 1 if dropped else 0

    def rollback(self, length: int) -> None:
        """Forgets all tokens but the first `length`; `ValueError` below `earliest`."""
        _check_rollback(length, self.earliest, self.length)
        self.used -= self.length - length
        self.length = length

    def reserve(self, capacity: int) -> None:
        """There is room for any number of tokens already."""

    def whole(self, batch: int, capacity: int) -> KeyValueCache:
        """An empty cache for `batch` rows of the same layer that forgets nothing: any length can be gone back to."""
        return WholeWindowCache(batch, self.keys.shape[1], capacity, self.keys.shape[3], self.keys, self.window)

    def select(self, rows: Int[Tensor, " kept"], start: int = 0) -> None:
        """Keeps only these rows of the batch, without their first `start` tokens, which must be padding."""
        kept = min(self.used, self.length - start)
        held = slice(self.used - kept, self.used)
        self.keys, self.values = (_shift(x[:, :, held][rows], 2 * self.window) for x in (self.keys, self.values))
        self.length, self.used = self.length - start, kept

    def _joined(self, keep: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        old = slice(self.used - keep, self.used)
        return torch.cat([self.keys[:, :, old], keys], 2), torch.cat([self.values[:, :, old], values], 2)


def _shift(held: Float[Tensor, "batch heads length head_dim"], capacity: int) -> Tensor:
    """A new buffer with room for `capacity` tokens that begins with the ones held."""
    batch, heads, length, head_dim = held.shape
    buffer = held.new_empty(batch, heads, capacity, head_dim)
    buffer[:, :, :length] = held
    return buffer


def _check_rollback(length: int, earliest: int, latest: int) -> None:
    if not earliest <= length <= latest:
        raise ValueError(
            f"The cache can go back to between {earliest} and {latest} tokens, not to {length}: fill a new one."
        )


Cache = KeyValueCache | WindowCache

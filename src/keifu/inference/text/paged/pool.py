"""Pool of keys and values of an engine, and the states of fixed size of its sequences."""

import math
import mmap
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.inference.text.paged.fixed_states import FixedStates
from keifu.layers.attention.kv_cache import KVState


class Pool:
    """Keys and values of all layers, [heads, tokens, head_dim] each.

    On a CPU memory is reserved for all tokens, and the system provides it at the first write. On other devices it grows
    layer by layer when needed.

    joined: whether the keys and values of a token are one row, [1, tokens, 2 · heads · head_dim], so that one kernel
    writes them and one reads them. Such a pool has one more token, at index `capacity`, for writes of padding.

    n_states: number of states of fixed size that are kept for other sequences.
    """

    def __init__(self, empty: KVState, tokens: int, joined: bool = False, n_states: int = 0):
        self.device, self.token_bytes, self.joined, self._tokens = empty.device, empty.token_bytes, joined, tokens
        lazy = self.device.type == "cpu"
        make = _lazy_zeros if lazy else Tensor.new_zeros
        tokens = tokens if lazy else 0
        if joined:
            pairs = zip(empty.keys, empty.values, strict=True)
            self.keys = [make(k, (1, tokens, k.shape[1] * k.shape[3] + v.shape[1] * v.shape[3])) for k, v in pairs]
            self.values: list[Tensor] = []
        else:
            self.keys, self.values = (
                [make(x, (x.shape[1], tokens, x.shape[3])) for x in kept] for kept in (empty.keys, empty.values)
            )
        self.states = FixedStates([x.shape[1] for x in empty.fixed], self.device, make, n_states)

    @property
    def capacity(self) -> int:
        """Number of tokens that fit into the allocated memory."""
        return self.keys[0].shape[1] - self.joined

    def reserve(self, tokens: int) -> None:
        """Allocate memory for this number of tokens, at least twice as much as before."""
        if tokens <= self.capacity:
            return
        grown = min(self._tokens, max(tokens, 2 * self.capacity)) + self.joined
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                tensors[index] = old.new_zeros(old.shape[0], grown, old.shape[2])
                tensors[index][:, : old.shape[1]] = old

    def copy(self, sources: Sequence[int], blocks: Sequence[int], size: int) -> None:
        """Copy whole blocks. sources, blocks: their numbers. size: tokens of a block."""
        start, into = self._slots(sources, size), self._slots(blocks, size)
        for x in (*self.keys, *self.values):
            x.index_copy_(1, into, x.index_select(1, start))

    def read(self, blocks: Sequence[int], size: int) -> dict[str, Float[Tensor, "blocks heads size head_dim"]]:
        """Return copies of whole blocks on the CPU, by the name of each layer's keys or values."""
        self.reserve(size * (1 + max(blocks)))
        slots = self._slots(blocks, size)
        parts = {name: x.index_select(1, slots).unflatten(1, (-1, size)) for name, x in self._named().items()}
        return {name: part.transpose(0, 1).contiguous().cpu() for name, part in parts.items()}

    def write(self, blocks: Sequence[int], tensors: Mapping[str, Tensor], size: int) -> None:
        """Copy the tensors of `read` into these blocks."""
        self.reserve(size * (1 + max(blocks)))
        slots = self._slots(blocks, size)
        for name, x in self._named().items():
            x.index_copy_(1, slots, tensors[name].transpose(0, 1).flatten(1, 2).to(self.device))

    def _named(self) -> dict[str, Tensor]:
        """Return the tensors of all layers by name."""
        kinds = {"keys": self.keys, "values": self.values}
        return {f"{kind}.{index}": x for kind, tensors in kinds.items() for index, x in enumerate(tensors)}

    def _slots(self, blocks: Sequence[int], size: int) -> Int[Tensor, " tokens"]:
        """Return the positions of the tokens of whole blocks in the pool."""
        slots = torch.tensor(blocks, device="cpu")[:, None] * size + torch.arange(size, device="cpu")
        return slots.flatten().to(self.device)


def _lazy_zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return zeros in separate memory, which the system provides page by page at the first write."""
    size = math.prod(shape) * like.element_size()
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size].view(like.dtype).view(shape)

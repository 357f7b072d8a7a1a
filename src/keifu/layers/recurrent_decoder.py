"""Recurrent decoders, by what each has of its source at a step: attention, a fixed context, or nothing; knows no model.

Axes: batch, length = steps, in_dim = what a step reads, dim = a state, seen = tokens of the source, width = a source
token's state.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.layers.additive_attention import AdditiveAttention, Memory, attend
from keifu.layers.linear import Linear
from keifu.layers.recurrent import GRU, Reading


class Steps(NamedTuple):
    """What some steps came to: the state before each and after each, and what of the source each had.

    `context` is empty or one tensor [batch, length, width]; `weights` are the shares of the source's tokens in it.
    """

    before: Float[Tensor, "batch length dim"]
    after: Float[Tensor, "batch length dim"]
    context: tuple[Tensor, ...] = ()
    weights: Float[Tensor, "batch length seen"] | None = None


class Context(NamedTuple):
    """One vector for the whole source, and its product in a step."""

    vector: Float[Tensor, "batch width"]
    product: Float[Tensor, "batch gates"]


class DecoderState:
    """What a decoder goes by: the source, the state after the tokens so far, and how many they are.

    `capacity`, if given, is the most tokens that it takes; without it nothing is kept of what it reads.
    """

    def __init__(self, memory: Any, hidden: Float[Tensor, "batch dim"], capacity: int | None = None):
        self.memory, self.hidden, self.capacity, self.length = memory, hidden, capacity, 0
        self._owners = torch.arange(len(hidden), device=hidden.device)  # of each row, its source's place

    def advance(self, hidden: Float[Tensor, "batch dim"], length: int) -> None:
        """Goes on to the state after `length` more tokens, where there is a capacity."""
        if self.capacity is None:
            return
        if self.length + length > self.capacity:
            taken = self.length + length
            raise ValueError(f"The state has room for {self.capacity} tokens and was given {taken}; make a larger one.")
        self.hidden, self.length = hidden, self.length + length

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keeps these rows, in this order, in place; a row may be named several times.

        The source is left as it lies where every row goes on with the same one, as beams mostly do.
        """
        self.hidden, owners = self.hidden[rows], self._owners[rows]
        if not torch.equal(owners, self._owners):
            self.memory = type(self.memory)(*(tensor[rows] for tensor in self.memory))
            self._owners = owners


class AttentiveDecoder(nn.Module):
    """Looks at the whole source before each step (Bahdanau et al., 2014): s_i = GRU(s_{i-1}, [y_{i-1}; c_i]).

    s_0 = tanh(W_s h), where h is the last state of the direction that the encoder names last: of two, the backward one.
    """

    def __init__(self, in_dim: int, dim: int, width: int, attention_dim: int):
        super().__init__()
        self.in_dim, self.dim, self.context_dim = in_dim, dim, width
        self.first, self.gru = Linear(dim, dim), GRU(in_dim + width, dim)
        self.attention = AdditiveAttention(dim, width, attention_dim)

    def start(self, reading: Reading) -> tuple[Memory, Float[Tensor, "batch dim"]]:
        """The source as the steps look at it, and the state before the first."""
        memory = self.attention.memory(reading, self.gru.input.weight[:, self.in_dim :])
        return memory, self.first(reading.ends[:, -self.dim :]).tanh()

    def forward(
        self, x: Float[Tensor, "batch length in_dim"], memory: Memory, state: Float[Tensor, "batch dim"]
    ) -> Steps:
        products = F.linear(x.transpose(0, 1), self.gru.input.weight[:, : self.in_dim], self.gru.input.bias)
        states, weights = attend(products, memory, self.attention, self.gru.recurrent, state)
        states, weights = states.transpose(0, 1), weights.transpose(0, 1)
        return Steps(states[:, :-1], states[:, 1:], (weights @ memory.states.to(weights.dtype),), weights)


class FixedContextDecoder(nn.Module):
    """Has the encoder's last states at every step, the same whatever is written (Cho et al., 2014).

    Everything else is as in `AttentiveDecoder`, so that the two differ in attention alone.
    """

    def __init__(self, in_dim: int, dim: int, width: int):
        super().__init__()
        self.in_dim, self.dim, self.context_dim = in_dim, dim, width
        self.first, self.gru = Linear(dim, dim), GRU(in_dim + width, dim)

    def start(self, reading: Reading) -> tuple[Context, Float[Tensor, "batch dim"]]:
        """The source as the steps have it, and the state before the first."""
        product = F.linear(reading.ends, self.gru.input.weight[:, self.in_dim :], self.gru.input.bias)
        return Context(reading.ends, product), self.first(reading.ends[:, -self.dim :]).tanh()

    def forward(
        self, x: Float[Tensor, "batch length in_dim"], memory: Context, state: Float[Tensor, "batch dim"]
    ) -> Steps:
        products = F.linear(x.transpose(0, 1), self.gru.input.weight[:, : self.in_dim]) + memory.product
        before, after = _around(self.gru, products, state)
        return Steps(before, after, (memory.vector[:, None].expand(-1, x.shape[1], -1),))


class PlainDecoder(nn.Module):
    """Has nothing of the source but its first state, which is the encoder's last (Sutskever et al., 2014)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.dim, self.context_dim, self.gru = dim, 0, GRU(in_dim, dim)

    def start(self, reading: Reading) -> tuple[tuple[()], Float[Tensor, "batch dim"]]:
        """Nothing, and the state before the first step."""
        return (), reading.ends[:, -self.dim :]

    def forward(
        self, x: Float[Tensor, "batch length in_dim"], memory: tuple[()], state: Float[Tensor, "batch dim"]
    ) -> Steps:
        return Steps(*_around(self.gru, self.gru.input(x.transpose(0, 1)), state))


def _around(
    gru: GRU, products: Float[Tensor, "length batch gates"], state: Float[Tensor, "batch dim"]
) -> tuple[Float[Tensor, "batch length dim"], Float[Tensor, "batch length dim"]]:
    """The states before each step and after each."""
    after = gru(products, state)
    before = torch.cat([state.to(after.dtype)[None], after[:-1]])
    return before.transpose(0, 1), after.transpose(0, 1)

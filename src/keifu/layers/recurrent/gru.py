"""Gated recurrent units (GRU; Cho et al., 2014) over whole sequences, and encoders made of them.

The gates are torch.nn.GRU's: h' = (1 - z) · n + z · h. r is applied after the recurrent product, n = tanh(W x + b + r ·
(U h + c)), so that weights can be copied from and to torch. Cho and Bahdanau write h' = (1 - z) · h + z · n, whose z is
1 - z here (the same network with W_z, U_z and b_z negated). They apply r before the product, n = tanh(W x + U (r · h)).
This is another network of the same size: it needs a second product in every step, which has to wait for r.

Axes: batch, length = tokens, dim = a state, gates = 3 dim (reset, update, new), directions = directions of reading,
`...` = axes of a step other than the last. Tensors that the recurrence runs over have the length first.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.linear import JoinedLinear, product_dtype


class RecurrentTape(NamedTuple):
    """Record of every step of a recurrence. `states` begins with the state before the first step.

    gates: reset and update. new: the proposed state. before_reset: its recurrent part before the reset gate.
    """

    states: Float[Tensor, "steps ... dim"]
    gates: Float[Tensor, "length ... two_dim"]
    new: Float[Tensor, "length ... dim"]
    before_reset: Float[Tensor, "length ... dim"]

    @classmethod
    def empty(cls, length: int, state: Float[Tensor, "... dim"]) -> "RecurrentTape":
        """Allocate a tape for `length` steps that begin at `state`."""
        *batch, dim = state.shape
        sizes = (length + 1, dim), (length, 2 * dim), (length, dim), (length, dim)
        tape = cls(*(state.new_empty(steps, *batch, width) for steps, width in sizes))
        tape.states[0] = state
        return tape

    def advance(self, step: int, x: Float[Tensor, "... gates"], product: Float[Tensor, "... gates"]) -> None:
        """Write the state after `step`. x: product of the inputs. product: recurrent product of the state before."""
        dim = self.new.shape[-1]
        gates = torch.add(x[..., : 2 * dim], product[..., : 2 * dim], out=self.gates[step]).sigmoid_()
        reset, update = gates.chunk(2, -1)
        before = self.before_reset[step].copy_(product[..., 2 * dim :])
        new = torch.addcmul(x[..., 2 * dim :], reset, before, out=self.new[step]).tanh_()
        torch.lerp(new, self.states[step], update, out=self.states[step + 1])

    def slopes(self) -> tuple[Float[Tensor, "length ... 3 dim"], Float[Tensor, "length ... 3 dim"]]:
        """Return the derivatives of each new state with respect to the product of the inputs, and to the recurrent
        product, for each gate."""
        reset, update = self.gates.chunk(2, -1)
        new = (1 - update) * (1 - self.new.square())
        update = (self.states[:-1] - self.new) * update * (1 - update)
        through_reset = new * self.before_reset * reset * (1 - reset)
        return torch.stack([through_reset, update, new], -2), torch.stack([through_reset, update, new * reset], -2)


class _Recurrence(torch.autograd.Function):
    """Recurrence with its own backward pass: only the states' gradients are computed step by step. The weights'
    gradients need one matrix multiplication at the end."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, dtype: torch.dtype) -> Tensor:
        low, low_bias, tape = weight.to(dtype), bias.to(dtype)[:, None], RecurrentTape.empty(len(x), state)
        with torch.autocast(x.device.type, enabled=False):
            for step in range(len(x)):
                tape.advance(step, x[step], torch.baddbmm(low_bias, tape.states[step].to(dtype), low.mT))
        ctx.save_for_backward(low, *tape)
        return tape.states[1:]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        low, *stored = ctx.saved_tensors
        tape = RecurrentTape(*stored)
        (length, directions, batch, dim), update = tape.new.shape, tape.gates.chunk(2, -1)[1]
        to_input, to_product = tape.slopes()
        d_states, d_products = torch.empty_like(tape.new), torch.empty_like(to_product)
        carried = torch.zeros_like(tape.new[0])
        for step in reversed(range(length)):
            d_state = torch.add(upstream[0][step], carried, out=d_states[step])
            d_product = torch.mul(to_product[step], d_state.unsqueeze(-2), out=d_products[step]).flatten(-2)
            carried = (d_state * update[step]).add_(torch.bmm(d_product.to(low.dtype), low))
        d_x = to_input.mul_(d_states.unsqueeze(-2)).flatten(-2)
        rows = d_products.flatten(-2).transpose(0, 1).reshape(directions, length * batch, -1)
        before = tape.states[:-1].transpose(0, 1).reshape(directions, length * batch, dim)
        d_weight = torch.bmm(rows.to(low.dtype).mT, before.to(low.dtype)).to(rows.dtype)
        return d_x, d_weight, rows.sum(1), carried, None


def recur(
    x: Float[Tensor, "length directions batch gates"],
    layers: Sequence[nn.Linear],
    state: Float[Tensor, "directions batch dim"],
) -> Float[Tensor, "length directions batch dim"]:
    """Return the states after each step, for several directions at once.

    x: the products of the inputs, with bias. layers: the recurrent layer of each direction.
    """
    weight = torch.stack([layer.weight for layer in layers])
    bias = torch.stack([layer.bias for layer in layers])
    states = _Recurrence.apply(x.to(weight.dtype), weight, bias, state.to(weight.dtype), product_dtype(weight))
    assert isinstance(states, Tensor)
    return states


class GRU(nn.Module):
    """One gated recurrent layer in one direction. Weights and gates are as in torch.nn.GRU (see the top of this
    file)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.dim = dim
        self.input, self.recurrent = JoinedLinear(in_dim, (dim,) * 3), JoinedLinear(dim, (dim,) * 3)

    def forward(
        self, products: Float[Tensor, "length batch gates"], state: Float[Tensor, "batch dim"]
    ) -> Float[Tensor, "length batch dim"]:
        """Return the states after each step. products: the outputs of `input` for all steps."""
        return recur(products[:, None], [self.recurrent], state[None])[:, 0]


class EncoderOutput(NamedTuple):
    """An encoded source: the states at each token, and the final state of each direction, joined."""

    states: Float[Tensor, "batch length width"]
    ends: Float[Tensor, "batch width"]
    mask: Bool[Tensor, "batch length"]


class ForwardEncoder(nn.Module):
    """Encoder that reads from the first token to the last. Padding is on the right, so that no token's state depends on
    it."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.forwards, self.width = GRU(in_dim, dim), dim

    def forward(self, x: Float[Tensor, "batch length in_dim"], mask: Bool[Tensor, "batch length"]) -> EncoderOutput:
        lengths = _lengths(mask)
        ways = self.ways(x, lengths)
        products = torch.stack([gru.input(way.transpose(0, 1)) for gru, way in ways], 1)
        start = products.new_zeros(len(ways), len(x), self.forwards.dim)
        states = recur(products, [gru.recurrent for gru, _ in ways], start)
        onwards, *back = states.permute(1, 2, 0, 3)
        rows = torch.arange(len(x), device=x.device)
        ends = [states[rows, lengths - 1] for states in (onwards, *back)]
        joined = torch.cat([onwards, *(_reverse(states, lengths) for states in back)], -1)
        return EncoderOutput(joined, torch.cat(ends, -1), mask)

    def ways(self, x: Float[Tensor, "batch length in_dim"], lengths: Int[Tensor, " batch"]) -> list[tuple[GRU, Tensor]]:
        """Return the layer of each direction, and its inputs in the order of reading."""
        return [(self.forwards, x)]


class BidirectionalEncoder(ForwardEncoder):
    """Encoder that reads in both directions (Schuster and Paliwal, 1997). A token's state joins both directions'
    states.

    The backward direction reads each row's real tokens in reverse order, so that padding is last for it too.
    """

    def __init__(self, in_dim: int, dim: int):
        super().__init__(in_dim, dim)
        self.backwards, self.width = GRU(in_dim, dim), 2 * dim

    def ways(self, x: Float[Tensor, "batch length in_dim"], lengths: Int[Tensor, " batch"]) -> list[tuple[GRU, Tensor]]:
        """Add the backward direction, with reversed inputs."""
        return [*super().ways(x, lengths), (self.backwards, _reverse(x, lengths))]


ENCODERS = {"forward": ForwardEncoder, "bidirectional": BidirectionalEncoder}


EMPTY = "A source has no token: leave out empty ones, or end each with the token that ends a text."


def _lengths(mask: Bool[Tensor, "batch length"]) -> Int[Tensor, " batch"]:
    lengths = mask.sum(-1)
    if lengths.device.type in ("cpu", "mps"):  # mps has no asynchronous check
        if not bool(lengths.all()):
            raise UserError(EMPTY)
    else:
        torch.ops.aten._assert_async.msg(lengths.all(), EMPTY)
    return lengths


def _reverse(x: Float[Tensor, "batch length dim"], lengths: Int[Tensor, " batch"]) -> Float[Tensor, "batch length dim"]:
    """Reverse the first `lengths` positions of each row; padding stays. The function is its own inverse."""
    positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    turned = torch.where(positions < lengths[:, None], lengths[:, None] - 1 - positions, positions)
    return x.gather(1, turned[..., None].expand_as(x))

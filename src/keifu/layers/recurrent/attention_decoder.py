"""Recurrent decoders of encoder-decoders: with additive attention, with a fixed context, or without a source.

Additive attention (Bahdanau et al., 2014): score(s, h_j) = v · tanh(W_a s + U_a h_j), a softmax α over j, and the
context c = Σ α_j h_j; the state s is the one before the step. What does not depend on the state is computed once:
U_a h_j, and W_c h_j, whose mean by α is the W_c c that a step needs.

Axes: batch, length = steps, in_dim = inputs of a step, seen = tokens of the source, dim = a state, gates = 3 dim,
width = a source token's state, attention_dim.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.layers.linear import JoinedLinear, Linear, linear
from keifu.layers.recurrent.gru import GRU, EncoderOutput, RecurrentTape, product_type

Vector = Float[Tensor, "batch dim"]
Hidden = Float[Tensor, "batch length dim"]
Inputs = Float[Tensor, "batch length in_dim"]


class EncoderStates(NamedTuple):
    """A source as the decoder looks at it: `keys` are U_a h_j, `products` are W_c h_j, `hidden` is 0 or -inf."""

    keys: Float[Tensor, "batch seen attention_dim"]
    products: Float[Tensor, "batch seen gates"]
    states: Float[Tensor, "batch seen width"]
    hidden: Float[Tensor, "batch seen"]


class _AttentiveRecurrence(torch.autograd.Function):
    """The states, and the weights on the source, of all steps. `weight` joins W_a and the recurrent matrices.

    As in `keifu.layers.recurrent.gru`, gradients of weights and of the source are single products after the last step.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keys: Tensor, products: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, v: Tensor,
        state: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (length, batch, _), (seen, width) = x.shape, keys.shape[1:]
        low, low_bias, tape = weight.to(dtype).mT, bias.to(dtype), RecurrentTape.empty(length, state)
        features, weights = keys.new_empty(length, batch, seen, width), keys.new_empty(length, batch, seen)
        with torch.autocast(x.device.type, enabled=False):
            for step in range(length):
                joined = torch.addmm(low_bias, tape.states[step].to(dtype), low)
                torch.add(keys, joined[:, None, :width], out=features[step]).tanh_()
                scores = torch.addmv(hidden.flatten(), features[step].flatten(0, 1), v).view(batch, seen)
                torch.softmax(scores, -1, out=weights[step])
                given = torch.baddbmm(x[step, :, None], weights[step, :, None], products)[:, 0]
                tape.advance(step, given, joined[:, width:])
        ctx.save_for_backward(low, v, products, features, weights, *tape)
        return tape.states, weights

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        low, v, products, features, weights, *kept = ctx.saved_tensors
        tape, (d_outputs, d_weights) = RecurrentTape(*kept), upstream
        (length, batch, dim), width, update = tape.new.shape, len(v), tape.gates.chunk(2, -1)[1]
        d_joined, d_scores = v.new_empty(length, batch, width + 3 * dim), torch.empty_like(weights)
        (to_input, to_product), d_keys = tape.slopes(), torch.zeros_like(features[0])
        d_x, one, carried = torch.empty_like(to_input), v.new_ones(()), torch.zeros_like(tape.new[0])
        for step in reversed(range(length)):
            d_state = carried + d_outputs[step + 1]
            torch.mul(to_product[step], d_state[:, None], out=d_joined[step, :, width:].unflatten(-1, (3, dim)))
            given = torch.mul(to_input[step], d_state[:, None], out=d_x[step]).flatten(1)
            d_weight = torch.baddbmm(d_weights[step, :, :, None], products, given[:, :, None])[:, :, 0]
            share = d_weight.mul_(weights[step])
            score = torch.addcmul(share, weights[step], share.sum(-1, keepdim=True), value=-1, out=d_scores[step])
            slopes = torch.addcmul(one, features[step], features[step], value=-1)
            torch.mul(torch.bmm(score[:, None], slopes)[:, 0], v, out=d_joined[step, :, :width])
            d_keys.addcmul_(slopes, score[:, :, None])
            carried = torch.mm(d_joined[step].to(low.dtype), low.mT).to(v.dtype).addcmul_(d_state, update[step])
        d_x, rows, before = d_x.flatten(2), d_joined.flatten(0, 1), tape.states[:-1].flatten(0, 1)
        d_weight = torch.mm(rows.to(low.dtype).T, before.to(low.dtype)).to(v.dtype)
        d_products = torch.bmm(weights.permute(1, 2, 0), d_x.transpose(0, 1))
        d_v = features.flatten(0, 2).T @ d_scores.flatten()
        carried = carried + d_outputs[0]
        return d_x, d_keys * v, d_products, None, d_weight, rows.sum(0), d_v, carried, None


class AdditiveAttention(nn.Module):
    """The alignment model a(s, h_j) = v · tanh(W_a s + U_a h_j) (section A.1.2)."""

    def __init__(self, dim: int, width: int, attention_dim: int):
        super().__init__()
        self.query, self.key = Linear(dim, attention_dim, bias=False), Linear(width, attention_dim, bias=False)
        self.v = nn.Parameter(torch.zeros(attention_dim))

    def memory(self, reading: EncoderOutput, context_weight: Float[Tensor, "gates width"]) -> EncoderStates:
        """Prepare the part of a source that serves every step. `context_weight` is what the context is multiplied by in
        a step."""
        keys, products = self.key(reading.states), linear(reading.states, context_weight)
        hidden = torch.where(reading.mask, 0.0, -torch.inf).to(self.v)
        return EncoderStates(keys, products, reading.states, hidden)

    def forward(
        self, x: Float[Tensor, "length batch gates"], memory: EncoderStates, recurrent: JoinedLinear, state: Vector
    ) -> tuple[Float[Tensor, "steps batch dim"], Float[Tensor, "length batch seen"]]:
        """Return the states, from the given one to that after the last step, and each step's weights on the source.

        `x`: inputs of each step without the context, times their matrix, with the bias.
        """
        weight = torch.cat([self.query.weight, recurrent.weight])
        bias = torch.cat([torch.zeros_like(self.v), recurrent.bias])
        made = x, memory.keys, memory.products, memory.hidden, weight, bias, self.v, state
        states, weights = _AttentiveRecurrence.apply(
            *(tensor.to(self.v.dtype) for tensor in made), product_type(self.v)
        )
        return states, weights


class DecoderSteps(NamedTuple):
    """Result of some steps: the state before and after each step, and its context from the source.

    `context` is empty or one tensor [batch, length, width]; `weights` are the shares of the source's tokens in it.
    """

    before: Hidden
    after: Hidden
    context: tuple[Tensor, ...] = ()
    weights: Float[Tensor, "batch length seen"] | None = None


class Context(NamedTuple):
    """One vector for the whole source, and its product in a step."""

    vector: Float[Tensor, "batch width"]
    product: Float[Tensor, "batch gates"]


class DecoderState:
    """State of a decoder: the source, the state after the tokens so far, and how many they are.

    `capacity`, if given, is the most tokens that it takes; without it nothing is kept of what it reads.
    """

    def __init__(self, memory: Any, hidden: Vector, capacity: int | None = None):
        self.memory, self.hidden, self.capacity, self.length = memory, hidden, capacity, 0
        self._owners = torch.arange(len(hidden), device="cpu")  # of each row, its source's place

    def advance(self, hidden: Vector, length: int) -> None:
        """Advance to the state after `length` more tokens, if there is a capacity."""
        if self.capacity is None:
            return
        if self.length + length > self.capacity:
            taken = self.length + length
            raise ValueError(f"The state has room for {self.capacity} tokens and was given {taken}; make a larger one.")
        self.hidden, self.length = hidden, self.length + length

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows, in this order, in place; a row may be named several times.

        The source is left as it lies where every row goes on with the same one, as beams mostly do.
        """
        chosen, owners = rows.to(self.hidden.device), self._owners[rows.cpu()]
        self.hidden = self.hidden[chosen]
        if not torch.equal(owners, self._owners):
            self.memory = type(self.memory)(*(tensor[chosen] for tensor in self.memory))
            self._owners = owners


class AttentiveDecoder(nn.Module):
    """Decoder that sees the whole source before each step (Bahdanau et al., 2014): s_i = GRU(s_{i-1}, [y_{i-1}; c_i]).

    s_0 = tanh(W_s h), where h is the last state of the direction that the encoder names last: of two, the backward one.
    """

    def __init__(self, in_dim: int, dim: int, width: int, attention_dim: int):
        super().__init__()
        self.in_dim, self.dim, self.context_dim = in_dim, dim, width
        self.first, self.gru = Linear(dim, dim), GRU(in_dim + width, dim)
        self.attention = AdditiveAttention(dim, width, attention_dim)

    def start(self, reading: EncoderOutput) -> tuple[EncoderStates, Vector]:
        """Return the source as the steps look at it, and the state before the first."""
        memory = self.attention.memory(reading, self.gru.input.weight[:, self.in_dim :])
        return memory, self.first(reading.ends[:, -self.dim :]).tanh()

    def forward(self, x: Inputs, memory: EncoderStates, state: Vector) -> DecoderSteps:
        products = linear(x.transpose(0, 1), self.gru.input.weight[:, : self.in_dim], self.gru.input.bias)
        states, weights = self.attention(products, memory, self.gru.recurrent, state)
        states, weights = states.transpose(0, 1), weights.transpose(0, 1)
        return DecoderSteps(states[:, :-1], states[:, 1:], (weights @ memory.states.to(weights.dtype),), weights)


class FixedContextDecoder(nn.Module):
    """Decoder with the encoder's last states at every step, the same whatever is written (Cho et al., 2014).

    Everything else is as in `AttentiveDecoder`, so that the two differ in attention alone.
    """

    def __init__(self, in_dim: int, dim: int, width: int):
        super().__init__()
        self.in_dim, self.dim, self.context_dim = in_dim, dim, width
        self.first, self.gru = Linear(dim, dim), GRU(in_dim + width, dim)

    def start(self, reading: EncoderOutput) -> tuple[Context, Vector]:
        """Return the source as the steps have it, and the state before the first."""
        product = linear(reading.ends, self.gru.input.weight[:, self.in_dim :], self.gru.input.bias)
        return Context(reading.ends, product), self.first(reading.ends[:, -self.dim :]).tanh()

    def forward(self, x: Inputs, memory: Context, state: Vector) -> DecoderSteps:
        products = linear(x.transpose(0, 1), self.gru.input.weight[:, : self.in_dim]) + memory.product
        before, after = _around(self.gru, products, state)
        return DecoderSteps(before, after, (memory.vector[:, None].expand(-1, x.shape[1], -1),))


class PlainDecoder(nn.Module):
    """Decoder with nothing of the source but its first state, the encoder's last (Sutskever et al., 2014)."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.dim, self.context_dim, self.gru = dim, 0, GRU(in_dim, dim)

    def start(self, reading: EncoderOutput) -> tuple[tuple[()], Vector]:
        """Return no memory, and the state before the first step."""
        return (), reading.ends[:, -self.dim :]

    def forward(self, x: Inputs, memory: tuple[()], state: Vector) -> DecoderSteps:
        return DecoderSteps(*_around(self.gru, self.gru.input(x.transpose(0, 1)), state))


def _around(gru: GRU, products: Float[Tensor, "length batch gates"], state: Vector) -> tuple[Hidden, Hidden]:
    """Return the states before each step and after each."""
    after = gru(products, state)
    before = torch.cat([state.to(after.dtype)[None], after[:-1]])
    return before.transpose(0, 1), after.transpose(0, 1)

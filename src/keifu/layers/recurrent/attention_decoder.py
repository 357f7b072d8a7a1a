"""Recurrent decoders of encoder-decoders: with additive attention, with a fixed context, or without a context.

Additive attention (Bahdanau et al., 2014): score(s, h_j) = v · tanh(W_a s + U_a h_j), a softmax α over j, and the
context c = Σ α_j h_j, where s is the state before the step. U_a h_j and W_c h_j do not depend on s and are computed
once per source. A step then computes W_c c as Σ α_j W_c h_j.

Axes: batch, length = steps, in_dim = inputs of a step, seen = tokens of the source, dim = a state, gates = 3 dim, width
= a source token's state, attention_dim.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.layers.linear import JoinedLinear, Linear, linear, product_dtype
from keifu.layers.recurrent.gru import GRU, EncoderOutput, RecurrentTape

Vector = Float[Tensor, "batch dim"]
Hidden = Float[Tensor, "batch length dim"]
Inputs = Float[Tensor, "batch length in_dim"]


class EncoderStates(NamedTuple):
    """A source, prepared for the decoder. keys: U_a h_j. products: W_c h_j. hidden: 0, or -inf on padding."""

    keys: Float[Tensor, "batch seen attention_dim"]
    products: Float[Tensor, "batch seen gates"]
    states: Float[Tensor, "batch seen width"]
    hidden: Float[Tensor, "batch seen"]


class _AttentiveRecurrence(torch.autograd.Function):
    """The states, and the weights on the source, of all steps. `weight` joins W_a and the recurrent matrices.

    As in `keifu.layers.recurrent.gru`, the gradients of weights and of the source are computed in single matrix
    multiplications after the last step.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keys: Tensor, products: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, v: Tensor,
        state: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (length, batch, _), (source_length, width) = x.shape, keys.shape[1:]
        low, low_bias, tape = weight.to(dtype).mT, bias.to(dtype), RecurrentTape.empty(length, state)
        features, weights = (
            keys.new_empty(length, batch, source_length, width),
            keys.new_empty(length, batch, source_length),
        )
        with torch.autocast(x.device.type, enabled=False):
            for step in range(length):
                joined = torch.addmm(low_bias, tape.states[step].to(dtype), low)
                torch.add(keys, joined[:, None, :width], out=features[step]).tanh_()
                scores = torch.addmv(hidden.flatten(), features[step].flatten(0, 1), v).view(batch, source_length)
                torch.softmax(scores, -1, out=weights[step])
                inputs = torch.baddbmm(x[step, :, None], weights[step, :, None], products)[:, 0]
                tape.advance(step, inputs, joined[:, width:])
        ctx.save_for_backward(low, v, products, features, weights, *tape)
        return tape.states, weights

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        low, v, products, features, weights, *stored = ctx.saved_tensors
        tape, (d_outputs, d_weights) = RecurrentTape(*stored), upstream
        (length, batch, dim), width, update = tape.new.shape, len(v), tape.gates.chunk(2, -1)[1]
        d_joined, d_scores = v.new_empty(length, batch, width + 3 * dim), torch.empty_like(weights)
        (to_input, to_product), d_keys = tape.slopes(), torch.zeros_like(features[0])
        d_x, one, carried = torch.empty_like(to_input), v.new_ones(()), torch.zeros_like(tape.new[0])
        for step in reversed(range(length)):
            d_state = carried + d_outputs[step + 1]
            torch.mul(to_product[step], d_state[:, None], out=d_joined[step, :, width:].unflatten(-1, (3, dim)))
            inputs = torch.mul(to_input[step], d_state[:, None], out=d_x[step]).flatten(1)
            d_weight = torch.baddbmm(d_weights[step, :, :, None], products, inputs[:, :, None])[:, :, 0]
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
        """Precompute the products with a source that all steps use. context_weight: the matrix that multiplies the
        context."""
        keys, products = self.key(reading.states), linear(reading.states, context_weight)
        hidden = torch.where(reading.mask, 0.0, -torch.inf).to(self.v)
        return EncoderStates(keys, products, reading.states, hidden)

    def forward(
        self, x: Float[Tensor, "length batch gates"], memory: EncoderStates, recurrent: JoinedLinear, state: Vector
    ) -> tuple[Float[Tensor, "steps batch dim"], Float[Tensor, "length batch seen"]]:
        """Return all states, including the given one, and each step's weights on the source.

        x: each step's inputs without the context, already multiplied with their matrix, with the bias.
        """
        weight = torch.cat([self.query.weight, recurrent.weight])
        bias = torch.cat([torch.zeros_like(self.v), recurrent.bias])
        arguments = x, memory.keys, memory.products, memory.hidden, weight, bias, self.v, state
        states, weights = _AttentiveRecurrence.apply(
            *(tensor.to(self.v.dtype) for tensor in arguments), product_dtype(self.v)
        )
        return states, weights


class DecoderSteps(NamedTuple):
    """Result of some steps: the state before and after each step, and its context from the source.

    context: empty, or one tensor (batch, length, width). weights: of the source's tokens in the context.
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
    """State of a decoder: the source, the state after the tokens so far, and their number.

    capacity: the most tokens; None does not store the state.
    """

    def __init__(self, memory: Any, hidden: Vector, capacity: int | None = None):
        self.memory, self.hidden, self.capacity, self.length = memory, hidden, capacity, 0
        self._owners = torch.arange(len(hidden), device="cpu")  # index of each row's source

    def advance(self, hidden: Vector, length: int) -> None:
        """Store the state after `length` more tokens, if there is a capacity. Raises ValueError if it is exceeded."""
        if self.capacity is None:
            return
        if self.length + length > self.capacity:
            new_length = self.length + length
            raise ValueError(
                f"The state has room for {self.capacity} tokens and was given {new_length}; make a larger one."
            )
        self.hidden, self.length = hidden, self.length + length

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows, in this order. A row may be repeated.

        The source is copied only if a row's source changes, which is rare in beam search.
        """
        indices, owners = rows.to(self.hidden.device), self._owners[rows.cpu()]
        self.hidden = self.hidden[indices]
        if not torch.equal(owners, self._owners):
            self.memory = type(self.memory)(*(tensor[indices] for tensor in self.memory))
            self._owners = owners


class AttentiveDecoder(nn.Module):
    """Decoder that attends to the whole source before each step (Bahdanau et al., 2014): s_i = GRU(s_{i-1}, [y_{i-1};
    c_i]).

    s_0 = tanh(W_s h), where h is the final state of the encoder's last direction: the backward one, if there are two.
    """

    def __init__(self, in_dim: int, dim: int, width: int, attention_dim: int):
        super().__init__()
        self.in_dim, self.dim, self.context_dim = in_dim, dim, width
        self.first, self.gru = Linear(dim, dim), GRU(in_dim + width, dim)
        self.attention = AdditiveAttention(dim, width, attention_dim)

    def start(self, reading: EncoderOutput) -> tuple[EncoderStates, Vector]:
        """Return the prepared source, and the state before the first step."""
        memory = self.attention.memory(reading, self.gru.input.weight[:, self.in_dim :])
        return memory, self.first(reading.ends[:, -self.dim :]).tanh()

    def forward(self, x: Inputs, memory: EncoderStates, state: Vector) -> DecoderSteps:
        products = linear(x.transpose(0, 1), self.gru.input.weight[:, : self.in_dim], self.gru.input.bias)
        states, weights = self.attention(products, memory, self.gru.recurrent, state)
        states, weights = states.transpose(0, 1), weights.transpose(0, 1)
        return DecoderSteps(states[:, :-1], states[:, 1:], (weights @ memory.states.to(weights.dtype),), weights)


class FixedContextDecoder(nn.Module):
    """Decoder whose context at every step is the encoder's final states (Cho et al., 2014).

    Everything else is as in `AttentiveDecoder`, so that the two differ only in attention.
    """

    def __init__(self, in_dim: int, dim: int, width: int):
        super().__init__()
        self.in_dim, self.dim, self.context_dim = in_dim, dim, width
        self.first, self.gru = Linear(dim, dim), GRU(in_dim + width, dim)

    def start(self, reading: EncoderOutput) -> tuple[Context, Vector]:
        """Return the source's context, and the state before the first step."""
        product = linear(reading.ends, self.gru.input.weight[:, self.in_dim :], self.gru.input.bias)
        return Context(reading.ends, product), self.first(reading.ends[:, -self.dim :]).tanh()

    def forward(self, x: Inputs, memory: Context, state: Vector) -> DecoderSteps:
        products = linear(x.transpose(0, 1), self.gru.input.weight[:, : self.in_dim]) + memory.product
        before, after = _around(self.gru, products, state)
        return DecoderSteps(before, after, (memory.vector[:, None].expand(-1, x.shape[1], -1),))


class PlainDecoder(nn.Module):
    """Decoder whose first state is the encoder's final one; it uses nothing else of the source (Sutskever et al.,
    2014)."""

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

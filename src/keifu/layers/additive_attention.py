"""A recurrent layer that looks back at a source before every step (Bahdanau et al., 2014); knows no model.

score(s, h_j) = v · tanh(W_a s + U_a h_j), a softmax α over j, and the context c = Σ α_j h_j; the state s is the one
before the step. What needs no state is made once: U_a h_j, and W_c h_j, whose mean by α is the W_c c that a step needs.

Axes: batch, length = steps, seen = tokens of the source, dim = a state, gates = 3 dim, width = a source token's state,
attention_dim.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.layers.linear import JoinedLinear, Linear
from keifu.layers.recurrent import Reading, Tape, product_type


class Memory(NamedTuple):
    """A source as the decoder looks at it: `keys` are U_a h_j, `products` are W_c h_j, `hidden` is 0 or -inf."""

    keys: Float[Tensor, "batch seen attention_dim"]
    products: Float[Tensor, "batch seen gates"]
    states: Float[Tensor, "batch seen width"]
    hidden: Float[Tensor, "batch seen"]

    def select(self, rows: Int[Tensor, " kept"]) -> "Memory":
        """These rows, in this order."""
        return Memory(*(tensor[rows] for tensor in self))


class _AttentiveRecurrence(torch.autograd.Function):
    """The states, and the weights on the source, of all steps. `weight` joins W_a and the recurrent matrices.

    As in `keifu.layers.recurrent`, gradients of weights and of the source are single products after the last step.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, keys: Tensor, products: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, v: Tensor,
        state: Tensor, kind: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        (length, batch, _), (seen, width) = x.shape, keys.shape[1:]
        low, low_bias, tape = weight.to(kind).mT, bias.to(kind), Tape.empty(length, state)
        features, weights = keys.new_empty(length, batch, seen, width), keys.new_empty(length, batch, seen)
        with torch.autocast(x.device.type, enabled=False):
            for step in range(length):
                joined = torch.addmm(low_bias, tape.states[step].to(kind), low)
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
        tape, (d_outputs, d_weights) = Tape(*kept), upstream
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
    """The alignment model a(s, h_j) = v · tanh(W_a s + U_a h_j) (section A.1.2); the steps are taken by `attend`."""

    def __init__(self, dim: int, width: int, attention_dim: int):
        super().__init__()
        self.query, self.key = Linear(dim, attention_dim, bias=False), Linear(width, attention_dim, bias=False)
        self.v = nn.Parameter(torch.zeros(attention_dim))

    def memory(self, reading: Reading, context_weight: Float[Tensor, "gates width"]) -> Memory:
        """What of a source serves every step. `context_weight` is what the context is multiplied by in a step."""
        keys, products = self.key(reading.states), F.linear(reading.states, context_weight)
        return Memory(keys, products, reading.states, _hidden(reading.mask, self.v))


def _hidden(mask: Bool[Tensor, "batch seen"], like: Tensor) -> Float[Tensor, "batch seen"]:
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)


def attend(
    x: Float[Tensor, "length batch gates"],
    memory: Memory,
    attention: AdditiveAttention,
    recurrent: JoinedLinear,
    state: Float[Tensor, "batch dim"],
) -> tuple[Float[Tensor, "steps batch dim"], Float[Tensor, "length batch seen"]]:
    """The states, from the given one to that after the last step, and each step's weights on the source.

    `x` are the products of what a step is given beside the context, bias included.
    """
    kind, v = product_type(attention.v), attention.v
    weight = torch.cat([attention.query.weight, recurrent.weight])
    bias = torch.cat([torch.zeros_like(v), recurrent.bias])
    made = x, memory.keys, memory.products, memory.hidden, weight, bias, v, state
    states, weights = _AttentiveRecurrence.apply(*(tensor.to(v.dtype) for tensor in made), kind)
    return states, weights

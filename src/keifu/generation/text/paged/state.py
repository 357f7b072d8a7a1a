"""The state of one step of an engine: where the new tokens are, what they attend to, and how it is read from the pool.

Axes: tokens = new tokens of all sequences, heads, head_dim, seen = tokens that are attended to.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, islice, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.generation.text.paged.pool import Pool
from keifu.layers.attention.attention import Rule, Scoring, attend
from keifu.layers.attention.masks import CausalMask, RaggedMask
from keifu.layers.attention.packed import Bounds, attend_packed
from keifu.native.model import Span

SMALLEST = 256  # sizes from which on spans attend together, and in whose multiples a kernel's memory is rounded


def first_of_run(blocks: Sequence[int]) -> int | None:
    """Return the first of these blocks if they are consecutive."""
    first = blocks[0]
    return first if blocks == list(range(first, first + len(blocks))) else None


def numbers_of(spans: Sequence[Span], size: int) -> list[list[int]]:
    """Return the tokens of a step, their positions, their places in the pool, and the lengths of their sequences."""
    tokens, positions, found, lengths = list[int](), list[int](), list[int](), list[int]()
    for span in spans:
        places = range(span.start, span.start + len(span.tokens))
        tokens += span.tokens
        positions += places
        found += slots(span, places, size)
        lengths += [max(place + 1, span.prompt) for place in places]
    return [tokens, positions, found, lengths]


def slots(span: Span, places: range, size: int) -> list[int]:
    """Return the places in the pool of some positions of a sequence."""
    return [span.blocks[place // size] * size + place % size for place in places]


def on_device(lists: Sequence[Sequence[int]], device: torch.device) -> list[Int[Tensor, " length"]]:
    """Copy lists of numbers at once, without a wait on CUDA."""
    made = torch.tensor([*chain.from_iterable(lists)], dtype=torch.long, device="cpu")
    made = made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
    return [*made.split([*map(len, lists)])]


class PagedState:
    """The state of a step, as `DecoderLM` asks for it: the tokens of all groups one after the other in one row.

    wanted: places of the tokens whose logits are wanted. lists: numbers that `begin` is given on the device, where they
    go in one copy.
    """

    def __init__(self, pool: Pool, size: int, groups: Sequence[Sequence[Span]], wanted: list[int], packs: bool = False):
        self.pool = pool
        self.longest = max(span.start for group in groups for span in group)
        self._spans = [span for group in groups for span in group]
        self._slots = pool.states.begin(self._spans)
        states = [iter(slots) for slots in self._slots]
        self.groups = [(PackedGroup if packs else SpanGroup)(spans, size, pool.device) for spans in groups]
        self.lists: list[list[int]] = [*numbers_of(self._spans, size), wanted]
        for group in self.groups:
            self.lists += [*(list(islice(slots, group.count)) for slots in states), *group.lists]

    def begin(self, parts: Sequence[Tensor]) -> None:
        """Take the numbers of `lists` on the device."""
        tokens, positions, self.slots, lengths, self.wanted, *rest = parts
        self.tokens, self._positions, self.sequence_lengths = tokens[None], positions[None], lengths[None]
        own = iter(rest)
        for group, part in zip(self.groups, self.split(positions, 0), strict=True):
            group.begin(part, (next(own), next(own)), [next(own) for _ in group.lists])

    def split(self, x: Tensor, axis: int) -> tuple[Tensor, ...]:
        """Return the parts of the groups, of a tensor with an axis of all tokens."""
        return x.split([group.tokens for group in self.groups], axis)

    def positions(self, length: int, padding: Tensor | None = None) -> Int[Tensor, "1 length"]:
        """Return the position of each token in its own sequence."""
        return self._positions

    def layer(self, index: int) -> "PagedCache | PackedCache":
        if self.pool.joined:
            return PackedCache(self, self.pool.keys[index])
        return PagedCache(self, self.pool.keys[index], self.pool.values[index], self.pool.states.layer(index))

    def advance(self) -> None:
        """Keep the states of fixed size; the tokens were written when they attended."""
        self.pool.states.advance(self._spans, *self._slots)


class SpanGroup:
    """Spans of one number of tokens that attend together, and how their keys and values are read from the pool.

    lists: numbers that go to the device with the step's others; `begin` is given them there, with the positions of the
    tokens and the slots of states of fixed size before and after the step.
    """

    def __init__(self, spans: Sequence[Span], size: int, device: torch.device):
        self._starts = [span.start for span in spans]
        self.width, self.count, self._size = len(spans[0].tokens), len(spans), size
        self.first, self.last = min(self._starts), max(self._starts) + self.width
        self.tokens = self.count * self.width
        ends = [-(-(start + self.width) // size) for start in self._starts]
        tables = [list(span.blocks[:end]) for span, end in zip(spans, ends, strict=True)]
        firsts = [table[0] for table in tables]
        steps = {second - first for first, second in pairwise(firsts)}
        runs = device.type == "cpu" and all(first_of_run(table) is not None for table in tables)
        self._view = (firsts[0], steps.pop() if steps else 0) if runs and len(steps) < 2 else None
        self.lists = [] if self._view else [[*chain.from_iterable(_padded(tables))]]
        self._gathered: dict[int, Tensor] = {}

    def begin(self, positions: Int[Tensor, " tokens"], states: tuple[Tensor, Tensor], numbers: list[Tensor]) -> None:
        """Store the tensors of the step that are on the device."""
        self.states = states
        self._tables = numbers[0].view(self.count, -1) if numbers else None
        self._mask: CausalMask | RaggedMask = RaggedMask(positions.view(self.count, -1), self.last)
        if self.first == max(self._starts):
            self._mask = CausalMask(self.first, self.width, None, positions.device)

    def attend(
        self, q: Float[Tensor, "heads tokens head_dim"], keys: Tensor, values: Tensor, window: int | None,
        scoring: Scoring,
    ) -> Float[Tensor, "tokens dim"]:  # fmt: skip
        """Return the output of attention for each token, from the keys and values of the pool."""
        first = 0 if window is None else max(0, self.first - window + 1)
        visible = self._mask.visible(self.last - first, window)
        queries = q.unflatten(1, (-1, self.width)).transpose(0, 1)
        return attend(queries, self._read(keys, first), self._read(values, first), visible, scoring).flatten(0, 1)

    def _read(
        self, x: Float[Tensor, "heads tokens head_dim"], first: int
    ) -> Float[Tensor, "spans heads seen head_dim"]:
        """Return the keys or values of a layer, of the tokens from position `first` on."""
        heads, _, dim = x.shape
        if self._view:
            block, step = (number * self._size for number in self._view)
            shape, strides = (self.count, heads, self.last - first, dim), (step * dim, *x.stride())
            return x.as_strided(shape, strides, (block + first) * dim)
        return x.index_select(1, self._slots(first)).unflatten(1, (self.count, -1)).transpose(0, 1)

    def _slots(self, first: int) -> Int[Tensor, " seen"]:
        """Return the places of the tokens from position `first` on, span by span."""
        if first not in self._gathered:
            assert self._tables is not None
            places = torch.arange(first, self.last, device=self._tables.device)
            slots = self._tables[:, places // self._size] * self._size + places % self._size
            self._gathered[first] = slots.flatten()
        return self._gathered[first]


class PackedGroup(SpanGroup):
    """Spans of any numbers of tokens that attend in one kernel; their keys and values are gathered without padding.

    Sizes are rounded up, so that the next step has the same and could be replayed: what is behind the last span is not
    read.
    """

    def __init__(self, spans: Sequence[Span], size: int, device: torch.device):
        new, ends = [len(span.tokens) for span in spans], [span.start + len(span.tokens) for span in spans]
        self.count, self.tokens, self.most = len(spans), sum(new), (max(new), _rounded(max(ends)))
        seen = [slot for span, end in zip(spans, ends, strict=True) for slot in slots(span, range(end), size)]
        seen += [0] * (_rounded(len(seen)) - len(seen))
        self.lists = [[0, *accumulate(new)], [0, *accumulate(ends)], seen]

    def begin(self, positions: Int[Tensor, " tokens"], states: tuple[Tensor, Tensor], numbers: list[Tensor]) -> None:
        new, ends, self._seen = numbers
        self._bounds = Bounds(new.int(), ends.int(), *self.most)

    def attend_joined(
        self, q: Float[Tensor, "tokens heads head_dim"], pool: Float[Tensor, "1 capacity both"], window: int | None,
        scoring: Scoring,
    ) -> Float[Tensor, "tokens dim"]:  # fmt: skip
        """Return the output of attention for each token, from the joined keys and values of the pool."""
        k, v = pool.index_select(1, self._seen)[0].unflatten(-1, (2, -1, q.shape[2])).unbind(1)
        return attend_packed(q, k, v, self._bounds, window, scoring).flatten(1)


def _rounded(number: int) -> int:
    """Return the next multiple of a quarter of the power of two below a number, and of 256."""
    step = max(SMALLEST, (1 << number.bit_length()) >> 3)
    return -(-number // step) * step


def _padded(tables: Sequence[list[int]]) -> list[list[int]]:
    """Return tables of equal length: what is missing is the first block of each, which the mask hides there."""
    longest = max(map(len, tables))
    return [table + table[:1] * (longest - len(table)) for table in tables]


class DecodingState(PagedState):
    """The state of a step with one token of each sequence, padded to a power of two, so that it can be replayed.

    The tokens of the padding belong to no sequence. Their keys and values go to a place that nobody reads.
    """

    def __init__(self, pool: Pool, size: int, spans: Sequence[Span]):
        super().__init__(pool, size, [spans], [*range(len(spans))], packs=True)
        count = 1 << (len(spans) - 1).bit_length()
        self.longest = -count  # the engine keeps to the context; a check would read the device
        packed = self.groups[0]
        packed.tokens = count
        for numbers, filler in zip(self.lists, (0, 0, pool.capacity, 1, 0), strict=False):
            numbers += [filler] * (count - len(spans))
        for bounds in packed.lists[:2]:
            bounds += bounds[-1:] * (count - len(spans))

    @property
    def bucket(self) -> tuple[int, ...]:
        """Return the sizes of all that a replay has: tokens, tokens that they see, the most that one of them sees."""
        packed = self.groups[0]
        assert isinstance(packed, PackedGroup)
        return packed.tokens, len(packed.lists[2]), packed.most[1]


class PagedCache:
    """The keys and values of one layer in a step: one write for all tokens, then each group attends to its own."""

    def __init__(self, step: PagedState, keys: Tensor, values: Tensor, states: Float[Tensor, "slots numbers"]):
        self.step, self.keys, self.values, self.states = step, keys, values, states

    def attend(
        self, q: Float[Tensor, "1 heads length head_dim"], keys: Float[Tensor, "1 kv_heads length head_dim"],
        values: Float[Tensor, "1 kv_heads length head_dim"] | None, window: int | None, scoring: Scoring,
    ) -> Float[Tensor, "1 length dim"]:  # fmt: skip
        """Write the new keys and values, and return the output of attention for each token.

        Without values the keys are the values too.
        """
        self.keys.index_copy_(1, self.step.slots, keys[0].to(self.keys.dtype))
        if values is not None:
            self.values.index_copy_(1, self.step.slots, values[0].to(self.values.dtype))
        read = self.keys, self.keys if values is None else self.values
        pairs = zip(self.step.groups, self.step.split(q[0], 1), strict=True)
        outputs = [group.attend(queries, *read, window, scoring) for group, queries in pairs]
        return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None]

    def recur(self, rule: Rule, x: Float[Tensor, "1 length channels"]) -> Float[Tensor, "1 length out"]:
        """Apply `rule` to the new tokens and the states of their sequences; return its output, and write the new
        states.
        """
        outputs = []
        for group, part in zip(self.step.groups, self.step.split(x[0], 0), strict=True):
            before, after = group.states
            y, states = rule(part.unflatten(0, (group.count, -1)), self.states.index_select(0, before))
            self.states.index_copy_(0, after, states)
            outputs.append(y.flatten(0, 1))
        return torch.cat(outputs)[None]


class PackedCache:
    """The keys and values of one layer in a step, joined: one kernel writes them and one reads them."""

    def __init__(self, step: PagedState, pool: Float[Tensor, "1 capacity both"]):
        self.step, self.pool = step, pool

    def attend(
        self, q: Float[Tensor, "1 heads length head_dim"], keys: Float[Tensor, "1 kv_heads length head_dim"],
        values: Float[Tensor, "1 kv_heads length head_dim"] | None, window: int | None, scoring: Scoring,
    ) -> Float[Tensor, "1 length dim"]:  # fmt: skip
        """Write the new keys and values, and return the output of attention for each token."""
        assert values is not None
        heads = torch.cat([q, keys, values], 1).transpose(1, 2)
        return self.attend_joined(heads, q.shape[1], window, scoring)

    def attend_joined(
        self, heads: Float[Tensor, "1 length all_heads head_dim"], n_heads: int, window: int | None, scoring: Scoring
    ) -> Float[Tensor, "1 length dim"]:
        """Do the same with `n_heads` queries, the keys and the values in one tensor, in this order."""
        q, new = heads[0].split([n_heads, heads.shape[2] - n_heads], 1)
        self.pool.index_copy_(1, self.step.slots, new.flatten(1)[None])
        group = self.step.groups[0]
        assert isinstance(group, PackedGroup)
        return group.attend_joined(q, self.pool, window, scoring)[None]

    def recur(self, rule: Rule, x: Float[Tensor, "1 length channels"]) -> Float[Tensor, "1 length out"]:
        """Raise an error: a pool with states of fixed size is not joined."""
        raise NotImplementedError

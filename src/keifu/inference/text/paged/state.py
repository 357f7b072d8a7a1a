"""State of one step of an engine: positions of the new tokens, the tokens they attend to, and how keys and values are
read.

Axes: tokens = new tokens of all sequences, heads, head_dim, seen = tokens that are attended to.
"""

from collections.abc import Sequence
from itertools import accumulate, chain, islice, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.inference.text.paged.fixed_states import SpanStates, Stop
from keifu.inference.text.paged.pool import Pool
from keifu.layers.attention.attention import Rule, Scoring, attend
from keifu.layers.attention.masks import CausalMask, RaggedMask
from keifu.layers.attention.packed import Bounds, attend_packed
from keifu.native.model import Span

SMALLEST = 256  # spans that are longer attend together; sizes for a kernel are rounded up to multiples of it


def first_of_run(blocks: Sequence[int]) -> int | None:
    """Return the first of these blocks if they are consecutive."""
    first = blocks[0]
    return first if blocks == list(range(first, first + len(blocks))) else None


def numbers_of(spans: Sequence[Span], size: int) -> list[list[int]]:
    """Return the tokens of a step, their positions, their slots in the pool, and the lengths of their sequences."""
    tokens, positions, indices, lengths = list[int](), list[int](), list[int](), list[int]()
    for span in spans:
        new = range(span.start, span.start + len(span.tokens))
        tokens += span.tokens
        positions += new
        indices += slots(span, new, size)
        lengths += [max(position + 1, span.prompt) for position in new]
    return [tokens, positions, indices, lengths]


def slots(span: Span, positions: range, size: int) -> list[int]:
    """Return the slots in the pool of these positions of a sequence."""
    return [span.blocks[position // size] * size + position % size for position in positions]


def on_device(lists: Sequence[Sequence[int]], device: torch.device) -> list[Int[Tensor, " length"]]:
    """Copy lists of numbers to the device at once, on CUDA without waiting."""
    made = torch.tensor([*chain.from_iterable(lists)], dtype=torch.long, device="cpu")
    made = made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
    return [*made.split([*map(len, lists)])]


class PagedState:
    """State of a step for `DecoderLM`. The tokens of all groups are concatenated in one row.

    wanted: indices of the tokens whose logits are needed. lists: numbers that are copied to the device at once, for
    `begin`.
    """

    def __init__(self, pool: Pool, size: int, groups: Sequence[Sequence[Span]], wanted: list[int], packs: bool = False):
        self.pool = pool
        self.longest = max(span.start for group in groups for span in group)
        self._spans = [span for group in groups for span in group]
        self._states = pool.states.begin(self._spans)
        states = iter(self._states)
        self.groups = [(PackedGroup if packs else SpanGroup)(spans, size, pool.device) for spans in groups]
        self.lists: list[list[int]] = [*numbers_of(self._spans, size), wanted]
        for group in self.groups:
            group.stop_at(list(islice(states, group.count)))
            self.lists += [*group.slots, *group.lists]

    def begin(self, parts: Sequence[Tensor]) -> None:
        """Set the tensors of the step. parts: `lists` on the device."""
        tokens, positions, self.slots, lengths, self.wanted, *rest = parts
        self.tokens, self._positions, self.sequence_lengths = tokens[None], positions[None], lengths[None]
        own = iter(rest)
        for group, part in zip(self.groups, self.split(positions, 0), strict=True):
            group.states = [next(own) for _ in group.slots]
            group.begin(part, [next(own) for _ in group.lists])

    def split(self, x: Tensor, axis: int) -> tuple[Tensor, ...]:
        """Split a tensor with an axis of all tokens into the parts of the groups."""
        return x.split([group.tokens for group in self.groups], axis)

    def positions(self, length: int, padding: Tensor | None = None) -> Int[Tensor, "1 length"]:
        """Return the position of each token in its sequence."""
        return self._positions

    def layer(self, index: int) -> "PagedCache | PackedCache":
        if self.pool.joined:
            return PackedCache(self, self.pool.keys[index])
        return PagedCache(self, self.pool.keys[index], self.pool.values[index], *self.pool.states.layer(index))

    def advance(self) -> None:
        """Record the new states of fixed size. Keys and values were written during attention."""
        self.pool.states.advance(self._spans, self._states)


class SpanGroup:
    """Spans with the same number of tokens that attend together, and the way to read their keys and values from the
    pool.

    lists: numbers that are copied to the device with those of the step. `begin` gets them there, with the positions of
    the tokens. slots, states: slots of the states of fixed size, in lists and on the device: those before the step, and
    for each stop those of the sequences and the kept ones, if it has them.
    """

    stops: list[Stop]  # of the first span; those of the others are of the same kinds
    slots: list[list[int]]
    states: list[Int[Tensor, " spans"]]

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

    def stop_at(self, states: Sequence[SpanStates]) -> None:
        """Set the slots of the states before the spans and at their stops; there are none without states."""
        self.stops = states[0].stops if states else []
        self.slots = [[before for before, _ in states]] if states else []
        for stops in zip(*(stops for _, stops in states), strict=True):
            chosen = [stop.slot for stop in stops], [stop.kept for stop in stops]
            self.slots += [[slot for slot in slots if slot is not None] for slots in chosen if slots[0] is not None]

    def begin(self, positions: Int[Tensor, " tokens"], numbers: list[Tensor]) -> None:
        """Store the tensors of the step, which are on the device."""
        self._tables = numbers[0].view(self.count, -1) if numbers else None
        self._mask: CausalMask | RaggedMask = RaggedMask(positions.view(self.count, -1), self.last)
        if self.first == max(self._starts):
            self._mask = CausalMask(self.first, self.width, None, positions.device)

    def attend(
        self, q: Float[Tensor, "heads tokens head_dim"], keys: Tensor, values: Tensor, window: int | None,
        scoring: Scoring,
    ) -> Float[Tensor, "tokens dim"]:  # fmt: skip
        """Return the output of attention for each token, with keys and values of the pool."""
        first = 0 if window is None else max(0, self.first - window + 1)
        visible = self._mask.visible(self.last - first, window)
        queries = q.unflatten(1, (-1, self.width)).transpose(0, 1)
        return attend(queries, self._read(keys, first), self._read(values, first), visible, scoring).flatten(0, 1)

    def _read(
        self, x: Float[Tensor, "heads tokens head_dim"], first: int
    ) -> Float[Tensor, "spans heads seen head_dim"]:
        """Return the keys or values of a layer for the tokens from position `first` on."""
        heads, _, dim = x.shape
        if self._view:
            block, step = (number * self._size for number in self._view)
            shape, strides = (self.count, heads, self.last - first, dim), (step * dim, *x.stride())
            return x.as_strided(shape, strides, (block + first) * dim)
        return x.index_select(1, self._slots(first)).unflatten(1, (self.count, -1)).transpose(0, 1)

    def _slots(self, first: int) -> Int[Tensor, " seen"]:
        """Return the slots of the tokens from position `first` on, span by span."""
        if first not in self._gathered:
            assert self._tables is not None
            positions = torch.arange(first, self.last, device=self._tables.device)
            slots = self._tables[:, positions // self._size] * self._size + positions % self._size
            self._gathered[first] = slots.flatten()
        return self._gathered[first]


class PackedGroup(SpanGroup):
    """Spans of any lengths that attend in one kernel. Their keys and values are gathered without padding.

    Sizes are rounded up, so that the next step has the same sizes and can be replayed. Data after the last span are not
    read.
    """

    def __init__(self, spans: Sequence[Span], size: int, device: torch.device):
        new, ends = [len(span.tokens) for span in spans], [span.start + len(span.tokens) for span in spans]
        self.count, self.tokens, self.most = len(spans), sum(new), (max(new), _rounded(max(ends)))
        seen = [slot for span, end in zip(spans, ends, strict=True) for slot in slots(span, range(end), size)]
        seen += [0] * (_rounded(len(seen)) - len(seen))
        self.lists = [[0, *accumulate(new)], [0, *accumulate(ends)], seen]

    def begin(self, positions: Int[Tensor, " tokens"], numbers: list[Tensor]) -> None:
        new, ends, self._seen = numbers
        self._bounds = Bounds(new.int(), ends.int(), *self.most)

    def attend_joined(
        self, q: Float[Tensor, "tokens heads head_dim"], pool: Float[Tensor, "1 capacity both"], window: int | None,
        scoring: Scoring,
    ) -> Float[Tensor, "tokens dim"]:  # fmt: skip
        """Return the output of attention for each token, with the pool's joined keys and values."""
        k, v = pool.index_select(1, self._seen)[0].unflatten(-1, (2, -1, q.shape[2])).unbind(1)
        return attend_packed(q, k, v, self._bounds, window, scoring).flatten(1)


def _rounded(number: int) -> int:
    """Round a number up to a multiple of 256, and of a quarter of the power of two below it."""
    step = max(SMALLEST, (1 << number.bit_length()) >> 3)
    return -(-number // step) * step


def _padded(tables: Sequence[list[int]]) -> list[list[int]]:
    """Pad tables to equal length with the first block of each; the mask hides the padding."""
    longest = max(map(len, tables))
    return [table + table[:1] * (longest - len(table)) for table in tables]


class DecodingState(PagedState):
    """State of a step with one token of each sequence, padded to a power of two, so that it can be replayed.

    Padding tokens belong to no sequence. Their keys and values are written to a slot that is never read.
    """

    def __init__(self, pool: Pool, size: int, spans: Sequence[Span]):
        super().__init__(pool, size, [spans], [*range(len(spans))], packs=True)
        count = 1 << (len(spans) - 1).bit_length()
        self.longest = -count  # the engine respects the context; a check here would read the device
        packed = self.groups[0]
        packed.tokens = count
        for numbers, filler in zip(self.lists, (0, 0, pool.capacity, 1, 0), strict=False):
            numbers += [filler] * (count - len(spans))
        for bounds in packed.lists[:2]:
            bounds += bounds[-1:] * (count - len(spans))

    @property
    def bucket(self) -> tuple[int, ...]:
        """Sizes of a replay: tokens, tokens that they attend to, and the most that one of them attends to."""
        packed = self.groups[0]
        assert isinstance(packed, PackedGroup)
        return packed.tokens, len(packed.lists[2]), packed.most[1]


class PagedCache:
    """Keys and values of one layer in a step. All tokens are written at once; then each group attends.

    states, kept: states of fixed size of the running sequences, and of shared beginnings.
    """

    def __init__(
        self, step: PagedState, keys: Tensor, values: Tensor, states: Float[Tensor, "slots numbers"],
        kept: Float[Tensor, "kept numbers"],
    ):  # fmt: skip
        self.step, self.keys, self.values, self.states, self.kept = step, keys, values, states, kept

    def attend(
        self, q: Float[Tensor, "1 heads length head_dim"], keys: Float[Tensor, "1 kv_heads length head_dim"] | None,
        values: Float[Tensor, "1 kv_heads length head_dim"] | None, window: int | None, scoring: Scoring,
    ) -> Float[Tensor, "1 length dim"]:  # fmt: skip
        """Write the new keys and values. Return the output of attention for each token.

        Without values the keys are also the values. Without keys nothing is written.
        """
        if keys is not None:
            self.keys.index_copy_(1, self.step.slots, keys[0].to(self.keys.dtype))
        if values is not None:
            self.values.index_copy_(1, self.step.slots, values[0].to(self.values.dtype))
        read = self.keys, self.values if self.values.shape[-1] else self.keys
        pairs = zip(self.step.groups, self.step.split(q[0], 1), strict=True)
        outputs = [group.attend(queries, *read, window, scoring) for group, queries in pairs]
        return torch.cat(outputs)[None] if len(outputs) > 1 else outputs[0][None]

    def recur(self, rule: Rule, x: Float[Tensor, "1 length channels"]) -> Float[Tensor, "1 length out"]:
        """Apply `rule` to the new tokens and the states of their sequences. Write the states at the stops, and return
        the output."""
        outputs = []
        for group, part in zip(self.step.groups, self.step.split(x[0], 0), strict=True):
            slots, tokens, start = iter(group.states), part.unflatten(0, (group.count, -1)), 0
            states = self.states.index_select(0, next(slots))
            pieces = []
            for stop in group.stops:
                y, states = rule(tokens[:, start : stop.tokens], states)
                pieces.append(y)
                start = stop.tokens
                if stop.slot is not None:
                    self.states.index_copy_(0, next(slots), states)
                if stop.kept is not None:
                    self.kept.index_copy_(0, next(slots), states)
            outputs.append((torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]).flatten(0, 1))
        return torch.cat(outputs)[None]


class PackedCache:
    """Joined keys and values of one layer in a step. One kernel writes them and one reads them."""

    def __init__(self, step: PagedState, pool: Float[Tensor, "1 capacity both"]):
        self.step, self.pool = step, pool

    def attend(
        self, q: Float[Tensor, "1 heads length head_dim"], keys: Float[Tensor, "1 kv_heads length head_dim"] | None,
        values: Float[Tensor, "1 kv_heads length head_dim"] | None, window: int | None, scoring: Scoring,
    ) -> Float[Tensor, "1 length dim"]:  # fmt: skip
        """Write the new keys and values. Return the output of attention for each token."""
        if keys is None:
            group = self.step.groups[0]
            assert isinstance(group, PackedGroup)
            return group.attend_joined(q[0].transpose(0, 1), self.pool, window, scoring)[None]
        assert values is not None
        heads = torch.cat([q, keys, values], 1).transpose(1, 2)
        return self.attend_joined(heads, q.shape[1], window, scoring)

    def attend_joined(
        self, heads: Float[Tensor, "1 length all_heads head_dim"], n_heads: int, window: int | None, scoring: Scoring
    ) -> Float[Tensor, "1 length dim"]:
        """Do the same for one tensor that contains `n_heads` queries, the keys and the values, in this order."""
        q, new = heads[0].split([n_heads, heads.shape[2] - n_heads], 1)
        self.pool.index_copy_(1, self.step.slots, new.flatten(1)[None])
        group = self.step.groups[0]
        assert isinstance(group, PackedGroup)
        return group.attend_joined(q, self.pool, window, scoring)[None]

    def recur(self, rule: Rule, x: Float[Tensor, "1 length channels"]) -> Float[Tensor, "1 length out"]:
        """Raise an error, because a joined pool has no states of fixed size."""
        raise NotImplementedError

"""The runner of a causal model: tokens of several sequences go through it in one step, keys and values lie in blocks.

Keys and values are in a pool of `n_blocks` blocks, each of `block_size` tokens. The token at position p of a sequence
has its own in block `blocks[p // block_size]` of the sequence's block table, at place p % block_size. Which sequence
has which blocks is decided by the scheduler. Axes: wanted = tokens whose logits are asked for, vocab.
"""

import math
import mmap
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain, count, islice, pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.generation.text.blocks import BlockManager
from keifu.generation.text.model import Model, causal, device_of
from keifu.layers.attention.attention import Attention, Rule, Scoring, attend
from keifu.layers.attention.kv_cache import KVState
from keifu.layers.attention.masks import CausalMask, RaggedMask
from keifu.layers.attention.packed import Bounds, attend_packed, fits, has_kernel
from keifu.layers.attention.positions import Rotary
from keifu.layers.transformer.decoder import Inserted
from keifu.memory import available_memory
from keifu.native.model import Span, native_form, widest


@runtime_checkable
class Runner(Protocol):
    """Interface of what computes the steps of one engine, in PyTorch (`TorchRunner`) or natively (`keifu.native`).

    block_size, n_blocks: tokens of a block, and blocks of the pool. vocab_size, context_length: of the model.
    token_bytes: what the keys and values of a token take. window: the most tokens that a token sees in any layer, with
    itself: blocks before them may be another sequence's by then. None: all tokens. contiguous: whether it reads the
    blocks of a sequence fastest if they are consecutive. by_length: whether keys depend on the length of the prompt, so
    that another prompt which begins alike cannot use them.
    """

    block_size: int
    n_blocks: int
    vocab_size: int
    context_length: int
    token_bytes: int
    state_bytes: int
    window: int | None
    contiguous: bool
    by_length: bool

    def run(self, batch: Sequence[Span]) -> Float[Tensor, "wanted vocab"]:
        """Logits in float32 after each wanted token: span by span, within a span in the order of its tokens.

        Writes the keys and values of the new tokens into the blocks. A shared block that one span of the batch writes
        is not read by another: the scheduler shares a block only from the step after the one that filled it. A step
        that was interrupted is run again: what it wrote is written over.
        """
        ...

    def forget(self, sequence: int) -> None:
        """Free what the runner keeps of a sequence besides the blocks: it has ended or was preempted."""
        ...


POOL = 0.25  # the share of the free memory that the pool may take
STATES = 32  # sequences for whose states of fixed size memory is left


def runner_of(model: nn.Module, memory: int | None = None, block_size: int = 16, native: bool = True) -> Runner:
    """Return the runner of a model's native form if there is one, otherwise PyTorch's.

    memory: bytes for its blocks; None for a share of the free memory. block_size: of PyTorch's; the native form has its
    own. native: whether to use the native form.
    """
    packed = native_form(model) if native else None
    make = partial(TorchRunner, causal(model), block_size=block_size) if packed is None else packed.runner
    probe: Runner = make(1)
    memory = int(POOL * available_memory(device_of(model))) if memory is None else memory
    memory -= min(memory // 2, STATES * probe.state_bytes)
    return make(max(1, memory // max(1, probe.token_bytes * probe.block_size)))


def blocks_of(runner: Runner) -> BlockManager:
    """Return the manager of a runner's blocks."""
    return BlockManager(runner.n_blocks, runner.block_size, sharing=not (runner.state_bytes or runner.by_length))


SHORT = 32  # tokens of spans that attend together though they begin at different positions: longer ones mask too much
SMALLEST = 256  # spans attend together if the powers of two above their ends are equal, from this one on


class TorchRunner:
    """Runner of any causal model in PyTorch, on any device. All tokens of a step go through the linear layers together.

    The keys and values of a layer are one tensor [heads, tokens of all blocks, head_dim]. New ones are written by one
    index for all sequences. On a CPU attention reads the blocks where they are: those of a sequence are consecutive
    (`contiguous`), and sequences at equal distances from each other are one strided view. Elsewhere, and where blocks
    could not be consecutive, they are gathered, which took 3 to 10 times as long on a CPU.
    """

    def __init__(self, model: Model, n_blocks: int, block_size: int = 16):
        self.model, self.n_blocks, self.block_size = model, n_blocks, block_size
        self.vocab_size: int = model.config.vocab_size
        self.context_length: int = model.config.context_length
        layers = [layer for layer in model.modules() if isinstance(layer, Attention)]
        self.window = widest([layer.window for layer in layers])
        scalings = [layer.scaling for layer in model.modules() if isinstance(layer, Rotary)]
        self.by_length = any(scaling is not None and scaling.by_length for scaling in scalings)
        self._pool = _Pool(model.new_state(0, 1), n_blocks * block_size)
        self.token_bytes, self.state_bytes = self._pool.token_bytes, self._pool.states.row_bytes
        self.device = self._pool.device
        self.contiguous = self.device.type == "cpu"
        kept = zip(self._pool.keys, self._pool.values, [layer.scoring for layer in layers], strict=False)
        every = len(layers) == len(self._pool.keys) and not self.state_bytes
        self.packs = has_kernel(self.device) and every and all(fits(*each) for each in kept)

    def run(self, batch: Sequence[Span]) -> Float[Tensor, "wanted vocab"]:
        size = self.block_size
        self._pool.reserve(size * (1 + max(max(span.blocks) for span in batch)))
        for span in batch:
            if span.sources:
                self._pool.copy(span.sources, span.blocks[: len(span.sources)], size)
        groups = self._groups(batch)
        spans = [span for group in groups for span in group]
        step = PagedState(self._pool, size, groups, _wanted(spans, batch), self.packs)
        inserted = self._inserted(spans)
        more: dict[str, Any] = {} if inserted is None else {"inserted": inserted}
        hidden = self.model.hidden(step.tokens, step, **more)
        return self.model.logits(hidden[0, step.wanted]).float()

    def forget(self, sequence: int) -> None:
        """Free the states of fixed size of a sequence."""
        self._pool.states.forget(sequence)

    def _inserted(self, spans: Sequence[Span]) -> Inserted | None:
        """Return the embeddings of the pictures in these spans; None without any."""
        places, embeddings, first = list[int](), list[Tensor](), 0
        for span in spans:
            if span.images is not None:
                own, rows = span.images.between(self.model, span.start, span.start + len(span.tokens))
                places += [first + place for place in own]
                embeddings += [rows] if own else []
            first += len(span.tokens)
        return Inserted(_on_device([places], self.device)[0], torch.cat(embeddings)) if places else None

    def _groups(self, batch: Sequence[Span]) -> list[list[Span]]:
        """Return the spans in groups that attend together: of equal numbers of tokens and about equal ends, in views of
        the pool at equal distances. Without such views, those of one token. All, if a kernel takes any lengths."""
        if self.packs:
            return [list(batch)]
        size, groups = self.block_size, list[list[Span]]()
        alike: dict[tuple[int, ...], list[Span]] = {}
        for span in batch:
            width, end = len(span.tokens), span.start + len(span.tokens)
            first = _first_of_run(span.blocks[: -(-end // size)]) if self.contiguous else None
            if first is None:  # it is gathered
                key = (0, width) if width == 1 else (0, width, span.sequence)
            elif width > SHORT:
                key = (1, width, span.sequence)
            else:
                key = (1, width, max(SMALLEST, 1 << (end - 1).bit_length()))
            alike.setdefault(key, []).append(span)
        for (run, *_), spans in alike.items():
            if not run:
                groups.append(spans)
                continue
            longest = max(span.start + len(span.tokens) for span in spans)
            room = self._pool.capacity - longest  # a view of a shorter sequence goes on into what is behind it
            groups += _equally_spaced(sorted(spans, key=lambda span: span.blocks[0]), room // size)
        return groups


def _first_of_run(blocks: Sequence[int]) -> int | None:
    """Return the first of these blocks if they are consecutive."""
    first = blocks[0]
    return first if blocks == list(range(first, first + len(blocks))) else None


def _equally_spaced(spans: Sequence[Span], last: int) -> list[list[Span]]:
    """Spans in the order of their first blocks, cut into groups at equal distances; those behind `last` are alone."""
    groups: list[list[Span]] = []
    step = 0
    for span in spans:
        first = span.blocks[0]
        distance = first - groups[-1][-1].blocks[0] if groups else 0
        if groups and distance and first <= last and (len(groups[-1]) == 1 or distance == step):
            groups[-1].append(span)
            step = distance
        else:
            groups.append([span])
    return groups


def _numbers(spans: Sequence[Span], size: int) -> list[list[int]]:
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


def _wanted(spans: Sequence[Span], batch: Sequence[Span]) -> list[int]:
    """Return the tokens whose logits are wanted, by their places in the step, in the order of the batch."""
    places = accumulate(len(span.tokens) for span in spans)
    ends = dict(zip((span.sequence for span in spans), places, strict=True))
    return [place for span in batch for place in range(ends[span.sequence] - span.wanted, ends[span.sequence])]


def _on_device(lists: Sequence[Sequence[int]], device: torch.device) -> list[Int[Tensor, " length"]]:
    """Copy lists of numbers at once, without a wait on CUDA."""
    made = torch.tensor([*chain.from_iterable(lists)], dtype=torch.long, device="cpu")
    made = made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
    return [*made.split([*map(len, lists)])]


class _Pool:
    """Keys and values of all layers, [heads, tokens, head_dim] each.

    On a CPU memory is reserved for all tokens, and the system gives it when it is first written. Elsewhere it grows
    with what is used, layer by layer.
    """

    def __init__(self, empty: KVState, tokens: int):
        self.device, self.token_bytes, self._tokens = empty.device, empty.token_bytes, tokens
        lazy = self.device.type == "cpu"
        make = _lazy_zeros if lazy else Tensor.new_zeros
        self.keys, self.values = (
            [make(x, (x.shape[1], tokens if lazy else 0, x.shape[3])) for x in kept]
            for kept in (empty.keys, empty.values)
        )
        self.states = _States([x.shape[1] for x in empty.fixed], self.device)

    @property
    def capacity(self) -> int:
        """Tokens that there is memory for."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, and of states of fixed size."""
        return sum(x.nbytes for x in (*self.keys, *self.values, self.states.numbers))

    def reserve(self, tokens: int) -> None:
        """Allocate memory for this number of tokens, at least twice as much as before."""
        if tokens <= self.capacity:
            return
        grown = min(self._tokens, max(tokens, 2 * self.capacity))
        for tensors in (self.keys, self.values):
            for index, old in enumerate(tensors):
                tensors[index] = old.new_zeros(old.shape[0], grown, old.shape[2])
                tensors[index][:, : old.shape[1]] = old

    def copy(self, sources: Sequence[int], blocks: Sequence[int], size: int) -> None:
        """Copy whole blocks."""
        pair = torch.tensor([sources, blocks], device="cpu")[:, :, None] * size + torch.arange(size, device="cpu")
        start, into = pair.flatten(1).to(self.device)
        for x in (*self.keys, *self.values):
            x.index_copy_(1, into, x.index_select(1, start))


class _States:
    """States of fixed size of the sequences that run, [slots, numbers of all layers]; slot 0 is that without tokens.

    Each sequence has two: that after its last step and that before it. A step that was interrupted begins from the
    latter again.
    """

    def __init__(self, widths: Sequence[int], device: torch.device):
        self.ends = list(accumulate(widths))
        self.row_bytes = 8 * self.ends[-1]
        self.numbers = torch.zeros(1, self.ends[-1], device=device)
        self._slots: dict[int, dict[int, int]] = {}  # of a sequence, by its number of tokens

    def begin(self, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """Return the slots of the states before the step and of those after it."""
        if not self.row_bytes:
            return [], []
        before = [self._slots[span.sequence][span.start] if span.start else 0 for span in spans]
        used = {slot for slots in self._slots.values() for slot in slots.values()}
        free = (slot for slot in count(1) if slot not in used)
        after = [next(free) for _ in spans]
        if (lacking := max(after) + 1 - len(self.numbers)) > 0:
            more = self.numbers.new_zeros(max(lacking, len(self.numbers)), self.ends[-1])
            self.numbers = torch.cat([self.numbers, more])
        return before, after

    def advance(self, spans: Sequence[Span], before: Sequence[int], after: Sequence[int]) -> None:
        """Keep the states after a step, and those before it."""
        for span, old, new in zip(spans, before, after, strict=False):
            self._slots[span.sequence] = {span.start: old, span.start + len(span.tokens): new}

    def forget(self, sequence: int) -> None:
        """Free the states of a sequence."""
        self._slots.pop(sequence, None)

    def layer(self, index: int) -> Float[Tensor, "slots numbers"]:
        """Return the part of a layer."""
        return self.numbers[:, self.ends[index - 1] if index else 0 : self.ends[index]]


def _lazy_zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros in memory of their own, which the system gives page by page when they are written."""
    size = math.prod(shape) * like.element_size()
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)[:size].view(like.dtype).view(shape)


class PagedState:
    """The state of a step, as `DecoderLM` asks for it: the tokens of all groups one after the other in one row.

    wanted: places of the tokens whose logits are wanted. All numbers go to the device in one copy.
    """

    def __init__(self, pool: _Pool, size: int, groups: Sequence[list[Span]], wanted: list[int], packs: bool = False):
        self.pool = pool
        self.longest = max(span.start for group in groups for span in group)
        self._spans = [span for group in groups for span in group]
        self._slots = pool.states.begin(self._spans)
        states = [iter(slots) for slots in self._slots]
        self.groups = [(_Packed if packs else _Group)(spans, size, pool.device) for spans in groups]
        lists: list[list[int]] = [*_numbers(self._spans, size), wanted]
        for group in self.groups:
            lists += [*(list(islice(slots, group.count)) for slots in states), *group.lists]
        tokens, positions, self.slots, lengths, self.wanted, *rest = _on_device(lists, pool.device)
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

    def layer(self, index: int) -> "PagedCache":
        return PagedCache(self, self.pool.keys[index], self.pool.values[index], self.pool.states.layer(index))

    def advance(self) -> None:
        """Keep the states of fixed size; the tokens were written when they attended."""
        self.pool.states.advance(self._spans, *self._slots)


class _Group:
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
        runs = device.type == "cpu" and all(_first_of_run(table) is not None for table in tables)
        self._view = (firsts[0], steps.pop() if steps else 0) if runs and len(steps) < 2 else None
        self.lists = [] if self._view else [[*chain.from_iterable(_padded(tables))]]
        self._gathered: dict[int, Tensor] = {}

    def begin(self, positions: Int[Tensor, " tokens"], states: tuple[Tensor, Tensor], numbers: list[Tensor]) -> None:
        """Take what is on the device."""
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


class _Packed(_Group):
    """Spans of any numbers of tokens that attend in one kernel; their keys and values are gathered without padding.

    Sizes are rounded up, so that the next step has the same and could be replayed: what is behind the last span is not
    read.
    """

    def __init__(self, spans: Sequence[Span], size: int, device: torch.device):
        new, ends = [len(span.tokens) for span in spans], [span.start + len(span.tokens) for span in spans]
        self.count, self.tokens, self._most = len(spans), sum(new), (max(new), _rounded(max(ends)))
        seen = [slot for span, end in zip(spans, ends, strict=True) for slot in slots(span, range(end), size)]
        seen += [0] * (_rounded(len(seen)) - len(seen))
        self.lists = [[0, *accumulate(new)], [0, *accumulate(ends)], seen]

    def begin(self, positions: Int[Tensor, " tokens"], states: tuple[Tensor, Tensor], numbers: list[Tensor]) -> None:
        new, ends, self._seen = numbers
        self._bounds = Bounds(new.int(), ends.int(), *self._most)

    def attend(
        self, q: Float[Tensor, "heads tokens head_dim"], keys: Tensor, values: Tensor, window: int | None,
        scoring: Scoring,
    ) -> Float[Tensor, "tokens dim"]:  # fmt: skip
        k, v = (x.index_select(1, self._seen).transpose(0, 1) for x in (keys, values))
        return attend_packed(q.transpose(0, 1), k, v, self._bounds, window, scoring).flatten(1)


def _rounded(number: int) -> int:
    """Return the next multiple of an eighth of the power of two below a number, and of 256."""
    step = max(SMALLEST, (1 << number.bit_length()) >> 4)
    return -(-number // step) * step


def _padded(tables: Sequence[list[int]]) -> list[list[int]]:
    """Tables of equal length: what is missing is the first block of each, which the mask hides there."""
    longest = max(map(len, tables))
    return [table + table[:1] * (longest - len(table)) for table in tables]


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
        """Return what `rule` makes of the new tokens and the states of their sequences, and write the new states."""
        outputs = []
        for group, part in zip(self.step.groups, self.step.split(x[0], 0), strict=True):
            before, after = group.states
            y, states = rule(part.unflatten(0, (group.count, -1)), self.states.index_select(0, before))
            self.states.index_copy_(0, after, states)
            outputs.append(y.flatten(0, 1))
        return torch.cat(outputs)[None]

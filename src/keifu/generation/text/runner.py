"""The runner of a causal model: tokens of several sequences go through it in one step, keys and values lie in blocks.

Keys and values are in a pool of `n_blocks` blocks, each of `block_size` tokens. The token at position p of a sequence
has its own in block `blocks[p // block_size]` of the sequence's block table, at place p % block_size. Which sequence
has which blocks is decided by the scheduler. Axes: wanted = tokens whose logits are asked for, vocab.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from functools import partial
from itertools import accumulate, chain
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.generation.text.blocks import BlockManager, digests
from keifu.generation.text.model import Model, causal, device_of
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.kv_cache import KVState, LayerCache, Pass
from keifu.layers.dropout import Dropout
from keifu.memory import available_memory
from keifu.native.model import Span, native_form, widest


@runtime_checkable
class Runner(Protocol):
    """Interface of what computes the steps of one engine, in PyTorch (`TorchRunner`) or natively (`keifu.native`).

    block_size, n_blocks: tokens of a block, and blocks of the pool. vocab_size, context_length: of the model.
    token_bytes: what the keys and values of a token take. window: the most tokens that a token sees in any layer, with
    itself: blocks before them may be another sequence's by then. None: all tokens.
    """

    block_size: int
    n_blocks: int
    vocab_size: int
    context_length: int
    token_bytes: int
    window: int | None

    def run(self, batch: Sequence[Span]) -> Float[Tensor, "wanted vocab"]:
        """Logits in float32 after each wanted token: span by span, within a span in the order of its tokens.

        Writes the keys and values of the new tokens into the blocks. A shared block that one span of the batch writes
        is not read by another: the scheduler shares a block only from the step after the one that filled it. A step
        that was interrupted is run again: what it wrote is written over.
        """
        ...

    def forget(self, sequence: int) -> None:
        """The sequence has ended or was preempted: what the runner keeps of it beside the blocks may go."""
        ...


POOL = 0.25  # the share of the free memory that the pool may take; `TorchRunner` holds what runs a second time


def runner_of(model: nn.Module, memory: int | None = None, block_size: int = 16, native: bool = True) -> Runner:
    """Return the runner of a model's native form if there is one, otherwise PyTorch's.

    memory: bytes for its blocks; None for a share of the free memory. block_size: of PyTorch's; the native form has its
    own. native: whether to use the native form.
    """
    packed = native_form(model) if native else None
    make = partial(TorchRunner, causal(model), block_size=block_size) if packed is None else packed.runner
    probe: Runner = make(1)
    memory = int(POOL * available_memory(device_of(model))) if memory is None else memory
    return make(max(1, memory // (probe.token_bytes * probe.block_size)))


STEP_TOKENS = 512  # of texts that are read together


class Reader:
    """Reads whole texts by a runner, for their logits; what texts share at their beginning is computed once.

    most: of texts that are read together.
    """

    def __init__(self, runner: Runner, most: int | None = None):
        self.runner, self.blocks, self.most = runner, BlockManager(runner.n_blocks, runner.block_size), most
        self._batch: list[tuple[Span, list[bytes]]] = []  # with the hashes of the blocks that a text fills

    def read(self, texts: Iterable[tuple[Sequence[int], int]]) -> Iterator[Float[Tensor, "wanted vocab"]]:
        """The logits after the last `wanted` tokens of each text, in the order of the texts; those of one longer than
        `STEP_TOKENS` come in several parts. One that does not fit the memory for keys and values is a `UserError`."""
        size = self.runner.block_size
        for number, (tokens, wanted) in enumerate(texts):
            hashes = digests(tokens, size)
            usable, needed = hashes[: (len(tokens) - wanted) // size], -(-len(tokens) // size)
            if needed > self.blocks.n_blocks:
                raise UserError(
                    f"A text of {len(tokens)} tokens does not fit the memory for keys and values, which holds "
                    f"{self.blocks.n_blocks * size} tokens: shorten it, or free some memory."
                )
            shared = self.blocks.shared(usable)
            filling = {digest for span, own in self._batch for digest in own[span.start // size :]}
            full = sum(len(span.tokens) for span, _ in self._batch) >= STEP_TOKENS or len(self._batch) == self.most
            taken = needed - len(shared) + self.blocks.unused(shared)
            if full or filling & set(usable) or taken > self.blocks.free:
                yield from self._run()
                shared = self.blocks.shared(usable)
            self.blocks.share(shared)
            blocks = shared + self.blocks.allocate(needed - len(shared))
            for start in range(len(shared) * size, len(tokens), STEP_TOKENS):
                piece = tokens[start : start + STEP_TOKENS]
                left = len(tokens) - start - len(piece)
                span = Span(number, piece, start, blocks, min(len(piece), max(0, wanted - left)))
                self._batch.append((span, hashes[: (start + len(piece)) // size]))
                if left:
                    yield from self._run(going=number)
        yield from self._run()

    def _run(self, going: int | None = None) -> Iterator[Float[Tensor, "wanted vocab"]]:
        """Reads the texts that were gathered; `going`: the one that goes on."""
        batch, self._batch = self._batch, []
        spans = sorted((span for span, _ in batch), key=lambda span: len(span.tokens))  # equal lengths attend together
        logits = self.runner.run(spans).split([span.wanted for span in spans]) if spans else ()
        found = dict(zip((span.sequence for span in spans), logits, strict=True))
        yield from (found[span.sequence] for span, _ in batch if span.wanted)
        for span, hashes in reversed(batch):  # a row that is given up last is moved by no other
            for block, digest in zip(span.blocks, hashes, strict=False):
                self.blocks.remember(block, digest)
            if span.sequence != going:
                self.blocks.release(span.blocks)
                self.runner.forget(span.sequence)


SMALLEST = 64  # tokens of the smallest row
SHORT = 32  # tokens of spans that attend together though they begin at different places: longer ones mask too much


class TorchRunner:
    """Runs any causal model in PyTorch, on any device. All tokens of a step go through the linear layers together.

    Attention reads each sequence's keys and values from a row of its own, where they lie one after the other: gathered
    from blocks at every step they took 3 to 10 times as long to read, measured on a CPU. A row has the next power of
    two of tokens; the rows of one size are attended to together. Full blocks are copied to the pool, from which a
    sequence that shares them begins its row.
    """

    def __init__(self, model: Model, n_blocks: int, block_size: int = 16):
        self.model, self.n_blocks, self.block_size = model, n_blocks, block_size
        self.vocab_size: int = model.config.vocab_size
        self.context_length: int = model.config.context_length
        self._pool = model.new_state(0, block_size)  # a row a block; it grows with what is used
        self.token_bytes = self._pool.token_bytes
        self.window = widest([layer.window for layer in model.modules() if isinstance(layer, Attention)])
        self.device = self._pool.device
        self._rows: dict[int, _Rows] = {}  # by their size
        self._size_of: dict[int, int] = {}  # each sequence's row

    def run(self, batch: Sequence[Span]) -> Float[Tensor, "wanted vocab"]:
        for size, count in Counter(map(self._new_size, batch)).items():
            if size:
                self._room(size, count)
        for span in batch:
            self._seat(span)
        step = _Step(self._groups(batch), self.device)
        tokens = [token for span in step.spans for token in span.tokens]
        hidden = self.model.hidden(torch.tensor([tokens], device=self.device), step)
        for span in batch:
            self._store(span)
        wanted = step.wanted(batch)
        return self.model.logits(hidden[0, torch.tensor(wanted, dtype=torch.long, device=self.device)]).float()

    def forget(self, sequence: int) -> None:
        if (size := self._size_of.pop(sequence, None)) is not None:
            self._rows[size].leave(sequence)
            if not self._rows[size].owners:
                del self._rows[size]

    def _new_size(self, span: Span) -> int:
        """The tokens of the row that the span's sequence moves to; 0 where it stays in its own."""
        end = span.start + len(span.tokens)
        return max(SMALLEST, 1 << (end - 1).bit_length()) if self._size_of.get(span.sequence, 0) < end else 0

    def _room(self, size: int, count: int) -> "_Rows":
        """The rows of a size, with room for so many more sequences."""
        rows = self._rows.setdefault(size, _Rows(self.model.new_state(0, size)))
        rows.reserve(count)
        return rows

    def _seat(self, span: Span) -> None:
        """A row for the span's sequence with room for its new tokens, which holds those before them."""
        number = span.sequence
        held = self._size_of.get(number, 0)
        if size := self._new_size(span):
            rows = self._room(size, 1)
            row = rows.enter(number)
            if held:
                old = self._rows[held]
                rows.state.begin(old.state, old.owners.index(number), span.start, [row])
                self.forget(number)
            elif span.start:
                self._load(rows.state, row, span)
            self._size_of[number] = size
        rows = self._rows[self._size_of[number]]
        rows.state.lengths[rows.owners.index(number)] = span.start

    def _load(self, state: KVState, row: int, span: Span) -> None:
        """Fills the beginning of a row from the pool."""
        blocks = torch.tensor(span.blocks[: -(-span.start // self.block_size)], device=self.device)
        for mine, pool in ((state.keys, self._pool.keys), (state.values, self._pool.values)):
            for x, held in zip(mine, pool, strict=True):
                x[row, :, : span.start] = held[blocks].transpose(0, 1).flatten(1, 2)[:, : span.start]

    def _store(self, span: Span) -> None:
        """Copies the blocks that the span has filled from its row to the pool."""
        first, last = span.start // self.block_size, (span.start + len(span.tokens)) // self.block_size
        if first == last:
            return
        made, needed = len(self._pool.lengths), max(span.blocks[first:last]) + 1
        if needed > made:
            self._pool.add(max(needed, min(2 * made, self.n_blocks)) - made)
            self._pool.lengths = [self.block_size] * len(self._pool.lengths)
        rows = self._rows[self._size_of[span.sequence]]
        row, blocks = rows.owners.index(span.sequence), torch.tensor(span.blocks[first:last], device=self.device)
        filled = slice(first * self.block_size, last * self.block_size)
        for mine, pool in ((rows.state.keys, self._pool.keys), (rows.state.values, self._pool.values)):
            for x, held in zip(mine, pool, strict=True):
                held[blocks] = x[row, :, filled].unflatten(1, (-1, self.block_size)).transpose(0, 1)

    def _groups(self, batch: Sequence[Span]) -> "list[_Group]":
        """The spans in groups that attend together: those of one token by the size of their rows, the others
        where they stand side by side and are of one length."""
        found = []
        for size, rows in self._rows.items():
            single = {s.sequence: s for s in batch if len(s.tokens) == 1 and self._size_of[s.sequence] == size}
            if single:
                rows.put_first(single.keys())
                found.append(_Group(rows.state, 0, [single[number] for number in rows.owners[: len(single)]]))
        for span in batch:
            if (width := len(span.tokens)) > 1:
                rows = self._rows[self._size_of[span.sequence]]
                row, last = rows.owners.index(span.sequence), found[-1] if found else None
                if last and width <= SHORT and (last.state, last.rows.stop, last.width) == (rows.state, row, width):
                    found[-1] = _Group(rows.state, last.rows.start, [*last.spans, span])
                else:
                    found.append(_Group(rows.state, row, [span]))
        return found


class _Rows:
    """Rows of one size; `owners` are the sequences in the first of them."""

    def __init__(self, state: KVState):
        self.state = state
        self.owners: list[int] = []

    def reserve(self, count: int) -> None:
        """Room for so many more sequences; there are twice as many rows as before at least, where any are lacking."""
        if (lacking := len(self.owners) + count - len(self.state.lengths)) > 0:
            self.state.add(max(lacking, len(self.owners)))

    def enter(self, sequence: int) -> int:
        """The place of a row for one more sequence, for which there is room."""
        self.owners.append(sequence)
        return len(self.owners) - 1

    def leave(self, sequence: int) -> None:
        """The last row takes the place of the one that is given back."""
        row, last = self.owners.index(sequence), len(self.owners) - 1
        if row != last:
            self.state.begin(self.state, last, self.state.lengths[last], [row])
            self.owners[row] = self.owners[last]
        self.owners.pop()
        self.state.lengths[last] = 0

    def put_first(self, chosen: Set[int]) -> None:
        """These sequences take the first rows; as few rows as possible change their places."""
        count = len(chosen)
        order = list(range(len(self.state.lengths)))
        behind = [row for row in range(count, len(self.owners)) if self.owners[row] in chosen]
        for row in range(count):
            if self.owners[row] not in chosen:
                other = behind.pop()
                order[row], order[other] = other, row
                self.owners[row], self.owners[other] = self.owners[other], self.owners[row]
        if order != sorted(order):
            self.state.select(torch.tensor(order, device=self.state.device))


class _Group:
    """Spans of the same number of tokens in neighbouring rows of a state, from `row` on."""

    def __init__(self, state: KVState, row: int, spans: Sequence[Span]):
        self.state, self.spans, self.width = state, spans, len(spans[0].tokens)
        self.rows = slice(row, row + len(spans))
        self.now = Pass([span.start for span in spans], self.width, [0] * len(spans), state.device)


class _Step:
    """The state of a step, as `DecoderLM` asks for it: the tokens of all groups one after the other in one row."""

    def __init__(self, groups: Sequence[_Group], device: torch.device):
        self.groups, self.device = groups, device
        self.spans = [span for group in groups for span in group.spans]
        self.longest = max(span.start for span in self.spans)

    def positions(self, length: int, padding: Tensor | None = None) -> Int[Tensor, "1 length"]:
        """Where the tokens stand, each in its own sequence."""
        places = [range(span.start, span.start + len(span.tokens)) for span in self.spans]
        return torch.tensor([list(chain.from_iterable(places))], device=self.device)

    def layer(self, index: int) -> "_StepCache":
        return _StepCache(self.groups, index)

    def advance(self) -> None:
        for group in self.groups:
            group.state.lengths[group.rows] = group.now.ends

    def wanted(self, batch: Sequence[Span]) -> list[int]:
        """The places of the tokens whose logits are wanted, in the order of the batch."""
        places = accumulate(len(span.tokens) for span in self.spans)
        ends = dict(zip((span.sequence for span in self.spans), places, strict=True))
        return [place for span in batch for place in range(ends[span.sequence] - span.wanted, ends[span.sequence])]


class _StepCache:
    """The keys and values of one layer in a step: each group attends to its own rows."""

    def __init__(self, groups: Sequence[_Group], index: int):
        self.groups, self.index = groups, index

    def attend(
        self,
        q: Float[Tensor, "1 heads length head_dim"],
        keys: Float[Tensor, "1 kv_heads length head_dim"],
        values: Float[Tensor, "1 kv_heads length head_dim"],
        window: int | None,
        dropout: Dropout | None,
        scale: float | None,
    ) -> Float[Tensor, "1 length dim"]:
        found = []
        sizes = [len(group.spans) * group.width for group in self.groups]
        parts = zip(*(x[0].split(sizes, 1) for x in (q, keys, values)), strict=True)
        for group, new in zip(self.groups, parts, strict=True):
            rows = (x.unflatten(1, (-1, group.width)).transpose(0, 1) for x in new)
            state = group.state
            held = LayerCache(state.keys[self.index][group.rows], state.values[self.index][group.rows], group.now)
            found.append(held.attend(*rows, window=window, dropout=dropout, scale=scale).flatten(0, 1))
        return torch.cat(found)[None] if len(found) > 1 else found[0][None]

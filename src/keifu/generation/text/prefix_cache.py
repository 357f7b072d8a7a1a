"""Prefix caching: the common prefix of several prompts is computed once, and its keys and values serve all of them.

A row continues from the shared prefix with the rest of its prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from keifu.generation.text.model import PREFILL_TOKENS, Model
from keifu.layers.attention.kv_cache import KVState

Prompts = Sequence[Sequence[int]]
Advance = Callable[[int], object]

OVERHEAD = 256  # tokens: what it costs to compute a few prompts apart from the others, in passes that are not full
ROOM = 2**30  # bytes of keys and values in a pass: more of them take longer to read than the weights


class Group(NamedTuple):
    """Prompts, by their places, and how many of their first tokens all of them share."""

    places: list[int]
    shared: int


def groups(prompts: Prompts) -> list[Group]:
    """The prompts in groups that begin alike, so that the fewest tokens are computed; one is never shared whole."""
    keys = [np.asarray(prompt, ">u4").tobytes() for prompt in prompts]  # they sort as their tokens do, but faster
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    alike = [_alike(keys[a], keys[b]) for a, b in zip(order, order[1:], strict=False)]
    tree = _tree(alike)
    found = [Group(order[first : last + 1], shared) for shared, first, last in tree.chosen]
    inside = {place for group in found for place in group.places}
    rest = [place for place in order if place not in inside]
    common = tree.shared if len(rest) > 1 else 0
    found += [Group(rest, common)] if rest else []
    return [Group(each, min(shared, *(len(prompts[p]) - 1 for p in each))) for each, shared in found]


def _alike(a: bytes, b: bytes) -> int:
    """How many tokens two prompts have in common at their beginning."""
    x, y = np.frombuffer(a, ">u4"), np.frombuffer(b, ">u4")
    size = min(len(x), len(y))
    different = x[:size] != y[:size]
    return int(different.argmax()) if different.any() else size


@dataclass
class _Branch:
    """A run of sorted prompts that share `shared` tokens: what its best division saves, and that division."""

    shared: int
    first: int
    saved: int = 0
    chosen: list[tuple[int, int, int]] = field(default_factory=list)

    def take(self, other: "_Branch") -> None:
        """A branch within this one is closed."""
        self.saved += other.saved
        self.chosen.extend(other.chosen)

    def close(self, last: int) -> "_Branch":
        """As one group, if that saves at least as much as the groups within do."""
        together = self.shared * (last - self.first) - OVERHEAD
        if together > 0 and together >= self.saved:
            self.saved, self.chosen = together, [(self.shared, self.first, last)]
        return self


def _tree(alike: Sequence[int]) -> _Branch:
    """The tree of prefixes of sorted prompts, from how many tokens neighbours share; its root, closed."""
    root = _Branch(min(alike, default=0), 0)
    open_branches = [root]
    for place, shared in enumerate([*alike, root.shared]):
        first, closed = place, None
        while open_branches[-1].shared > shared:
            closed = open_branches.pop().close(place)
            first = closed.first
            if open_branches[-1].shared >= shared:
                open_branches[-1].take(closed)
                closed = None
        if shared > open_branches[-1].shared:
            open_branches.append(_Branch(shared, first))
            if closed:
                open_branches[-1].take(closed)
    return root.close(len(alike))


class Prefix:
    """The keys and values of a beginning, computed once, for any number of rows that go on from it."""

    def __init__(self, model: Model, tokens: Sequence[int], device: torch.device):
        self.model, self.length = model, len(tokens)
        self.state = model.new_state(1, self.length)
        if tokens:
            for chunk in torch.tensor([list(tokens)], device=device).split(PREFILL_TOKENS, 1):
                model.hidden(chunk, self.state)

    def rows(self, count: int, capacity: int) -> KVState:
        """A state with room for `capacity` tokens in each of so many rows, which all hold the beginning."""
        state = self.model.new_state(count, capacity)
        state.begin(self.state, 0, self.length, range(count))
        return state

    @property
    def token_bytes(self) -> int:
        """What the keys and values of one more token of one row take."""
        return self.state.token_bytes


class CacheSize(NamedTuple):
    """Of a row: tokens of its prompt after the beginning, tokens that go in with them, tokens that come later."""

    prompt: int
    now: int = 0
    later: int = 0


def plan_passes(sizes: Sequence[CacheSize], prefix: Prefix, batch_size: int | None = None) -> Iterator[list[int]]:
    """The places of rows that go through the model together, the longest first.

    A pass has at most `batch_size` rows, `PREFILL_TOKENS` tokens with their padding, `ROOM` bytes of keys and values,
    and no row that the others' lengths push out of the context; a row that is larger than that is alone. Where a pass
    has a quarter of its tokens, it also ends before a shorter prompt, which would be padded.
    """
    context = prefix.model.config.context_length
    together: list[int] = []
    now = ahead = 0  # the most tokens behind a prompt, in this pass and in all
    for place in sorted(range(len(sizes)), key=lambda place: tuple(-size for size in sizes[place])):
        size = sizes[place]
        if together:
            prompt = sizes[together[0]].prompt
            more_now, more = max(now, size.now), max(ahead, size.now + size.later)
            slots, count = prefix.length + prompt + more, len(together) + 1
            full = count > (batch_size or count) or (prompt + more_now) * count > PREFILL_TOKENS
            full = full or slots * count * prefix.token_bytes > ROOM or prefix.length + prompt + more_now > context
            shorter = size.prompt < sizes[together[-1]].prompt
            if full or (shorter and (prompt + now) * len(together) >= PREFILL_TOKENS // 4):
                yield together
                together, now, ahead = [], 0, 0
        together.append(place)
        now, ahead = max(now, size.now), max(ahead, size.now + size.later)
    if together:
        yield together

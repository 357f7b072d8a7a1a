"""Decoding steps as CUDA graphs: all kernels of a step are launched at once, without Python between them.

A graph repeats the same operations on the same memory. Each bucket (`DecodingState.bucket`) has a graph: the numbers of
a step are copied into the bucket's input memory, and everything else follows from them. Intermediate results are in
memory that all graphs share, since only one runs at a time. Together they need as much as the largest step
(`TorchRunner.copied_bytes`). Axes: count, vocab.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.inference.text.paged.pool import Pool
from keifu.inference.text.paged.state import DecodingState
from keifu.native.model import Span

MOST = 64  # maximal graphs of an engine; with more, all are recorded again


class Recorded(NamedTuple):
    """Recorded step that can be repeated, with its input numbers and its output logits."""

    replay: Callable[[], None]
    numbers: Int[Tensor, " total"]
    logits: Float[Tensor, "count vocab"]


class Memory(NamedTuple):
    """Memory of graphs. Graphs that are recorded in one stream reuse each other's freed memory."""

    pool: Any
    stream: Any


def new_memory() -> Memory:
    """Return memory for graphs of the current GPU. PyTorch's default stream is that of the first GPU with a graph."""
    return Memory(torch.cuda.graph_pool_handle(), torch.cuda.Stream())


def capture(compute: Callable[[], Any], memory: Memory) -> Callable[[], None]:
    """Record the kernels that `compute` launches on the current GPU, without running them. Return a function that runs
    them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, memory.pool, memory.stream, capture_error_mode="thread_local"):
        compute()
    return graph.replay


class StepGraphs:
    """Graphs of steps in which each sequence has one new token. compute: runs a step and returns its logits.

    The first step of a bucket runs without a graph, which also initialises libraries. The second one is recorded.
    """

    def __init__(self, pool: Pool, compute: Callable[[DecodingState], Tensor]):
        self.pool, self.compute = pool, compute
        self.recorded: dict[tuple[int, ...], Recorded] = {}
        self._met: set[tuple[int, ...]] = set()
        self._logits: dict[int, Tensor] = {}  # by number of sequences, shared by their graphs
        self._memory: Memory | None = None
        self._capacity = 0

    def run(self, spans: Sequence[Span], size: int, last: Int[Tensor, " rows"] | None) -> Float[Tensor, "count vocab"]:
        """Return the logits after each span. size: tokens of a block. last: as in `TorchRunner.run`."""
        if self._capacity != self.pool.capacity or len(self.recorded) >= MOST:  # the pool has moved in memory
            self.recorded.clear()
            self._met.clear()
            self._capacity, self._memory = self.pool.capacity, None  # freed with its last graph
        step = DecodingState(self.pool, size, spans)
        numbers = torch.tensor([*chain.from_iterable(step.lists)], dtype=torch.long, device="cpu")
        if self.pool.device.type == "cuda":
            numbers = numbers.pin_memory()
        if step.bucket not in self.recorded:
            there = _with_tokens(numbers.to(self.pool.device, non_blocking=True), last, len(spans))

            def compute() -> Tensor:
                step.begin(there.split([*map(len, step.lists)]))  # a part of the graph
                return self.compute(step)

            if step.bucket not in self._met:
                self._met.add(step.bucket)
                logits = compute()
                self._logits.setdefault(len(logits), logits)
                return logits[: len(spans)].clone()
            output = self._logits[step.bucket[0]]
            self._memory = self._memory or new_memory()
            self.recorded[step.bucket] = Recorded(capture(lambda: output.copy_(compute()), self._memory), there, output)
        recorded = self.recorded[step.bucket]
        _with_tokens(recorded.numbers.copy_(numbers, non_blocking=True), last, len(spans))
        recorded.replay()
        return recorded.logits[: len(spans)].clone()


def _with_tokens(numbers: Int[Tensor, " total"], last: Tensor | None, count: int) -> Int[Tensor, " total"]:
    """Insert tokens into the numbers of a step on the device: the first `count` numbers are rows of `last`."""
    if last is not None:
        numbers[:count] = last.index_select(0, numbers[:count])
    return numbers

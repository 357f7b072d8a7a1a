"""Steps of decoding as CUDA graphs: all kernels of a step are launched at once, without Python between them.

A graph repeats the same operations on the same memory. Each bucket (`DecodingState.bucket`) has one: the numbers of a
step are copied into the memory of its bucket, and everything else follows from them. What a graph computes with on the
way is in memory that all graphs share, since only one runs at a time: together they need what the largest step needs
(`TorchRunner.copied_bytes`). Axes: count, vocab.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.generation.text.paged.pool import Pool
from keifu.generation.text.paged.state import DecodingState
from keifu.native.model import Span

MOST = 64  # graphs of an engine; when there are more, all are made again


class Recorded(NamedTuple):
    """A step that can be repeated, the numbers that it reads and the logits that it writes."""

    replay: Callable[[], None]
    numbers: Int[Tensor, " total"]
    logits: Float[Tensor, "count vocab"]


class Memory(NamedTuple):
    """Memory of graphs. A graph uses what the one before it has freed, if both are recorded in one stream."""

    pool: Any
    stream: Any


def new_memory() -> Memory:
    """Return memory for graphs of the current GPU; PyTorch's usual stream is that of the first GPU with a graph."""
    return Memory(torch.cuda.graph_pool_handle(), torch.cuda.Stream())


def capture(compute: Callable[[], Any], memory: Memory) -> Callable[[], None]:
    """Record what `compute` launches on the current GPU, without running it; return how to run it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, memory.pool, memory.stream, capture_error_mode="thread_local"):
        compute()
    return graph.replay


class StepGraphs:
    """Graphs of the steps in which each sequence has one new token. compute: runs a step and returns its logits.

    The first step of a bucket runs without a graph, which also prepares libraries; the second one is recorded.
    """

    def __init__(self, pool: Pool, compute: Callable[[DecodingState], Tensor]):
        self.pool, self.compute = pool, compute
        self.recorded: dict[tuple[int, ...], Recorded] = {}
        self._met: set[tuple[int, ...]] = set()
        self._logits: dict[int, Tensor] = {}  # by the number of sequences: those of all their graphs
        self._memory: Memory | None = None
        self._capacity = 0

    def run(
        self, spans: Sequence[Span], size: int, last: Int[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "count vocab"]:
        """Return the logits after each span; size: tokens of a block; last: as for `TorchRunner.run`."""
        if self._capacity != self.pool.capacity or len(self.recorded) >= MOST:  # the pool has moved in memory
            self.recorded.clear()
            self._met.clear()
            self._capacity, self._memory = self.pool.capacity, None  # which ended with its last graph
        step = DecodingState(self.pool, size, spans)
        numbers = torch.tensor([*chain.from_iterable(step.lists)], dtype=torch.long, device="cpu")
        if self.pool.device.type == "cuda":
            numbers = numbers.pin_memory()
        if step.bucket not in self.recorded:
            there = _with_tokens(numbers.to(self.pool.device, non_blocking=True), last, len(spans))

            def compute() -> Tensor:
                step.begin(there.split([*map(len, step.lists)]))  # a part of the graph: it computes with the numbers
                return self.compute(step)

            if step.bucket not in self._met:
                self._met.add(step.bucket)
                logits = compute()
                self._logits.setdefault(len(logits), logits)
                return logits[: len(spans)].clone()
            kept = self._logits[step.bucket[0]]
            self._memory = self._memory or new_memory()
            self.recorded[step.bucket] = Recorded(capture(lambda: kept.copy_(compute()), self._memory), there, kept)
        recorded = self.recorded[step.bucket]
        _with_tokens(recorded.numbers.copy_(numbers, non_blocking=True), last, len(spans))
        recorded.replay()
        return recorded.logits[: len(spans)].clone()


def _with_tokens(numbers: Int[Tensor, " total"], last: Tensor | None, count: int) -> Int[Tensor, " total"]:
    """Write tokens where the numbers of a step, on the device, begin with the rows of their tokens in `last`."""
    if last is not None:
        numbers[:count] = last.index_select(0, numbers[:count])
    return numbers

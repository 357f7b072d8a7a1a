"""How a batch is split: over the ranks that share it, each of which computes some rows, and into micro-batches.

A batch is the same on every rank, since it is a function of the seed and the step. Loss and gradient are sums over its
rows, and are divided by the sum of the weights of all ranks: the split changes neither, up to rounding.

Axes: row = of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.nn.utils import get_total_norm

from keifu.training.protocols import Batch


class MicroBatch(NamedTuple):
    """Consecutive rows of a batch; `first` is the number of their first row in it."""

    first: int
    batch: Batch


@dataclass(frozen=True)
class Ranks:
    """The processes that share each batch: this one is number `rank` of `world`, counted from 0.

    With more than one, torch.distributed's default group must be initialised.
    """

    rank: int = 0
    world: int = 1

    def bounds(self, rows: int, rank: int) -> tuple[int, int]:
        """The first row of a rank's slice of `rows` rows, and the one behind its last; sizes differ by one at most."""
        return rows * rank // self.world, rows * (rank + 1) // self.world

    def micro_batches(self, batch: Batch, rows: int) -> list[MicroBatch]:
        """This rank's slice of a batch in parts of at most `rows` rows, as many parts on every rank.

        Where the slices differ by a row, a part may have one row more. A batch with fewer rows than there are ranks is
        whole on every rank.
        """
        total = rows_of(batch)
        if 0 < total < self.world:
            return [MicroBatch(0, batch)]
        first, end = self.bounds(total, self.rank)
        largest = ceil(total / self.world)
        count = min(ceil(largest / rows), total // self.world)
        starts = [*range(first, end, rows)]
        if len(starts) != count:
            starts = [first + (end - first) * part // count for part in range(count)]
        ends = [*starts[1:], end]
        return [
            MicroBatch(start, {name: tensor[start:stop] for name, tensor in batch.items()})
            for start, stop in zip(starts, ends, strict=True)
        ]

    def sum(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums over all ranks of numbers without axes."""
        if self.world == 1:
            return tensors
        numbers = torch.stack([tensor.double() for tensor in tensors.values()])
        distributed.all_reduce(numbers)
        pairs = zip(tensors.items(), numbers, strict=True)
        return {name: number.to(tensor.dtype) for (name, tensor), number in pairs}

    def sum_gradients(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Sums gradients over all ranks, in place; gives this rank's part of each, and the norm of all.

        FSDP has averaged those that it has sharded (DTensors).
        """
        from torch.distributed.tensor import DTensor  # takes a second to import

        sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        parts = [gradient.to_local() for gradient in sharded]
        if self.world > 1:
            for gradient in whole:
                distributed.all_reduce(gradient)
            for part in parts:
                part.mul_(self.world)
        norms = [get_total_norm(whole)] if whole else []
        if sharded:
            norm = get_total_norm(sharded)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        return [*whole, *parts], torch.stack(norms).norm()

    def counts(self, rows: Tensor) -> list[int]:
        """The number of rows of such a tensor on every rank."""
        if self.world == 1:
            return [len(rows)]
        found = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(self.world)]
        distributed.all_gather(found, torch.full_like(found[0], len(rows)))
        return [int(count) for count in found]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, one rank's after the other's."""
        if self.world == 1:
            return rows
        counts = self.counts(rows)
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(found, padded)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])


def rows_of(batch: Batch) -> int:
    """The number of rows of a batch."""
    return len(next(iter(batch.values())))


def row_elements(batch: Batch) -> int:
    """The number of elements in a row of a batch, over all its tensors."""
    return sum(tensor.numel() for tensor in batch.values()) // max(1, rows_of(batch))

"""Data for the training loop whose batches are changed on their way: with seeds, schedules or precomputed tensors."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from keifu.processes import rows_of
from keifu.training.loader import part_of
from keifu.training.protocols import Batch, Bounds, Data

HELD_OUT = -1  # the number of the step that held-out batches are of
Change = Callable[[Batch, int, int], Batch]  # of a batch, its step or `HELD_OUT`, and the number of its first row


class MappedData:
    """Data of which each batch is changed by `change`.

    key: what the change depends on beside the data, for the fingerprint. tables: the tensors that it takes numbers
    from, None where there is none for held-out batches. by_row: whether rows may be changed without the others.
    """

    def __init__(
        self, data: Data, change: Change, key: object = None, tables: Sequence[Tensor | None] = (), by_row: bool = True
    ):
        self.data, self.change, self.key, self.tables, self.by_row = data, change, key, tables, by_row

    @property
    def fingerprint(self) -> str:
        """Return a hash of the data, the key and the tables."""
        text = self.data.fingerprint if self.key is None else f"{self.data.fingerprint}:{self.key}"
        digest = hashlib.sha256(text.encode())
        for table in self.tables:
            digest.update(b"|" if table is None else table.numpy().tobytes())
        return digest.hexdigest() if self.tables else text

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        return self.change(self.data.batch(step), step, 0)

    def part(self, step: int, bounds: Bounds) -> tuple[Batch, int, int]:
        """Return a part of the rows of a step's batch; see `DividedData`."""
        batch, first, total = part_of(self.data, step, bounds if self.by_row else lambda rows: (0, rows))
        batch = self.change(batch, step, first)
        start, end = (0, total) if self.by_row else bounds(total)
        return {name: tensor[start:end] for name, tensor in batch.items()}, first + start, total

    def validation(self) -> Iterator[Batch]:
        """Return the held-out batches, the same each time."""
        first = 0
        for batch in self.data.validation():
            yield self.change(batch, HELD_OUT, first)
            first += rows_of(batch)

"""Data for the training loop that change each batch: add seeds or schedules, or replace pictures by precomputed
tensors.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from keifu.processes import rows_of
from keifu.training.loader import part_of
from keifu.training.protocols import Batch, Bounds, Data

HELD_OUT = -1  # step number of held-out batches
# arguments: a batch, its step or `HELD_OUT`, and the number of its first row
Change = Callable[[Batch, int, int], Batch]


class MappedData:
    """Data whose batches are changed by the function `change`.

    key: further inputs of `change`, for the fingerprint. tables: tensors that `change` reads, for training and for
    held-out batches (None without these). by_row: whether `change` treats each row independently.
    """

    def __init__(
        self, data: Data, change: Change, key: object = None, tables: Sequence[Tensor | None] = (), by_row: bool = True
    ):
        self.data, self.change, self.key, self.tables, self.by_row = data, change, key, tables, by_row

    @property
    def fingerprint(self) -> str:
        """A hash of the data, the key and the tables."""
        text = self.data.fingerprint if self.key is None else f"{self.data.fingerprint}:{self.key}"
        digest = hashlib.sha256(text.encode())
        for table in self.tables:
            digest.update(b"|" if table is None else table.numpy().tobytes())
        return digest.hexdigest() if self.tables else text

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        return self.change(self.data.batch(step), step, 0)

    def part(self, step: int, bounds: Bounds) -> tuple[Batch, int, int]:
        """Return some rows of a step's batch; see `DividedData`."""
        batch, first, total = part_of(self.data, step, bounds if self.by_row else lambda rows: (0, rows))
        batch = self.change(batch, step, first)
        start, end = (0, total) if self.by_row else bounds(total)
        return {name: tensor[start:end] for name, tensor in batch.items()}, first + start, total

    def validation(self) -> Iterator[Batch]:
        """Yield the held-out batches, the same ones each time."""
        first = 0
        for batch in self.data.validation():
            yield self.change(batch, HELD_OUT, first)
            first += rows_of(batch)

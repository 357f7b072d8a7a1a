"""Dropout (Srivastava et al., 2014) whose masks in a training step depend only on the seed, step, layer and row.

So a batch can be split into micro-batches of any size, on any device or number of processes, and a layer can be
recomputed in the backward pass: the masks have the same bits. Outside a training step, dropout uses torch's global
generator.

Axes: rows = of the computed batch, layers = the dropout layers of a model.
"""

import hashlib

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.layers.counter_rng import bits, bits16

LEVELS = 2**16  # a rate is rounded to a multiple of 1 / LEVELS: 16 random bits for each element


class Dropout(nn.Dropout):
    """`nn.Dropout` that draws its mask with the keys of its `DropoutKeys`, if these are set.

    A layer that is called twice in one pass has the same mask twice, so do not reuse a layer at two places. The first
    axis of the input is the batch's rows, or a multiple of them with the entries of each row next to each other.
    """

    def __init__(self, p: float = 0.0):
        super().__init__(p)
        self.keys: DropoutKeys | None = None
        self.index = 0

    @property
    def active(self) -> bool:
        """Whether anything is dropped: not in evaluation mode, and not at rate 0."""
        return self.training and self.p > 0

    def forward(self, input: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if not self.active:
            return input
        table = None if self.keys is None else self.keys.table
        if table is None or self.p == 1:
            return F.dropout(input, self.p)
        dropped = round(self.p * LEVELS)
        mask = self.mask(input, table[self.index], dropped)
        # masked_fill is ten times slower on a CPU
        return input * (~mask).view(torch.uint8) * (LEVELS / (LEVELS - dropped))

    def mask(self, input: Tensor, keys: Int[Tensor, " rows"], dropped: int) -> Bool[Tensor, "*shape"]:
        """Return the mask of dropped elements, with the probability `dropped` / 2^16."""
        return dropout_mask(keys, input.numel(), dropped).view(input.shape)


def dropout_mask(keys: Int[Tensor, " rows"], total: int, dropped: int) -> Bool[Tensor, "rows elements"]:
    """Draw a mask with `total` elements, equally many for each row. An element is True with the probability `dropped` /
    2^16."""
    if total % len(keys):
        raise ValueError(f"The first axis of dropout's input must be the {len(keys)} rows: it has {total} elements.")
    return bits16(keys, total // len(keys)) < dropped - LEVELS // 2


class DropoutKeys:
    """The random keys of a model's dropout layers, one for each layer and row. They are set during a training step.

    A layer's key depends on its name in the model. The keys are in a tensor, so that `torch.compile` does not compile
    again at each step.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device):
        self.seed, self.device = seed, device
        self.table: Int[Tensor, "layers rows"] | None = None
        dropouts = [(name, module) for name, module in model.named_modules() if isinstance(module, Dropout)]
        for index, (_, module) in enumerate(dropouts):
            module.keys, module.index = self, index
        self.layers = torch.tensor([_hash(name) for name, _ in dropouts], dtype=torch.int64, device=device)
        self.drops = any(module.p > 0 for _, module in dropouts)

    def set(self, step: int, first: int, rows: int) -> None:
        """Set the keys for `rows` rows of a step's batch, from row `first` on."""
        if self.drops:
            of_step = int(bits(torch.tensor([self.seed]), torch.tensor([step])))
            rows_of_batch = torch.arange(first, first + rows, device=self.device)
            of_rows = bits(torch.full_like(rows_of_batch, of_step), rows_of_batch)
            self.table = bits(of_rows.expand(len(self.layers), -1), self.layers[:, None])

    def clear(self) -> None:
        """End the step."""
        self.table = None


def _hash(name: str) -> int:
    """Return a hash of 63 bits of a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

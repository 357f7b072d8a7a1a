"""Batches of a user's own examples (tensors or a data set); their order depends only on the seed and the step."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from keifu.data.epochs import EpochBatches
from keifu.errors import UserError


@runtime_checkable
class IndexedExamples(Protocol):
    """Sequence of examples with a length and access by index, such as a PyTorch data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class OwnBatches(EpochBatches):
    """Batches of a user's examples for the training loop, drawn without replacement in a new order in every epoch.

    source: tensors by name, whose first axis is examples, such as {"x": x, "y": y}; or a data set whose examples are
    dicts of tensors or numbers. held_out: share of the examples for validation, chosen by the seed; or their indices.
    fingerprint: string that identifies the data when a run is resumed; None: computed from the tensors, or for a data
    set from its length and 16 examples.

    Raises `UserError` for tensors of different lengths, no example, or a batch larger than the training part.

    >>> data = OwnBatches({"x": torch.arange(10.0)}, batch_size=4, held_out=0.2)
    >>> data.batch(0)["x"].shape, [len(batch["x"]) for batch in data.validation()]
    (torch.Size([4]), [2])
    """

    def __init__(
        self, source: Mapping[str, Tensor] | IndexedExamples, batch_size: int, seed: int = 0,
        held_out: float | Sequence[int] = 0.1, fingerprint: str | None = None,
    ):  # fmt: skip
        self.source = source
        count = _count(source)
        order = np.random.default_rng([seed, 1]).permutation(count)
        validation = held_out if isinstance(held_out, Sequence) else order[: round(held_out * count)]
        self.held_out, self.training = np.sort(np.array(validation, np.int64)), np.setdiff1d(order, validation)
        if not 1 <= batch_size <= len(self.training):
            few = f"{len(self.training)} examples for training ({len(validation)} are held out)"
            raise UserError(f"A batch of {batch_size} cannot be drawn from {few}: choose a smaller batch_size.")
        self.fingerprint = fingerprint or _fingerprint(source, count, held_out)
        super().__init__(len(self.training), len(validation), batch_size, seed, self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(self.training)

    def make_batch(self, validating: bool, items: np.ndarray) -> dict[str, Tensor]:
        """Return the training examples with these indices, or the held-out ones at these positions."""
        numbers = self.held_out[items] if validating else items
        if isinstance(self.source, Mapping):
            chosen = torch.from_numpy(numbers)
            return {name: tensor[chosen] for name, tensor in self.source.items()}
        rows = [self.source[int(number)] for number in numbers]
        if not isinstance(rows[0], Mapping):
            given = type(rows[0]).__name__
            raise UserError(f"An example of the data is a {given}; it must be a dict of tensors or numbers by name.")
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def _count(source: Mapping[str, Tensor] | IndexedExamples) -> int:
    if not isinstance(source, Mapping):
        return len(source)
    lengths = {name: len(tensor) for name, tensor in source.items()}
    if len({*lengths.values()}) != 1:
        raise UserError(f"The tensors must have as many examples each, and they have {lengths or 'none'}.")
    return next(iter(lengths.values()))


def _fingerprint(source: Mapping[str, Tensor] | IndexedExamples, count: int, held_out: float | Sequence[int]) -> str:
    """Return the SHA-256 of the tensors; for a data set, of its length and evenly spaced examples."""
    digest = hashlib.sha256(json.dumps([count, held_out]).encode())
    if isinstance(source, Mapping):
        rows: list[Any] = [source]
    else:
        rows = [source[number] for number in sorted({n * count // 16 for n in range(16)})] if count else []
    for row in rows:
        for name, value in row.items() if isinstance(row, Mapping) else ():
            tensor = torch.as_tensor(value).detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()

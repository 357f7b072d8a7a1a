"""Learning to remove noise from what a text describes: the loss, and latents that were computed once; knows no network,
no tokenizer and no loop.

Axes: batch, channels, height, width; length = tokens of a text.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.layers.counted_random import bits, normal
from keifu.training.diffusion import DenoisingLoss
from keifu.training.protocols import Batch, Data

LATENT = 2**40 + 2  # the place in a row's stream from which the noise inside its latents is seeded


@dataclass(frozen=True, eq=False)
class TextDenoisingLoss(DenoisingLoss):
    """`DenoisingLoss` of a network that looks at the text of each row ("tokens" [batch, length] in a batch).

    The model offers `encode_text`, which learns where its weights are not frozen, and `project`. `empty` are the tokens
    of no text at all, which a share of `label_dropout` of the rows have, so that guidance can lead away from it (Ho and
    Salimans, 2022).
    """

    empty: Int[Tensor, " length"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def output(self, model: Any, x: Tensor, timestep: Int[Tensor, " batch"], batch: Batch) -> Tensor:
        """What the model says of noisy latents, told the texts of the batch."""
        empty = self.empty.to(batch["tokens"].device)
        tokens = torch.where(self.dropped(batch)[:, None], empty, batch["tokens"])
        return model(x, timestep, model.project(model.encode_text(tokens)))


@dataclass(frozen=True, eq=False)
class Encoded:
    """The latents of a set of pictures, each a normal distribution, as diffusion sees them."""

    mean: Float[Tensor, "picture channels height width"]
    deviation: Float[Tensor, "picture channels height width"]

    def batch(self, batch: Batch) -> Batch:
        """The batch with latents in the place of its "pictures", found by "indices" and drawn by "draws"."""
        places, draws = batch["indices"], batch["draws"]
        noise = normal(bits(draws, torch.full_like(draws, LATENT)), self.mean.shape[1:])
        return {**batch, "pictures": self.mean[places] + self.deviation[places] * noise}


class InLatents:
    """Data with "indices" and "draws" (see `WithDraws`), whose pictures were encoded before, once."""

    def __init__(self, data: Data, training: Encoded, held: Encoded | None):
        self.data, self.training, self.held = data, training, held
        digest = hashlib.sha256(data.fingerprint.encode())
        for part in (training, held):
            for tensor in (part.mean, part.deviation) if part else ():
                digest.update(tensor.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        return self.training.batch(self.data.batch(step))

    def validation(self) -> Iterator[Batch]:
        """The held-out batches."""
        for batch in self.data.validation():
            assert self.held is not None
            yield self.held.batch(batch)

"""Pictures of bytes as numbers without steps, each byte somewhere in its own 256th; knows no model and no loop.

Axes: batch, channels, height, width.
"""

from collections.abc import Iterator

import torch

from keifu.layers.counted_random import uniform
from keifu.training.diffusion import WithDraws
from keifu.training.protocols import Batch

PLACES = 2**41  # in a row's stream, behind those of its noise, timestep and label


class Dequantised:
    """Data whose pictures are (byte + u) / 128 - 1 with u uniform in [0, 1) (Theis et al., 2016, section 3.1): the
    density of such numbers bounds the probability of the bytes. Which u, the row's own draws decide."""

    def __init__(self, data: WithDraws):
        self.data = data

    @property
    def fingerprint(self) -> str:
        """Changes with the data."""
        return f"{self.data.fingerprint}:dequantised"

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        return dequantised(self.data.batch(step))

    def validation(self) -> Iterator[Batch]:
        """The held-out batches, the same each time."""
        return map(dequantised, self.data.validation())


def dequantised(batch: Batch) -> Batch:
    """A batch with "pictures" as numbers from -1 to below 1, by its "draws"."""
    pictures, draws = batch["pictures"], batch["draws"]
    numbers = pictures[0].numel()
    places = torch.arange(PLACES, PLACES + numbers, device=draws.device).repeat(len(draws))
    spread = uniform(draws.repeat_interleave(numbers), places).view_as(pictures).float()
    return {**batch, "pictures": (pictures + spread) / 128 - 1}

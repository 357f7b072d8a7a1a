"""A tiny network that removes noise, and grey pictures for it."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from keifu.layers.diffusion.image_model import ImageModel
from keifu.layers.diffusion.noise_schedule import Noise


class Toy(ImageModel):
    """A convolution, the timestep and the label, as the target of a `Noise`; with a learned variance twice as wide."""

    draws = "pixels"

    def __init__(self, noise: Noise, n_classes: int | None = None, channels: int = 2, size: int = 6):
        super().__init__()
        self.config = SimpleNamespace(
            size=size, channels=channels, n_classes=n_classes, null_class=n_classes is not None, classes=(), noise=noise
        )
        width = channels * (1 + (noise.variance == "learned_range"))
        self.mix = nn.Conv2d(channels, width, 3, padding=1)
        self.label = nn.Embedding(1 + (n_classes or 0), width)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        phase = torch.cos(timestep.to(x.dtype) / self.noise.steps * 3)[:, None, None, None]
        told = 0 if label is None else self.label(label)[:, :, None, None]
        return torch.tanh(self.mix(x) + phase + told)

    def check_size(self, channels: int, height: int, width: int) -> None:
        """Accept any size."""


def greys(count: int, channels: int = 2, size: int = 6, seed: int = 0) -> Tensor:
    """Return bytes [count, channels, size, size]."""
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class Batches:
    """Data of the loop: the same pictures each time."""

    fingerprint = "toy"

    def __init__(self, rows: int = 8, labels: bool = False):
        self.rows, self.labels = rows, labels

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the pictures, with their labels if there are some."""
        found = {"pictures": greys(self.rows)}
        return found | ({"labels": torch.arange(self.rows) % 3} if self.labels else {})

    def validation(self):
        """Yield two batches."""
        yield from (self.batch(0), self.batch(1))

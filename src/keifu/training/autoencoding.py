"""Learning to make pictures small and large again: the loss of an autoencoder with normal latents; knows no network.

Axes: batch, channels, height, width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.data.images import signed
from keifu.layers.counted_random import normal
from keifu.training.protocols import Batch, Outcome

Values = Float[Tensor, "batch channels height width"]


@dataclass(frozen=True)
class KLAutoencoding:
    """The loss of latent diffusion's autoencoder (Rombach et al., 2022, section 3.1): an objective of the loop.

    Of a picture: the mean absolute difference, and the squared one, which finds colours sooner, plus `edges` times that
    of its edges (see `edge_difference`), which keep lines sharp where the released code has a perceptual and an
    adversarial term, plus `kl_weight` times the divergence of its latents from the standard normal distribution, in
    nats for each number of the picture.

    A batch has "pictures", bytes, and "draws", the seed of each row's latents (see `diffusion.WithDraws`).
    """

    kl_weight: float = 1e-3
    edges: float = 1.0

    def __call__(self, model: Any, batch: Batch) -> Outcome:
        """The sum over pictures; figures: `absolute_error`, `edge_error`, `squared_error`, of numbers from -1 to 1, and
        `kl`, in nats for each number of the latents."""
        picture = signed(batch["pictures"])
        found = model.encode(picture)
        again = model.decode(found.sample(normal(batch["draws"], found.mean.shape[1:])))
        apart, kl, edges = (again - picture).flatten(1), found.kl(), edge_difference(again, picture)
        absolute, squared = apart.abs().mean(1), apart.square().mean(1)
        total = absolute + squared + self.edges * edges + self.kl_weight * kl / picture[0].numel()
        figures = {"absolute_error": absolute.sum(), "edge_error": edges.sum(), "kl": kl.sum() / found.mean[0].numel()}
        figures["squared_error"] = squared.sum()
        return Outcome(total.sum(), len(picture), figures)


def edge_difference(x: Values, y: Values) -> Float[Tensor, " batch"]:
    """How far the steps from pixel to pixel differ in size, down and across: the mean of ||Δx| - |Δy|| (Mathieu,
    Couprie and LeCun, 2016, "Deep multi-scale video prediction beyond mean square error", section 3.2)."""
    parts = [(torch.diff(x, dim=way).abs() - torch.diff(y, dim=way).abs()).abs().flatten(1).mean(1) for way in (2, 3)]
    return parts[0] + parts[1]

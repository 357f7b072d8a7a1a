"""Objective of MeanFlow (Geng et al., 2025): a network learns the mean velocity between two times.

The mean u of the velocity v from r to t, times the span t - r, is the displacement. Its derivative by t gives the
MeanFlow identity, u = v - (t - r) du/dt (equation 6). The right side is the target: v is noise - picture, as in flow
matching, and du/dt is the network's own derivative along the path, computed by one Jacobian-vector product without
gradient.

Axes: batch, channels, height, width. Times are shares of the way from the picture (0) to the noise (1).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from keifu.data.images.io import to_signed
from keifu.layers.counter_rng import normal, uniform
from keifu.ranges import NotNegative, Share, check
from keifu.training.protocols import Batch, LossOutput

Sample = Float[Tensor, "batch channels height width"]
Times = Float[Tensor, " batch"]
MEAN, DEVIATION = -0.4, 1.0  # of the times' logits (table 1d)
LEAST_ERROR = 1e-3  # added to the squared error that the loss is divided by (equation 22)
FIRST_DRAW = 2**40  # first position of the times in a row's random stream, far after its noise


@dataclass(frozen=True)
class MeanFlowLoss:
    """Objective of a `MeanFlow`.

    A batch has "pictures" (batch, channels, height, width), bytes, "draws", the seeds of the noise and the times (see
    `diffusion.add_draws`), and "labels" (batch,) for a model with classes. The loss of a picture is its squared error,
    summed over its numbers, divided by (itself + 0.001)^power without gradient. Figure: `squared_error`, the mean over
    the numbers.

    moving: share of the pictures with two different times; for the others the loss is flow matching's.
    """

    moving: Share | int = 0.25
    power: NotNegative = 1.0

    def __post_init__(self) -> None:
        check(self)

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the loss, summed over pictures."""
        picture, draws = to_signed(batch["pictures"]), batch["draws"]
        label = batch["labels"] if model.config.n_classes else None
        time, span = self.times(draws)
        noise, share = normal(draws, picture.shape[1:]), time[:, None, None, None]
        x, velocity = (1 - share) * picture + share * noise, noise - picture
        target = velocity.clone()
        if len(moving := span.nonzero()[:, 0]):
            some = None if label is None else label[moving]
            change = derivative(model, x[moving], time[moving], span[moving], some, velocity[moving])
            target[moving] -= span[moving][:, None, None, None] * change
        error = (model(x, time, span, label) - target).square().flatten(1)
        total = error.sum(1)
        weight = (total.detach() + LEAST_ERROR) ** -self.power
        return LossOutput((weight * total).sum(), len(picture), {"squared_error": error.mean(1).sum()})

    def times(self, draws: Int[Tensor, " batch"]) -> tuple[Times, Times]:
        """Return the later time of each row, and the span to the earlier one, which is 0 for most rows."""
        first, second, choice = (uniform(draws, torch.full_like(draws, FIRST_DRAW + n)) for n in range(3))
        one, other = (torch.special.ndtri(u).mul(DEVIATION).add(MEAN).sigmoid() for u in (first, second))
        later, earlier = torch.maximum(one, other), torch.minimum(one, other)
        moves = choice < self.moving
        return torch.where(moves, later, one).float(), torch.where(moves, later - earlier, 0).float()


def derivative(
    model: Any, x: Sample, time: Times, span: Times, label: Int[Tensor, " batch"] | None, velocity: Sample
) -> Sample:
    """Return du/dt along the path, with the earlier time fixed: x changes by the velocity, the later time and the span
    by 1.

    PyTorch's fused attention has no forward derivative, so attention is computed in its parts.
    """
    one = torch.ones_like(time)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        of_path = torch.func.jvp(
            lambda x, time, span: model(x, time, span, label), (x, time, span), (velocity, one, one)
        )
    return of_path[1]

"""Learning to remove noise: what each row of a batch draws, and the loss of a prediction; knows no network and no loop.

Which timestep and which noise a picture gets, only the seed, the step and its row decide, so a batch may be split
anywhere and a run resumed at any step. Axes: batch, channels, height, width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from keifu.data.images import signed
from keifu.layers.counted_random import bits, normal, uniform
from keifu.layers.noise import Noise, add_noise, at
from keifu.layers.noise_targets import (
    Posterior,
    Weighting,
    discretised_log_likelihood,
    loss_weights,
    normal_kl,
    picture_of,
    posterior,
    target_of,
)
from keifu.training.protocols import Batch, Data, Outcome

TIMESTEP, DROPPED = 2**40, 2**40 + 1  # places in a row's stream, far behind those of its noise
HELD_OUT = -1  # the step whose draws the held-out pictures have


class WithDraws:
    """Data whose batches also have "draws" [batch], int64: the seed of each row's timestep, noise and dropped label.

    Held-out rows have the same draws each time, so that their losses can be compared.
    """

    def __init__(self, data: Data, seed: int):
        self.data, self.seed = data, seed

    @property
    def fingerprint(self) -> str:
        """Changes with the data and with the seed."""
        return f"{self.data.fingerprint}:{self.seed}"

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        return self._drawn(self.data.batch(step), step, 0)

    def validation(self) -> Iterator[Batch]:
        """The held-out batches."""
        first = 0
        for batch in self.data.validation():
            batch = self._drawn(batch, HELD_OUT, first)
            first += len(batch["draws"])
            yield batch

    def _drawn(self, batch: Batch, step: int, first: int) -> Batch:
        return {**batch, "draws": draws(self.seed, step, len(next(iter(batch.values()))), first)}


def draws(seed: int, step: int, rows: int, first: int = 0) -> Int[Tensor, " rows"]:
    """A seed for each row of a step."""
    of_step = bits(torch.tensor([seed]), torch.tensor([step]))
    return bits(of_step.expand(rows), torch.arange(first, first + rows))


@dataclass(frozen=True)
class DenoisingLoss:
    """The loss of a network that is told x and the timestep and says its `Noise`'s target: an objective of the loop.

    A batch has "pictures" [batch, channels, height, width], bytes or numbers from -1 to 1, "draws" (see `WithDraws`),
    and "labels" [batch] where there are some, -1 for none. The loss of a picture is the mean of the squared error over
    its numbers, times the weight of its timestep.

    weighting, gamma: see `loss_weights`. label_dropout: the share of labels that are left out, which guidance needs.
    bound_weight: with a learned variance, what the variational bound counts in bits per number, as a sum over all
    timesteps; its gradient teaches the variance alone (Nichol and Dhariwal, 2021, section 3.1).
    """

    noise: Noise
    weighting: Weighting = "simple"
    gamma: float | None = None
    label_dropout: float = 0.0
    bound_weight: float = 0.001

    @cached_property
    def weights(self) -> Float[Tensor, " steps"]:
        """The weight of each timestep."""
        return loss_weights(self.noise, self.weighting, self.gamma)

    @cached_property
    def posterior(self) -> Posterior:
        """The exact step back."""
        return posterior(self.noise)

    def __call__(self, model: Any, batch: Batch) -> Outcome:
        """The sum over pictures; figures: `squared_error`, without weights, and `bits`, of the bound's sum, where the
        variance is learned."""
        given = batch["pictures"]
        picture = signed(given) if given.dtype == torch.uint8 else given
        draws = batch["draws"]
        timestep = (uniform(draws, torch.full_like(draws, TIMESTEP)) * self.noise.steps).long()
        added = normal(draws, picture.shape[1:]).to(picture.dtype)
        x = add_noise(picture, added, self.noise.alpha_bar, timestep)
        output = self.output(model, x, timestep, batch).to(x.dtype)
        share = None
        if self.noise.variance == "learned_range":
            output, share = output.chunk(2, 1)
        error = (output - target_of(self.noise, picture, added, timestep)).square().flatten(1).mean(1)
        total = (error * self.weights.to(error)[timestep]).sum()
        figures = {"squared_error": error.sum()} if self.weighting != "simple" else {}
        if share is not None:
            frozen = picture_of(self.noise, output.detach(), x, timestep)
            bound = self.noise.steps * bits_of_step(self.noise, self.posterior, picture, frozen, x, timestep, share)
            total = total + self.bound_weight * bound.sum()
            figures["bits"] = bound.sum()
        return Outcome(total, len(picture), figures)

    def output(self, model: Any, x: Tensor, timestep: Int[Tensor, " batch"], batch: Batch) -> Tensor:
        """What the model says of noisy pictures, told the labels of the batch."""
        return model(x, timestep, self._labels(model, batch))

    def dropped(self, batch: Batch) -> Bool[Tensor, " batch"]:
        """The rows that are not told what they show."""
        draws = batch["draws"]
        return uniform(draws, torch.full_like(draws, DROPPED)) < self.label_dropout

    def _labels(self, model: Any, batch: Batch) -> Tensor | None:
        """The labels, those left out as the null class."""
        none = model.config.n_classes
        if not none or "labels" not in batch:
            return None
        if not model.config.null_class:
            return batch["labels"]
        labels = batch["labels"].masked_fill(batch["labels"] < 0, none)
        return labels.masked_fill(self.dropped(batch), none)


def bits_of_step(
    noise: Noise,
    exact: Posterior,
    picture: Float[Tensor, "batch *shape"],
    predicted: Float[Tensor, "batch *shape"],
    x: Float[Tensor, "batch *shape"],
    timestep: Int[Tensor, " batch"],
    share: Tensor | None,
) -> Float[Tensor, " batch"]:
    """L_{t-1} of the variational bound (Ho et al., 2020, equation 5), in bits per number of each picture.

    The divergence of the model's step back from the exact one; at timestep 0, what the step needs to say the grey
    values themselves.
    """
    of_picture, of_x = at(exact.of_picture, timestep, x), at(exact.of_x, timestep, x)
    mean, right = of_picture * predicted + of_x * x, of_picture * picture + of_x * x
    log_variance = exact.log_variance(noise, timestep, share, x).expand_as(x)
    apart = normal_kl(right, at(exact.log_small, timestep, x), mean, log_variance)
    spoken = -discretised_log_likelihood(picture, mean, log_variance)
    last = (timestep == 0).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(last, spoken, apart).flatten(1).mean(1) / math.log(2)

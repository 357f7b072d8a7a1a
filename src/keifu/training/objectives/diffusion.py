"""Diffusion objectives: the loss of a denoising network (DDPM and its variants, conditioned on labels or texts), and
its batches: random seeds for each row, precomputed latents, dequantised pixels.

The timestep and the noise of a picture are functions of the seed, the step and its row, so a batch may be split
anywhere and a run resumed at any step.

Axes: batch, channels, height, width; length = tokens of a text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from keifu.data.images.io import to_signed
from keifu.layers.counter_rng import bits, normal, uniform
from keifu.layers.diffusion.noise_schedule import (
    Noise,
    Posterior,
    Sampling,
    Weighting,
    at,
    discretised_log_likelihood,
    loss_weights,
    moved,
    normal_kl,
    posterior,
    predicted_x0,
    shares,
    training_target,
)
from keifu.processes import rows_of
from keifu.training.objectives.mapped_data import HELD_OUT, MappedData
from keifu.training.protocols import Batch, Data, LossOutput

Network = Callable[[Tensor, Tensor], Tensor]  # from noisy pictures and their timesteps to the output

# Positions in the random stream of a row, far behind those of its noise: for the timestep, and for label dropout.
TIMESTEP = 2**40
DROPPED = 2**40 + 1


def add_draws(data: Data, seed: int) -> MappedData:
    """Return data whose batches also have "draws" [batch], int64: the random seed of each row, for its timestep, noise
    and label dropout.

    Held-out rows have the same seeds each time, so that their losses can be compared.
    """

    def change(batch: Batch, step: int, first: int) -> Batch:
        return {**batch, "draws": draw_noise(seed, step, rows_of(batch), first)}

    return MappedData(data, change, seed)


RATES = 2**41  # the position of a step's first masking rate, likewise
LEAST = 1e-3  # masking rate, so that its inverse is bounded
GOLDEN = (5**0.5 - 1) / 2


def add_masking_rates(data: Data, seed: int) -> MappedData:
    """Return data as of `add_draws` whose batches also have "rates" [batch]: the probability with which the tokens of a
    row are masked.

    They are spread evenly over the rows of a step, whatever their number (an additive recurrence), from a random begin:
    each is uniform, and together they vary less than independent ones (Kingma et al., 2021, appendix I.1).
    """

    def change(batch: Batch, step: int, first: int) -> Batch:
        begin = uniform(draw_noise(seed, step, 1), torch.tensor([RATES]))
        shares = (begin + GOLDEN * torch.arange(first, first + rows_of(batch))) % 1
        return {**batch, "rates": (LEAST + (1 - LEAST) * shares).float()}

    return MappedData(add_draws(data, seed), change)


def draw_noise(seed: int, step: int, rows: int, first: int = 0) -> Int[Tensor, " rows"]:
    """Return a random seed for each row of a step, whose first row has number `first`."""
    of_step = bits(torch.tensor([seed]), torch.tensor([step]))
    return bits(of_step.expand(rows), torch.arange(first, first + rows))


@dataclass(frozen=True)
class DiffusionLoss:
    """The loss of a network that predicts the target of its `Noise` from noisy pictures and timesteps: an objective.

    A batch has "pictures" [batch, channels, height, width], bytes or numbers from -1 to 1, "draws" (see
    `add_draws`), and optionally "labels" [batch], -1 for none. The loss of a picture is the mean squared error over
    its numbers, times the weight of its timestep.

    weighting, gamma: see `loss_weights`. label_dropout: the share of labels replaced by the null class, for
    classifier-free guidance. bound_weight: with a learned variance, the weight of the variational bound in bits per
    number, summed over all timesteps; its gradient trains the variance alone (Nichol and Dhariwal, 2021, section 3.1).
    sampling: how the times of the pictures are drawn, see `shares`.

    With the schedule and target "flow" it is conditional flow matching (Lipman et al., 2022, equation 23): the squared
    error of noise - picture at a random point of the line between the two.
    """

    noise: Noise
    weighting: Weighting = "simple"
    gamma: float | None = None
    label_dropout: float = 0.0
    bound_weight: float = 0.001
    sampling: Sampling = "uniform"

    @cached_property
    def weights(self) -> Float[Tensor, " steps"]:
        """The weight of each timestep."""
        return loss_weights(self.noise, self.weighting, self.gamma)

    @cached_property
    def posterior(self) -> Posterior:
        """The exact posterior of a reverse step."""
        return posterior(self.noise)

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the sum over pictures; figures: `squared_error`, without weights, and with a learned variance `bits`,
        the variational bound."""
        return self.of(partial(self.output, model, batch), batch["pictures"], batch["draws"])

    def of(self, network: Network, given: Tensor, draws: Int[Tensor, " batch"]) -> LossOutput:
        """Return the loss of a network with a fixed condition."""
        picture = to_signed(given) if given.dtype == torch.uint8 else given
        timestep = self.noise.time(shares(uniform(draws, torch.full_like(draws, TIMESTEP)), self.sampling))
        added = normal(draws, picture.shape[1:]).to(picture.dtype)
        alpha, sigma = self.noise.levels(timestep, picture)
        x = alpha * picture + sigma * added
        output = network(x, timestep).to(x.dtype)
        share = None
        if self.noise.variance == "learned_range":
            output, share = output.chunk(2, 1)
        error = (output - training_target(self.noise, picture, added, timestep)).square().flatten(1).mean(1)
        total = (error * moved(self.weights, error.device, error.dtype)[timestep.long()]).sum()
        figures = {"squared_error": error.sum()} if self.weighting != "simple" else {}
        if share is not None:
            frozen = predicted_x0(self.noise, output.detach(), x, timestep)
            bound = self.noise.steps * bits_of_step(self.noise, self.posterior, picture, frozen, x, timestep, share)
            total = total + self.bound_weight * bound.sum()
            figures["bits"] = bound.sum()
        return LossOutput(total, len(picture), figures)

    def output(self, model: Any, batch: Batch, x: Tensor, timestep: Num[Tensor, " batch"]) -> Tensor:
        """Return the model's output for noisy pictures, conditioned on the labels of the batch."""
        return model(x, timestep, self._labels(model, batch))

    def dropped(self, batch: Batch) -> Bool[Tensor, " batch"]:
        """Return the rows whose condition is dropped."""
        draws = batch["draws"]
        return uniform(draws, torch.full_like(draws, DROPPED)) < self.label_dropout

    def _labels(self, model: Any, batch: Batch) -> Tensor | None:
        """Return the labels, with the null class where a label is missing or dropped."""
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
    """Return L_{t-1} of the variational bound (Ho et al., 2020, equation 5), in bits per number of each picture.

    The KL divergence of the model's reverse step from the exact posterior; at timestep 0, the negative log-likelihood
    of the pixel values.
    """
    of_picture, of_x = at(exact.of_picture, timestep, x), at(exact.of_x, timestep, x)
    mean = of_picture * predicted + of_x * x
    exact_mean = of_picture * picture + of_x * x
    log_variance = exact.log_variance(noise, timestep, share, x).expand_as(x)
    divergence = normal_kl(exact_mean, at(exact.log_small, timestep, x), mean, log_variance)
    nats = -discretised_log_likelihood(picture, mean, log_variance)
    last = (timestep == 0).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(last, nats, divergence).flatten(1).mean(1) / math.log(2)


LATENT = 2**40 + 2  # the position in a row's random stream that seeds the sampling of its latents


@dataclass(frozen=True, eq=False)
class TextDiffusionLoss(DiffusionLoss):
    """`DiffusionLoss` of a network conditioned on texts ("tokens" [batch, length] in a batch).

    The model offers `encode_text`, which is trained unless its weights are frozen, and `project`. `empty`: the tokens
    of the empty text, which replaces a share of `label_dropout` of the texts, for classifier-free guidance (Ho and
    Salimans, 2022).
    """

    empty: Int[Tensor, " length"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def output(self, model: Any, batch: Batch, x: Tensor, timestep: Num[Tensor, " batch"]) -> Tensor:
        """Return the model's output for noisy latents, conditioned on the texts of the batch."""
        empty = moved(self.empty, batch["tokens"].device)
        tokens = torch.where(self.dropped(batch)[:, None], empty, batch["tokens"])
        return model(x, timestep, model.project(model.encode_text(tokens)))


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Precomputed latents of a set of pictures, each a normal distribution, scaled as for diffusion."""

    mean: Float[Tensor, "picture channels height width"]
    deviation: Float[Tensor, "picture channels height width"]

    def batch(self, batch: Batch) -> Batch:
        """Return the batch with "pictures" replaced by the latents of its "indices", sampled by its "draws"."""
        indices, draws = batch["indices"], batch["draws"]
        noise = normal(bits(draws, torch.full_like(draws, LATENT)), self.mean.shape[1:])
        return {**batch, "pictures": self.mean[indices] + self.deviation[indices] * noise}


def use_latents(data: Data, training: EncodedImages, validation: EncodedImages | None) -> MappedData:
    """Return data with "indices" and "draws" (see `add_draws`), whose pictures are replaced by precomputed latents."""

    def change(batch: Batch, step: int, first: int) -> Batch:
        part = validation if step == HELD_OUT else training
        assert part is not None
        return part.batch(batch)

    parts = [part for part in (training, validation) if part]
    return MappedData(data, change, tables=[table for part in parts for table in (part.mean, part.deviation)])


PLACES = 2**41  # the first position in a row's random stream for dequantisation


def dequantise_data(data: Data) -> MappedData:
    """Return data with uniform dequantisation: pictures are (byte + u) / 128 - 1 with u uniform in [0, 1), sampled by
    "draws" (Theis et al., 2016, section 3.1). The density of such numbers bounds the probability of the bytes."""
    return MappedData(data, lambda batch, step, first: dequantize(batch), "dequantised")


def dequantize(batch: Batch) -> Batch:
    """Return a batch with dequantised "pictures", numbers from -1 to below 1, sampled by its "draws"."""
    pictures, draws = batch["pictures"], batch["draws"]
    numbers = pictures[0].numel()
    counters = torch.arange(PLACES, PLACES + numbers, device=draws.device).repeat(len(draws))
    spread = uniform(draws.repeat_interleave(numbers), counters).view_as(pictures).float()
    return {**batch, "pictures": (pictures + spread) / 128 - 1}

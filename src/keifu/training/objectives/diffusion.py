"""Diffusion objectives: the loss of a denoising network (DDPM and its variants, conditioned on labels or texts), and
changes of its batches: random seeds for each row, precomputed latents, dequantised pixels.

The timestep and the noise of a picture depend only on the seed, the step and the row, so a batch can be split anywhere
and a run can be resumed at any step.

Axes: batch, channels, height, width; length = tokens of a text.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from keifu.data.images.io import to_signed
from keifu.layers.counter_rng import bits, normal, uniform
from keifu.layers.diffusion import noise_schedule
from keifu.layers.diffusion.noise_schedule import Noise, Posterior, Sampling, Weighting, at, moved
from keifu.processes import rows_of
from keifu.training.objectives.mapped_data import HELD_OUT, MappedData
from keifu.training.protocols import Batch, Data, LossOutput

Values = Float[Tensor, "batch *shape"]
Steps = Int[Tensor, " batch"]
Network = Callable[[Tensor, Tensor], Tensor]  # noisy pictures and their timesteps → output

# Positions in the random stream of a row, far after those of its noise: for the timestep, and for label dropout.
TIMESTEP = 2**40
DROPPED = 2**40 + 1


def add_draws(data: Data, seed: int) -> MappedData:
    """Add "draws" (batch,), int64, to the batches of `data`: the random seed of each row, for its timestep, noise and
    label dropout.

    Held-out rows have the same seeds at each validation, so that losses can be compared.
    """

    def change(batch: Batch, step: int, first: int) -> Batch:
        return {**batch, "draws": draw_noise(seed, step, rows_of(batch), first)}

    return MappedData(data, change, seed)


RATES = 2**41  # position of a step's first masking rate in the random stream
LEAST = 1e-3  # smallest masking rate: bounds its inverse
GOLDEN = (5**0.5 - 1) / 2


def add_masking_rates(data: Data, seed: int) -> MappedData:
    """Add "draws" (see `add_draws`) and "rates" (batch,) to the batches of `data`: the probability of masking each
    token of a row.

    The rates of a step are spread evenly over its rows, from a random start, by an additive recurrence. Each is
    uniform, and together they vary less than independent ones (Kingma et al., 2021, appendix I.1).
    """

    def change(batch: Batch, step: int, first: int) -> Batch:
        begin = uniform(draw_noise(seed, step, 1), torch.tensor([RATES]))
        shares = (begin + GOLDEN * torch.arange(first, first + rows_of(batch))) % 1
        return {**batch, "rates": (LEAST + (1 - LEAST) * shares).float()}

    return MappedData(add_draws(data, seed), change)


def draw_noise(seed: int, step: int, rows: int, first: int = 0) -> Int[Tensor, " rows"]:
    """Return a random seed for each of `rows` rows of a step, from row number `first` on."""
    of_step = bits(torch.tensor([seed]), torch.tensor([step]))
    return bits(of_step.expand(rows), torch.arange(first, first + rows))


@dataclass(frozen=True)
class DiffusionLoss:
    """Objective of a network that predicts the target of its `Noise` from noisy pictures and timesteps.

    A batch has "pictures" (batch, channels, height, width), bytes or numbers from -1 to 1, "draws" (see `add_draws`),
    and optionally "labels" (batch,), -1 for none. The loss of a picture is the mean squared error over its numbers,
    times the weight of its timestep.

    weighting, gamma: see `loss_weights`. label_dropout: the share of labels replaced by the null class, for
    classifier-free guidance. bound_weight: with a learned variance, the weight of the variational bound in bits per
    number, summed over all timesteps; its gradient trains only the variance (Nichol and Dhariwal, 2021, section 3.1).
    sampling: distribution of the timesteps, see `shares`.

    With the schedule and target "flow" it is conditional flow matching (Lipman et al., 2022, equation 23): the squared
    error of noise - picture at a random point between the two.
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
        return noise_schedule.loss_weights(self.noise, self.weighting, self.gamma)

    @cached_property
    def posterior(self) -> Posterior:
        """The exact posterior of a reverse step."""
        return noise_schedule.posterior(self.noise)

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the loss, summed over pictures. Figures: `squared_error`, without weights, and with a learned variance
        `bits`, the variational bound.
        """
        return self.of(partial(self.output, model, batch), batch["pictures"], batch["draws"])

    def of(self, network: Network, pictures: Tensor, draws: Int[Tensor, " batch"]) -> LossOutput:
        """Return the loss of `network`, a function of noisy pictures and timesteps. pictures: bytes or numbers
        from -1 to 1. draws: their random seeds.
        """
        picture = to_signed(pictures) if pictures.dtype == torch.uint8 else pictures
        share = noise_schedule.shares(uniform(draws, torch.full_like(draws, TIMESTEP)), self.sampling)
        timestep = self.noise.time(share)
        added = normal(draws, picture.shape[1:]).to(picture.dtype)
        alpha, sigma = self.noise.levels(timestep, picture)
        x = alpha * picture + sigma * added
        output, variance = network(x, timestep).to(x.dtype), None
        if self.noise.variance == "learned_range":
            output, variance = output.chunk(2, 1)
        target = noise_schedule.training_target(self.noise, picture, added, timestep)
        error = (output - target).square().flatten(1).mean(1)
        total = (error * moved(self.weights, error.device, error.dtype)[timestep.long()]).sum()
        figures = {"squared_error": error.sum()} if self.weighting != "simple" else {}
        if variance is not None:
            frozen = noise_schedule.predicted_x0(self.noise, output.detach(), x, timestep)
            bound = self.noise.steps * bits_of_step(self.noise, self.posterior, picture, frozen, x, timestep, variance)
            total = total + self.bound_weight * bound.sum()
            figures["bits"] = bound.sum()
        return LossOutput(total, len(picture), figures)

    def output(self, model: Any, batch: Batch, x: Tensor, timestep: Num[Tensor, " batch"]) -> Tensor:
        """Return the model's output for noisy pictures, conditioned on the labels of the batch."""
        return model(x, timestep, self._labels(model, batch))

    def dropped(self, batch: Batch) -> Bool[Tensor, " batch"]:
        """Return a mask of the rows whose condition is dropped."""
        draws = batch["draws"]
        return uniform(draws, torch.full_like(draws, DROPPED)) < self.label_dropout

    def _labels(self, model: Any, batch: Batch) -> Tensor | None:
        """Return the labels, with the null class for missing and dropped ones; None for a model without classes."""
        none = model.config.n_classes
        if not none or "labels" not in batch:
            return None
        if not model.config.null_class:
            return batch["labels"]
        return batch["labels"].masked_fill((batch["labels"] < 0) | self.dropped(batch), none)


def bits_of_step(
    noise: Noise, exact: Posterior, picture: Values, predicted: Values, x: Values, timestep: Steps, share: Tensor | None
) -> Float[Tensor, " batch"]:
    """Return L_{t-1} of the variational bound (Ho et al., 2020, equation 5), in bits per number of each picture.

    It is the KL divergence of the model's reverse step from the exact posterior; at timestep 0, the negative
    log-likelihood of the pixel values.
    """
    of_picture, of_x = at(exact.of_picture, timestep, x), at(exact.of_x, timestep, x)
    mean = of_picture * predicted + of_x * x
    exact_mean = of_picture * picture + of_x * x
    log_variance = exact.log_variance(noise, timestep, share, x).expand_as(x)
    divergence = noise_schedule.normal_kl(exact_mean, at(exact.log_small, timestep, x), mean, log_variance)
    nats = -noise_schedule.discretised_log_likelihood(picture, mean, log_variance)
    last = (timestep == 0).reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(last, nats, divergence).flatten(1).mean(1) / math.log(2)


LATENT = 2**40 + 2  # position in a row's random stream of the seed for sampling its latents


@dataclass(frozen=True, eq=False)
class TextDiffusionLoss(DiffusionLoss):
    """`DiffusionLoss` of a network conditioned on texts: "tokens" (batch, length) in a batch.

    The model has `encode_text`, which is trained unless its weights are frozen, and `project`. empty: tokens of the
    empty text, which replaces a share `label_dropout` of the texts, for classifier-free guidance (Ho and Salimans,
    2022).
    """

    empty: Int[Tensor, " length"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def output(self, model: Any, batch: Batch, x: Tensor, timestep: Num[Tensor, " batch"]) -> Tensor:
        """Return the model's output for noisy latents, conditioned on the texts of the batch."""
        empty = moved(self.empty, batch["tokens"].device)
        tokens = torch.where(self.dropped(batch)[:, None], empty, batch["tokens"])
        return model(x, timestep, model.project(model.encode_text(tokens)))


class EncodedImages(NamedTuple):
    """Precomputed latents of a set of pictures: mean and deviation of each number's normal distribution, scaled for
    diffusion.
    """

    mean: Float[Tensor, "picture channels height width"]
    deviation: Float[Tensor, "picture channels height width"]

    def batch(self, batch: Batch) -> Batch:
        """Replace "pictures" of a batch by the latents of its "indices", sampled with its "draws"."""
        indices, draws = batch["indices"], batch["draws"]
        noise = normal(bits(draws, torch.full_like(draws, LATENT)), self.mean.shape[1:])
        return {**batch, "pictures": self.mean[indices] + self.deviation[indices] * noise}


def use_latents(data: Data, training: EncodedImages, validation: EncodedImages | None) -> MappedData:
    """Replace the pictures of `data` by precomputed latents; the batches of `data` have "indices" and "draws" (see
    `add_draws`).
    """

    def change(batch: Batch, step: int, first: int) -> Batch:
        part = validation if step == HELD_OUT else training
        assert part is not None
        return part.batch(batch)

    parts = [part for part in (training, validation) if part]
    return MappedData(data, change, tables=[table for part in parts for table in (part.mean, part.deviation)])


PLACES = 2**41  # first position of dequantisation in a row's random stream


def dequantise_data(data: Data) -> MappedData:
    """Apply uniform dequantisation to the pictures of `data`: (byte + u) / 128 - 1 with u uniform in [0, 1), sampled
    with "draws" (Theis et al., 2016, section 3.1). The density of such numbers bounds the probability of the bytes.
    """
    return MappedData(data, lambda batch, step, first: dequantize(batch), "dequantised")


def dequantize(batch: Batch) -> Batch:
    """Dequantise the "pictures" of a batch, bytes, to numbers from -1 to below 1, with its "draws"."""
    pictures, draws = batch["pictures"], batch["draws"]
    numbers = pictures[0].numel()
    counters = torch.arange(PLACES, PLACES + numbers, device=draws.device).repeat(len(draws))
    spread = uniform(draws.repeat_interleave(numbers), counters).view_as(pictures).float()
    return {**batch, "pictures": (pictures + spread) / 128 - 1}

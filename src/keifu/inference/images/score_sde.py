"""Sampling by a score: annealed Langevin dynamics (Song and Ermon, 2019), and the reverse of a stochastic differential
equation with its probability-flow ODE (Song et al., 2021).

A score is a function of x / alpha and sigma / alpha (the x and σ of a process that only adds noise), as in
`data.classification.points` and `models.diffusion.score`; a `ScoreDenoiser` makes a denoiser of it. So these functions
and those of `samplers` run along the same schedules. DDPM's chain adds noise and shrinks x ("variance preserving", VP):
its schedules are in `sampling_schedule`. That of 2019 only adds noise ("variance exploding", VE): `ve_schedule`.

A step of the process, x_level = a · x_next + √v · noise, has a = alpha_level / alpha_next and v = `new_variance`. With
f = (a - 1) · x and g² = v, the reverse SDE is x_next = x - f + g² · score + g · noise. The ODE is the same with half
the score and no noise. Both have the same distribution at each level, for small steps.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from keifu.inference.images.denoiser import Denoiser, Labels, Network, Sample, guide, new_variance
from keifu.inference.images.samplers import Random, SamplerStep
from keifu.layers.diffusion.sampling_schedule import CLEAN, Level, Schedule, Step

ConditionalScore = Callable[[Tensor, Tensor, Labels | None], Tensor]  # x, each row's sigma and class → score


class ScoreDenoiser(Denoiser):
    """Denoiser whose network returns the score of x / alpha with noise of deviation sigma / alpha.

    The noise in x is -sigma times the score, and the picture follows from it (Tweedie's formula)."""

    def output(self, x: Sample, level: Level) -> Tensor:
        """Return the predicted noise."""
        sigma = torch.full((len(x),), level.ratio, device=x.device)
        return -level.ratio * self.network(x / level.alpha, sigma).to(x.dtype)


def guided_score(score: ConditionalScore, label: Labels | None, guidance: float = 1.0) -> Network:
    """Return the score of a class, or with guidance w the sum (1 - w) · score(x) + w · score(x | label).

    That is the score of p(x) · p(label | x)^w: by Bayes' rule the difference of the two is that of the classifier (Ho
    and Salimans, 2022, section 3.2; their weight is w - 1)."""
    if label is None or guidance == 1:
        return lambda x, sigma: score(x, sigma, label)
    return lambda x, sigma: guide(score(x, sigma, label), score(x, sigma, None), guidance)


def ve_schedule(sigma_min: float, sigma_max: float, steps: int) -> Schedule:
    """Return the geometric levels of a process that only adds noise, from the noisiest down to the clean picture."""
    sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64, device="cpu").exp()
    levels = [Level(float(steps - 1 - i), 1.0, sigma) for i, sigma in enumerate(sigmas.tolist())]
    return Schedule(tuple(map(Step, levels, [*levels[1:], CLEAN])), sigma_max)


def langevin(
    denoise: Denoiser, x: Sample, schedule: Schedule, random: Random, repeats: int = 100, rate: float = 0.2
) -> Iterator[SamplerStep]:
    """Sample by annealed Langevin dynamics (algorithm 1 of 2019): at each level, walk along the score and add noise.

    A step has α = rate · sigma²: x + α / 2 · score + √α · noise. After many, x has the distribution of the level,
    wherever it began. The paper's 100 repeats at each of 10 levels have a rate of 0.2."""
    for level, _ in schedule.steps:
        for _ in range(repeats):
            output = denoise(x, level)
            x = x - rate * level.sigma / 2 * output.noise + math.sqrt(rate) * level.sigma * random(x)
        yield SamplerStep(x, denoise(x, level).picture)


def reverse_sde(
    denoise: Denoiser, x: Sample, schedule: Schedule, random: Random, corrections: int = 0, snr: float = 0.15
) -> Iterator[SamplerStep]:
    """Sample by the reverse SDE (equation 46 of 2021, "reverse diffusion"); the last step adds no noise.

    corrections: Langevin steps before each step, of a size by the ratio `snr` of the score's part to the noise's
    (algorithms 4 and 5)."""
    for level, next_level in schedule.steps:
        for _ in range(corrections):
            score, noise = -denoise(x, level).noise / level.sigma, random(x)
            lengths = [part.flatten(1).norm(dim=1).mean() for part in (noise, score)]
            size = 2 * (snr * lengths[0] / lengths[1]) ** 2
            x = x + size * score + (2 * size).sqrt() * noise
        output, variance = denoise(x, level), new_variance(level, next_level)
        x = (2 - level.alpha / next_level.alpha) * x - variance / level.sigma * output.noise
        x = x + math.sqrt(variance) * random(x) if next_level.sigma else x
        yield SamplerStep(x, output.picture)


def probability_flow(denoise: Denoiser, x: Sample, schedule: Schedule, random: Random) -> Iterator[SamplerStep]:
    """Sample by Euler's method on the ODE with the distributions of the SDE (equation 47 of 2021), without noise.

    DDIM without fresh noise and `samplers.euler` solve the same ODE, in σ / alpha as variable."""
    for level, next_level in schedule.steps:
        output, variance = denoise(x, level), new_variance(level, next_level)
        x = (2 - level.alpha / next_level.alpha) * x - variance / (2 * level.sigma) * output.noise
        yield SamplerStep(x, output.picture)

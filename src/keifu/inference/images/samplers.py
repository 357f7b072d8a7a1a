"""Diffusion samplers by name: from noise to an image in steps, with the schedule and default number of steps of each.

Single-step samplers are DDPM, DDIM, Euler, Euler ancestral and Heun. Multistep samplers, which also use earlier
predictions, are LMS, PLMS, DPM-Solver++ and UniPC. A sampler is a generator: it gets a denoiser, x at the first noise
level, the schedule and a source of noise, and yields x and the predicted image after each step. x is the network's
input, x = alpha · image + sigma · noise; formulas of papers that use x / alpha (Karras et al., 2022) are multiplied by
alpha. Clipping and thresholding are those of diffusers' scheduler of the same name. The noise is always computed from
the clipped picture; diffusers' DDIM does so only with `use_clipped_model_output=True`. The noise of the raw output
would subtract again what guidance added to the picture.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from keifu.errors import UserError, require_known
from keifu.inference.images.denoiser import Denoiser, DenoiserOutput, Network, Sample, new_variance, standard_deviation
from keifu.layers.diffusion.noise_schedule import Noise, Spacing
from keifu.layers.diffusion.sampling_schedule import (
    Level,
    Schedule,
    continuous_schedule,
    ddim_schedule,
    ddpm_schedule,
    dpm_solver_schedule,
    flow_schedule,
)

Random: TypeAlias = Callable[[Tensor], Tensor]  # normal noise in the shape of x; each image has a separate seed


class SamplerStep(NamedTuple):
    """State after a step: x at the step's end level, and the image predicted in the step."""

    x: Sample
    picture: Sample


Watch: TypeAlias = Callable[[SamplerStep], object]  # called with the state after each step


def last_x(steps: Iterator[SamplerStep], watch: Watch = lambda state: None) -> Tensor:
    """Return x after all steps. `watch` is called with the state after each step."""
    x = torch.empty(0)
    for state in steps:
        watch(state)
        x = state.x
    return x


SamplingFunction: TypeAlias = Callable[[Denoiser, Tensor, Schedule, Random], Iterator[SamplerStep]]


def ddpm(denoise: Denoiser, x: Sample, schedule: Schedule, random: Random) -> Iterator[SamplerStep]:
    """Sample by DDPM (Ho et al., 2020, algorithm 2): each step draws from the posterior given the predicted image
    (equation 7).

    The variance is that of the denoiser's `Noise`. A step that ends at the clean picture adds no noise; diffusers adds
    noise there unless the step begins at timestep 0.
    """
    for level, next_level in schedule.steps:
        output = denoise(x, level)
        beta = new_variance(level, next_level)
        previous_share = level.alpha / next_level.alpha * next_level.sigma**2 / level.sigma**2
        x = next_level.alpha * beta / level.sigma**2 * output.picture + previous_share * x
        if next_level.sigma:
            x = x + _ddpm_standard_deviation(output, denoise.noise.variance, level, next_level) * random(x)
        yield SamplerStep(x, output.picture)


def _ddpm_standard_deviation(output: DenoiserOutput, variance: str, level: Level, next_level: Level) -> Tensor | float:
    """Return the standard deviation of a DDPM step: √β̃, √β, or the network's interpolation between their logarithms
    (Nichol and Dhariwal, 2021, equation 15)."""
    small = standard_deviation(level, next_level)
    large = math.sqrt(new_variance(level, next_level))
    if variance == "learned_range":
        assert output.variance_fraction is not None
        low = math.log(max(small, 1e-10))
        high = math.log(max(large, 1e-10))  # 0 for a step without a change of level
        return torch.exp(low + (output.variance_fraction + 1) / 2 * (high - low))
    return small if variance == "fixed_small" else large


def ddim(denoise: Denoiser, x: Sample, schedule: Schedule, random: Random, eta: float = 0.0) -> Iterator[SamplerStep]:
    """Sample by DDIM (Song et al., 2021, equation 12); `eta` scales the fresh noise: 0 none, 1 that of DDPM (equation
    16)."""
    for level, next_level in schedule.steps:
        output = denoise(x, level)
        noise_std = eta * standard_deviation(level, next_level)
        x = next_level.alpha * output.picture + math.sqrt(max(0.0, next_level.sigma**2 - noise_std**2)) * output.noise
        x = x + noise_std * random(x) if eta else x
        yield SamplerStep(x, output.picture)


def euler(denoise: Denoiser, x: Sample, schedule: Schedule, random: Random) -> Iterator[SamplerStep]:
    """Sample by Euler's method on the probability flow ODE (Karras et al., 2022, algorithm 1 at first order, without
    churn).

    A step assumes constant noise in x / alpha; for a flow, a constant velocity gives the same result.
    """
    for level, next_level in schedule.steps:
        picture = denoise(x, level).picture
        x = next_level.alpha * picture + next_level.sigma * derivative(x, picture, level)
        yield SamplerStep(x, picture)


def euler_ancestral(denoise: Denoiser, x: Sample, schedule: Schedule, random: Random) -> Iterator[SamplerStep]:
    """Sample by Euler steps to a lower level, then fresh noise up to the next level, as in k-diffusion (Crowson, 2022).

    In exact arithmetic this is DDIM with η = 1 on the continuous schedule.
    """
    for level, next_level in schedule.steps:
        picture = denoise(x, level).picture
        sigma_up = next_level.ratio * math.sqrt(max(0.0, 1 - (next_level.ratio / level.ratio) ** 2))
        sigma_down = next_level.ratio**2 / level.ratio
        lower = Level(next_level.timestep, next_level.alpha, next_level.alpha * sigma_down)
        x = integrate_to(x, derivative(x, picture, level), level, lower) + next_level.alpha * sigma_up * random(x)
        yield SamplerStep(x, picture)


def heun(denoise: Denoiser, x: Sample, schedule: Schedule, random: Random) -> Iterator[SamplerStep]:
    """Sample by Heun's method (Karras et al., 2022, algorithm 1 without churn): the mean of the slopes at both ends of
    a step.

    Each step evaluates the network twice, the last one once."""
    for level, next_level in schedule.steps:
        picture = denoise(x, level).picture
        slope = derivative(x, picture, level)
        end = integrate_to(x, slope, level, next_level)
        if next_level.sigma:
            picture = denoise(end, next_level).picture
            end = integrate_to(x, (slope + derivative(end, picture, next_level)) / 2, level, next_level)
        x = end
        yield SamplerStep(x, picture)


def derivative(x: Sample, picture: Sample, level: Level) -> Tensor:
    """Return d(x / alpha) / dσ of the probability flow ODE: the noise in x for this predicted image."""
    return (x - level.alpha * picture) / level.sigma


def integrate_to(x: Sample, noise: Tensor, level: Level, next_level: Level) -> Tensor:
    """Return x at another level for a constant slope. With the network's noise, this is DDIM's deterministic step."""
    scale = next_level.alpha / level.alpha
    return scale * x + (next_level.sigma - scale * level.sigma) * noise


Predictions = Sequence[tuple[Tensor, Level]]  # predicted images and their levels, the newest last
FEW = 15  # DPM-Solver++ ends with a first-order step for fewer steps than this, or if it ends at the clean image
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)  # weights of the outputs, the newest first, by the number of outputs


def lms(denoise: Denoiser, x: Sample, schedule: Schedule, random: Random) -> Iterator[SamplerStep]:
    """Sample by LMS: linear multistep in σ with up to four slopes (as in k-diffusion; Adams-Bashforth on unevenly
    spaced levels)."""
    slopes: deque[Tensor] = deque(maxlen=4)
    ratios = [step.level.ratio for step in schedule.steps]
    for number, (level, next_level) in enumerate(schedule.steps):
        picture = denoise(x, level).picture
        slopes.appendleft(derivative(x, picture, level))
        known_ratios = ratios[max(0, number - 3) : number + 1][::-1]
        weights = lms_weights(known_ratios, level.ratio, next_level.ratio)
        change = sum((weight * slope for weight, slope in zip(weights, slopes, strict=True)), torch.zeros_like(x))
        x = next_level.alpha / level.alpha * x + next_level.alpha * change
        yield SamplerStep(x, picture)


def lms_weights(points: Sequence[float], start: float, end: float) -> list[float]:
    """Return the integral from start to end of each Lagrange polynomial on the known points. Gauss quadrature with two
    nodes is exact."""
    middle = (start + end) / 2
    half = (end - start) / 2
    nodes = [middle - half / math.sqrt(3), middle + half / math.sqrt(3)]
    others_of_point = [[q for q in points if q != p] for p in points]
    return [
        half * sum(math.prod((node - q) / (p - q) for q in other_points) for node in nodes)
        for p, other_points in zip(points, others_of_point, strict=True)
    ]


def plms(denoise: Denoiser, x: Sample, schedule: Schedule, random: Random) -> Iterator[SamplerStep]:
    """Sample by PLMS: pseudo linear multistep (Liu et al., 2022, equation 12) without Runge-Kutta steps.

    The first step is taken twice, with the mean of the outputs at both ends, as in Stable Diffusion. The network's raw
    outputs are combined before they are converted to image and noise.
    """
    outputs: deque[Tensor] = deque(maxlen=4)
    for level, next_level in schedule.steps:
        outputs.appendleft(denoise.output(x, level))
        weights = ADAMS_BASHFORTH[len(outputs) - 1]
        mixed = sum((w * output for w, output in zip(weights, outputs, strict=True)), torch.zeros_like(outputs[0]))
        output = denoise.read(mixed, x, level)
        if len(outputs) == 1 and len(schedule.steps) > 1:
            ahead = denoise.output(_plms_step(x, output, level, next_level), next_level)
            output = denoise.read((mixed + ahead) / 2, x, level)
        x = _plms_step(x, output, level, next_level)
        yield SamplerStep(x, output.picture)


def _plms_step(x: Sample, output: DenoiserOutput, level: Level, next_level: Level) -> Tensor:
    """Compute DDIM's step without fresh noise; from the predicted image alone if x contains no image (zero terminal
    SNR)."""
    if level.alpha:
        return integrate_to(x, output.noise, level, next_level)
    return next_level.alpha * output.picture + next_level.sigma * output.noise


def dpm_2m(
    denoise: Denoiser, x: Sample, schedule: Schedule, random: Random, stochastic: bool = False
) -> Iterator[SamplerStep]:
    """Sample by DPM-Solver++(2M) (Lu et al., 2022, algorithm 2): extrapolate the last two predicted images linearly in
    λ.

    The first step is of first order; sometimes also the last (see `FEW`). stochastic: use SDE-DPM-Solver++(2M) of the
    same paper (equation 18), with DDPM's fresh noise.
    """
    previous: tuple[Tensor, Level] | None = None
    for number, (level, next_level) in enumerate(schedule.steps, 1):
        picture = denoise(x, level).picture
        h = next_level.log_snr - level.log_snr
        first_order = number == len(schedule.steps) and (number < FEW or not next_level.sigma)
        extrapolated = picture
        if previous is not None and not first_order:
            previous_picture, previous_level = previous
            slope = h / (2 * (level.log_snr - previous_level.log_snr))
            extrapolated = picture + (picture - previous_picture) * slope
        decay = math.exp(-h)
        sigma_ratio = next_level.sigma / level.sigma
        if stochastic:
            noise_std = next_level.sigma * math.sqrt(max(0.0, 1 - decay**2))
            x = sigma_ratio * decay * x + next_level.alpha * (1 - decay**2) * extrapolated + noise_std * random(x)
        else:
            x = sigma_ratio * x + next_level.alpha * (1 - decay) * extrapolated
        previous = picture, level
        yield SamplerStep(x, picture)


def unipc(denoise: Denoiser, x: Sample, schedule: Schedule, random: Random) -> Iterator[SamplerStep]:
    """Sample by UniPC of order 2 (Zhao et al., 2023, algorithms 5 to 8) with image prediction and B₂(h) = e^h - 1.

    Each predicted image first corrects the x that it was predicted from, then predicts the next x. So the corrector
    needs no extra evaluation.
    """
    predictions: list[tuple[Tensor, Level]] = []
    previous = x
    order = 1
    for number, (level, next_level) in enumerate(schedule.steps):
        picture = denoise(x, level).picture
        if predictions:
            x = _unipc_update(previous, predictions, level, order, picture)
        predictions = [*predictions[-1:], (picture, level)]
        order = min(2, len(schedule.steps) - number, number + 1)
        previous = x
        x = _unipc_update(x, predictions, next_level, order)
        yield SamplerStep(x, picture)


def _unipc_update(x: Tensor, predictions: Predictions, end: Level, order: int, picture: Tensor | None = None) -> Tensor:
    """Return x at another level than the newest known one: by the predictor UniP, or with `picture`, the image
    predicted there, by the corrector UniC."""
    newest, level = predictions[-1]
    h = end.log_snr - level.log_snr
    growth = math.expm1(-h)
    earlier = predictions[-order:-1][::-1]
    ratios = [(other.log_snr - level.log_snr) / h for _, other in earlier]
    differences = [(older - newest) / ratio for (older, _), ratio in zip(earlier, ratios, strict=True)]
    if picture is not None:
        differences.append(picture - newest)
        ratios.append(1.0)
    updated = end.sigma / level.sigma * x - end.alpha * growth * newest
    for weight, difference in zip(_unipc_weights(ratios, -h, growth), differences, strict=True):
        updated = updated - end.alpha * growth * weight * difference
    return updated


def _unipc_weights(ratios: Sequence[float], h: float, growth: float) -> list[float]:
    """Return the weight of each difference by equation 9. A single one has weight 1/2, which is of the same order."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    phi = growth / h - 1
    right = [phi / growth, 2 * (phi / h - 0.5) / growth]
    powers = torch.tensor([[1.0, 1.0], [*ratios]], dtype=torch.float64, device="cpu")
    return torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64, device="cpu")).tolist()


@dataclass(frozen=True, kw_only=True)
class ImageSampler:
    """Function, schedule and defaults of a sampler.

    schedule: makes the steps from a noise, their number and a spacing. steps: the default number; None: all timesteps
    of the noise. karras: whether the schedule supports the levels of Karras et al. (2022). eta: whether η is a setting.
    clip, threshold: which bounds of the noise are applied to predicted images. flow: whether it can begin at alpha = 0,
    as a flow does. looks_back: whether it divides by the distance between the levels of two steps, which must differ.
    """

    run: Callable[..., Iterator[SamplerStep]]
    schedule: Callable[..., Schedule]
    about: str
    steps: int | None = 50
    karras: bool = True
    eta: bool = False
    clip: bool = False
    threshold: bool = False
    flow: bool = False
    looks_back: bool = False


SAMPLERS = {
    "ddpm": ImageSampler(
        run=ddpm, schedule=ddpm_schedule, about="the chain of the paper, random", steps=None, karras=False, clip=True,
        threshold=True, flow=True,
    ),
    "ddim": ImageSampler(
        run=ddim, schedule=ddim_schedule, about="few steps, without chance unless --eta", karras=False, eta=True,
        clip=True, threshold=True, flow=True,
    ),
    "euler": ImageSampler(
        run=euler, schedule=continuous_schedule, about="the plainest solver", steps=30, flow=True
    ),
    "euler-ancestral": ImageSampler(
        run=euler_ancestral, schedule=continuous_schedule, about="Euler with fresh noise", steps=30
    ),
    "heun": ImageSampler(
        run=heun, schedule=continuous_schedule, about="second order, two evaluations per step", steps=20, clip=True
    ),
    "lms": ImageSampler(
        run=lms, schedule=continuous_schedule, about="of the last four slopes", steps=30, looks_back=True
    ),
    "plms": ImageSampler(
        run=plms, schedule=ddim_schedule, about="the first default of Stable Diffusion", karras=False
    ),
    "dpm++-2m": ImageSampler(
        run=dpm_2m, schedule=dpm_solver_schedule, about="good pictures in 10 to 25 steps", steps=20, threshold=True,
        looks_back=True,
    ),
    "dpm++-2m-sde": ImageSampler(
        run=partial(dpm_2m, stochastic=True), schedule=dpm_solver_schedule, about="the same with fresh noise", steps=25,
        threshold=True, looks_back=True,
    ),
    "unipc": ImageSampler(
        run=unipc, schedule=dpm_solver_schedule, about="good pictures in 8 to 20 steps", steps=20, threshold=True,
        looks_back=True,
    ),
}  # fmt: skip


def sampler(name: str) -> ImageSampler:
    """Return the sampler of that name. Raises `UserError`, with the nearest name, if it is unknown."""
    require_known("sampler", name, SAMPLERS)
    return SAMPLERS[name]


@dataclass(frozen=True)
class ConfiguredSampler:
    """Sampler with its settings for a noise. `run(denoiser, x, schedule, random)` samples along the `schedule`."""

    run: SamplingFunction
    schedule: Schedule
    sampler: ImageSampler
    noise: Noise

    def denoiser(self, network: Network, denoiser_class: Callable[..., Denoiser] = Denoiser) -> Denoiser:
        """Return a denoiser of this class with the sampler's bounds on predicted images."""
        return denoiser_class(network, self.noise, self.sampler.clip, self.sampler.threshold)


def configure_sampler(
    noise: Noise,
    name: str,
    steps: int | None = None,
    spacing: Spacing | None = None,
    karras: bool = False,
    eta: float = 0.0,
) -> ConfiguredSampler:
    """Return a sampler with its settings. Raises `UserError` for a setting that it does not support."""
    image_sampler = sampler(name)
    if noise.flows and not image_sampler.flow:
        able = ", ".join(sampler for sampler, row in SAMPLERS.items() if row.flow)
        raise UserError(f"The sampler {name} divides by alpha, which is 0 where a flow begins: take one of {able}.")
    if karras and not image_sampler.karras:
        raise UserError(f"The sampler {name} uses the training timesteps: choose another one for Karras levels.")
    if eta and not image_sampler.eta:
        raise UserError(f"eta is ddim's share of fresh noise; the sampler {name} has none.")
    run = partial(image_sampler.run, eta=eta) if image_sampler.eta else image_sampler.run
    karras_option = {"karras": True} if karras else {}
    lowest_is_omitted = image_sampler.schedule is dpm_solver_schedule
    most = max(1, noise.steps - lowest_is_omitted)
    count = steps or min(image_sampler.steps or noise.steps, most)
    schedule = (flow_schedule if noise.flows else image_sampler.schedule)(noise, count, spacing, **karras_option)
    if image_sampler.looks_back and any(level == next_level for level, next_level in schedule.steps):
        raise UserError(
            f"With {spacing or noise.spacing} spacing {count} steps visit some timesteps twice, and the sampler {name} "
            "needs different ones: take fewer steps, or another spacing."
        )
    return ConfiguredSampler(run, schedule, image_sampler, noise)

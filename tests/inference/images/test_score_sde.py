"""Samplers of a score, with exact scores of mixtures: distributions, guidance, and the steps of diffusers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from keifu.data.classification import points
from keifu.evaluation.images.distances import sliced_wasserstein
from keifu.inference.images import samplers
from keifu.inference.images.samplers import last_x
from keifu.inference.images.score_sde import (
    ScoreDenoiser,
    guided_score,
    langevin,
    probability_flow,
    reverse_sde,
    ve_schedule,
)
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.diffusion.sampling_schedule import ddim_schedule, ddpm_schedule

NOISE = Noise(clip=None)
COUNT = 3000


def density(mixture: points.PointMixture, sigma: float) -> MixtureSameFamily:
    """Return PyTorch's distribution of points with noise."""
    deviation = torch.full_like(mixture.means, math.hypot(mixture.deviation, sigma))
    return MixtureSameFamily(
        Categorical(torch.ones(len(mixture.means))), Independent(Normal(mixture.means, deviation), 1)
    )


def random_of(seed: int) -> samplers.Random:
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def exact(label: Tensor | None = None, guidance: float = 1.0, name: str = "clusters") -> ScoreDenoiser:
    return ScoreDenoiser(guided_score(points.mixture(name).score, label, guidance), NOISE)


@pytest.mark.parametrize("name", points.MIXTURES)
@pytest.mark.parametrize("sigma", [0.0, 0.3, 5.0])
def test_the_exact_score_is_the_gradient_of_the_log_density(name: str, sigma: float) -> None:
    mixture, generator = points.mixture(name), torch.Generator().manual_seed(0)
    x = (mixture.draw(50, generator)[0] + sigma * torch.randn(50, 2, generator=generator)).requires_grad_()
    (gradient,) = torch.autograd.grad(density(mixture, sigma).log_prob(x).sum(), x)
    torch.testing.assert_close(mixture.score(x, torch.full((50,), sigma)), gradient, atol=1e-3, rtol=1e-4)


def test_the_score_of_a_class_is_that_of_its_distributions_alone() -> None:
    mixture, x, sigma = points.clusters(), torch.randn(6, 2), torch.full((6,), 0.4)
    label = torch.tensor([0, 1, 2, 0, 1, 2])  # 2 is no class
    score = mixture.score(x, sigma, label)
    for row, number in enumerate(label.tolist()):
        of_class = mixture.labels == number if number < 2 else slice(None)
        alone = points.PointMixture(mixture.means[of_class], mixture.labels[of_class], mixture.deviation)
        torch.testing.assert_close(score[row], alone.score(x[row : row + 1], sigma[:1])[0])


SCHEDULES = {"vp": ddpm_schedule(NOISE, 250, "trailing"), "ve": ve_schedule(0.01, 10.0, 250)}
FUNCTIONS = {"sde": reverse_sde, "ode": probability_flow, "ddpm": samplers.ddpm, "ddim": samplers.ddim}


@pytest.mark.parametrize("process", SCHEDULES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_sde_and_ode_have_the_exact_distribution_at_each_level(process: str, name: str) -> None:
    """The sliced Wasserstein distance is near that of exact points, halfway and at the end."""
    schedule, mixture, random = SCHEDULES[process], points.clusters(), random_of(0)
    x = schedule.initial_sigma * random(torch.empty(COUNT, 2))
    states = list(FUNCTIONS[name](exact(), x, schedule, random))
    for number in (170, 215, 249):
        level = schedule.steps[number].next_level
        real = mixture.draw(COUNT, torch.Generator().manual_seed(1))[0]
        real = level.alpha * real + level.sigma * random(real)
        apart = sliced_wasserstein(real, states[number].x)
        assert apart < 0.06 * max(1.0, float(real.std())), (number, apart)


def test_langevin_dynamics_come_to_the_distribution_from_anywhere() -> None:
    mixture, schedule, random = points.clusters(), ve_schedule(0.01, 10.0, 20), random_of(0)
    x = torch.full((COUNT, 2), 7.0)
    drawn = last_x(langevin(exact(), x, schedule, random, repeats=20))
    real = mixture.draw(COUNT, torch.Generator().manual_seed(1))[0]
    assert sliced_wasserstein(real, drawn) < 0.06 < 1.0 < sliced_wasserstein(real, x)


def test_langevin_dynamics_have_the_deviation_of_their_level() -> None:
    """Of points that are all 0, x has the deviation σ up to the step's size: its variance is σ² / (1 - rate / 4)."""
    denoise, random = ScoreDenoiser(lambda x, sigma: -x / sigma[:, None] ** 2, NOISE), random_of(0)
    schedule = ve_schedule(2.0, 2.0, 1)
    drawn = last_x(langevin(denoise, torch.zeros(20_000, 2), schedule, random, repeats=60, rate=0.2))
    assert float(drawn.std()) == pytest.approx(2.0 / 0.95**0.5, rel=0.02)


def test_an_ode_draws_one_point_from_a_noise_and_an_sde_many() -> None:
    schedule, x = SCHEDULES["vp"], torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    same = [last_x(probability_flow(exact(), x, schedule, random_of(seed))) for seed in (1, 2)]
    other = [last_x(reverse_sde(exact(), x, schedule, random_of(seed))) for seed in (1, 2)]
    assert torch.equal(*same) and float((other[0] - other[1]).abs().max()) > 0.1


def test_guidance_is_the_score_of_a_sharpened_classifier() -> None:
    """(1 - w) score(x) + w score(x | c) is the gradient of ln p(x) + w ln p(c | x)."""
    mixture, sigma, w = points.moons(), 0.5, 3.0
    of_class = mixture.labels == 1
    conditional = density(
        points.PointMixture(mixture.means[of_class], mixture.labels[of_class], mixture.deviation), sigma
    )
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_p = density(mixture, sigma).log_prob(x)
    log_classifier = conditional.log_prob(x) - math.log(2) - log_p
    (gradient,) = torch.autograd.grad((log_p + w * log_classifier).sum(), x)
    guided = guided_score(mixture.score, torch.ones(20, dtype=torch.long), w)
    torch.testing.assert_close(guided(x.detach(), torch.full((20,), sigma)), gradient, atol=1e-4, rtol=1e-4)


def test_guided_points_are_of_their_class_and_less_spread() -> None:
    label, schedule = torch.arange(1000) % 2, ddpm_schedule(NOISE, 50, "trailing")
    mixture, outputs = points.clusters(), {}
    for guidance in (1.0, 4.0):
        random = random_of(0)
        x = random(torch.empty(1000, 2))
        outputs[guidance] = last_x(samplers.ddim(exact(label, guidance), x, schedule, random))
    apart = {w: torch.cdist(drawn, mixture.means) for w, drawn in outputs.items()}
    right = {w: float((mixture.labels[each.argmin(1)] == label).float().mean()) for w, each in apart.items()}
    assert right[4.0] >= right[1.0] > 0.95 and right[4.0] > 0.99
    assert apart[4.0].min(1).values.mean() < apart[1.0].min(1).values.mean()


def test_the_steps_are_those_of_diffusers_for_a_process_that_only_adds_noise() -> None:
    diffusers = pytest.importorskip("diffusers")
    steps, snr = 12, 0.2
    theirs: Any = diffusers.ScoreSdeVeScheduler(
        num_train_timesteps=steps, snr=snr, sigma_min=0.01, sigma_max=10.0, correct_steps=2
    )
    theirs.set_timesteps(steps)
    theirs.set_sigmas(steps, 0.01, 10.0)
    score, schedule = points.moons().score, ve_schedule(0.01, 10.0, steps)
    start = x = 10.0 * torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    generator, expected = torch.Generator().manual_seed(1), []
    for number, time in enumerate(theirs.timesteps):
        sigma = torch.full((9,), float(theirs.discrete_sigmas[steps - 1 - number]))
        for _ in range(2):
            x = theirs.step_correct(score(x, sigma), x, generator=generator).prev_sample
        output = theirs.step_pred(score(x, sigma), time, x, generator=generator)
        x = output.prev_sample
        expected.append(output.prev_sample if number < steps - 1 else output.prev_sample_mean)
    denoise = ScoreDenoiser(score, NOISE)
    states = reverse_sde(denoise, start, schedule, random_of(1), corrections=2, snr=snr)
    for state, other in zip(states, expected, strict=True):
        torch.testing.assert_close(state.x, other, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_steps_are_those_of_diffusers_for_ddim(eta: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs: Any = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(20)
    schedule, score = ddim_schedule(NOISE, 20, "trailing"), points.moons().score
    start = x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    denoise, expected = ScoreDenoiser(score, NOISE), []
    noises = random_of(1)
    for time, (level, _) in zip(theirs.timesteps, schedule.steps, strict=True):
        assert int(time) == level.timestep
        sigma = torch.full((9,), level.ratio)
        noise = -level.sigma * score(x / level.alpha, sigma) / level.alpha
        x = theirs.step(noise, int(time), x, eta=eta, variance_noise=noises(x) if eta else None).prev_sample
        expected.append(x)
    states = samplers.ddim(denoise, start, schedule, random_of(1), eta=eta)
    for state, other in zip(states, expected, strict=True):
        torch.testing.assert_close(state.x, other, atol=1e-5, rtol=1e-4)


def test_ddim_and_euler_solve_the_same_equation() -> None:
    """Without fresh noise both are Euler's method on the ODE, in σ / alpha."""
    x, schedule = torch.randn(9, 2), ddpm_schedule(NOISE, 15, "trailing")
    states = [last_x(run(exact(), x, schedule, random_of(0))) for run in (samplers.ddim, samplers.euler)]
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)


def test_small_steps_of_ddpm_are_those_of_the_reverse_sde() -> None:
    """Both have the same mean and noise up to the square of β (appendix E of 2021)."""
    x, schedule = torch.randn(9, 2, dtype=torch.float64), ddpm_schedule(NOISE, 1000)
    for number in (600, 800, 900):
        step = schedule._replace(steps=schedule.steps[number : number + 1])
        one, other = (last_x(run(exact(), x, step, random_of(0))) for run in (samplers.ddpm, reverse_sde))
        beta = 1 - (step.steps[0].level.alpha / step.steps[0].next_level.alpha) ** 2
        torch.testing.assert_close(one, other, atol=40 * beta**1.5, rtol=0)
        assert float((one - x).abs().max()) > 5 * float((one - other).abs().max())

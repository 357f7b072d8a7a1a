"""Schedules beside diffusers' tables, targets against their definition, weights and the posterior in NumPy."""

import math

import numpy as np
import pytest
import torch

from keifu.layers.diffusion.noise_schedule import (
    SCHEDULES,
    Noise,
    add_noise,
    discretised_log_likelihood,
    loss_weights,
    normal_kl,
    posterior,
    predicted_x0,
    training_target,
)
from keifu.layers.diffusion.sampling_schedule import (
    CLEAN,
    continuous_schedule,
    ddim_schedule,
    ddpm_schedule,
    dpm_solver_schedule,
    timesteps,
)

NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("steps", [1000, 37])
def test_tables_are_those_of_diffusers_to_the_bit(schedule, zero: bool, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(steps, beta_schedule=NAMES[schedule], rescale_betas_zero_snr=zero)
    noise = Noise(schedule, steps, zero_terminal_snr=zero)
    assert torch.equal(noise.rounded_alpha_bar.float(), theirs.alphas_cumprod)
    exact = noise.alpha_bar
    assert exact.dtype == torch.float64 and (exact.diff() < 0).all()
    assert float(exact[-1]) == 0 if zero else torch.allclose(exact, noise.rounded_alpha_bar, rtol=1e-6, atol=0)


def test_the_cosine_is_the_papers() -> None:
    steps = 100
    f = [math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 1)]
    left = Noise("cosine", steps).alpha_bar
    np.testing.assert_allclose(left[:-1].numpy(), np.array(f[1:-1]) / f[0], rtol=1e-5)  # the last β is held at 0.999
    assert float(1 - left[-1] / left[-2]) == pytest.approx(0.999, rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"schedule": "cosin"}, "cosine"),
        ({"target": "epsilon"}, "noise"),
        ({"steps": 0}, "0 steps"),
        ({"beta_end": 1.5}, "1.5"),
        ({"betas": (0.1, 0.2)}, "2 betas"),
        ({"clip": -1.0}, "-1.0"),
        ({"spacing": "trail"}, "trailing"),
        ({"threshold": 2.0}, "2.0"),
    ],
)
def test_what_cannot_be_is_said(wrong: dict, word: str) -> None:
    with pytest.raises(Exception, match=word):  # shapes that are executed may speak first
        Noise(**wrong)


@pytest.mark.parametrize("target", ["noise", "picture", "velocity"])
def test_a_true_prediction_gives_the_picture_back(target) -> None:
    noise = Noise("cosine", 50, target=target)
    picture, added = torch.randn(2, 7, 3, 4, 5, dtype=torch.float64).unbind(0)
    timestep = torch.tensor([0, 1, 10, 25, 40, 47, 48])
    x = add_noise(picture, added, noise.alpha_bar, timestep)
    torch.testing.assert_close(
        predicted_x0(noise, training_target(noise, picture, added, timestep), x, timestep), picture
    )
    left = noise.alpha_bar[25]
    torch.testing.assert_close(x[3], left.sqrt() * picture[3] + (1 - left).sqrt() * added[3])


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
@pytest.mark.parametrize("gamma", [None, 2.0])
def test_a_weight_means_the_same_for_every_target(weighting, gamma) -> None:
    """The weighted error of one wrong picture, told as noise, picture or velocity."""
    errors = []
    for target in ("noise", "picture", "velocity"):
        noise = Noise(steps=40, beta_end=0.2, target=target)
        picture, wrong, added = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        timestep, left = torch.arange(40), noise.alpha_bar[:, None]
        x = add_noise(picture, added, noise.alpha_bar, timestep)
        implied = (x - left.sqrt() * wrong) / (1 - left).sqrt()
        difference = training_target(noise, picture, added, timestep) - training_target(noise, wrong, implied, timestep)
        errors.append(loss_weights(noise, weighting, gamma)[:, None] * difference.square())
    torch.testing.assert_close(errors[0], errors[1])
    torch.testing.assert_close(errors[0], errors[2])


def test_weights_are_the_papers() -> None:
    noise = Noise()
    snr = (noise.alpha_bar / (1 - noise.alpha_bar)).numpy()
    np.testing.assert_allclose(loss_weights(noise, "min_snr").numpy(), np.minimum(snr, 5) / snr)
    np.testing.assert_allclose(loss_weights(noise, "p2").numpy(), 1 / (1 + snr), rtol=1e-9)
    assert (loss_weights(noise) == 1).all()
    velocity = Noise(target="velocity", zero_terminal_snr=True)
    assert loss_weights(velocity, "min_snr").isfinite().all()
    with pytest.raises(Exception, match="min_snr"):
        loss_weights(noise, "min-snr")  # pyright: ignore


def test_the_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, picture) ∝ q(x_t | x_{t-1}) q(x_{t-1} | picture): precisions add up."""
    noise = Noise(steps=30, beta_end=0.3)
    left, table = noise.alpha_bar.numpy(), posterior(noise)
    before = np.concatenate([[1.0], left[:-1]])
    beta = 1 - left / before
    for t in range(1, 30):
        forward, prior = (1 - beta[t]) / beta[t], 1 / (1 - before[t])
        variance = 1 / (forward + prior)
        assert math.exp(table.log_small[t]) == pytest.approx(variance, rel=1e-9)
        assert float(table.of_x[t]) == pytest.approx(variance * forward / math.sqrt(1 - beta[t]), rel=1e-9)
        assert float(table.of_picture[t]) == pytest.approx(variance * prior * math.sqrt(before[t]), rel=1e-9)


def test_grey_values_have_probabilities_that_add_up() -> None:
    greys = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, log_variance in [(0.1, -6.0), (-0.98, -3.0), (0.9, 0.5)]:
        each = discretised_log_likelihood(greys[:, None], torch.tensor(mean), torch.tensor(log_variance))
        assert float(each.exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_kl_of_normals() -> None:
    p, q = torch.distributions.Normal(0.3, 0.7), torch.distributions.Normal(-0.5, 1.9)
    numbers = (torch.tensor(v) for v in (0.3, 2 * math.log(0.7), -0.5, 2 * math.log(1.9)))
    torch.testing.assert_close(normal_kl(*numbers), torch.distributions.kl_divergence(p, q))


def test_schedules_go_down_to_the_picture() -> None:
    noise = Noise()
    for schedule in (ddpm_schedule, ddim_schedule, continuous_schedule, dpm_solver_schedule):
        for spacing in ("leading", "trailing", "linspace", "quadratic"):
            steps = schedule(noise, 10, spacing).steps
            assert len(steps) == 10 and steps[-1].next_level == CLEAN
            assert all(step.next_level.sigma < step.level.sigma for step in steps)
            assert all(abs(step.level.alpha**2 + step.level.sigma**2 - 1) < 1e-6 for step in steps)
    stays = ddim_schedule(Noise(last_alpha_one=False), 10).steps[-1].next_level
    assert stays.timestep == 0 and stays.sigma == pytest.approx(0.01, rel=1e-3)


def test_the_quadratic_sequence_is_the_papers_code() -> None:
    expected = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), 13) ** 2]
    assert timesteps(Noise(), 13, "quadratic").flip(0).tolist() == expected


@pytest.mark.parametrize(("steps", "offset", "word"), [(0, 0, "1 to 1000"), (1001, 0, "1001"), (1000, 1, "trailing")])
def test_steps_that_there_is_no_room_for(steps: int, offset: int, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        timesteps(Noise(steps_offset=offset), steps)


def test_no_timestep_is_before_the_first() -> None:
    with pytest.raises(ValueError, match="steps_offset is -1, and there is no timestep before 0"):
        Noise(steps_offset=-1)

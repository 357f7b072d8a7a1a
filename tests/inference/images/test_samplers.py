"""Every sampler step by step beside diffusers' scheduler of that name, on one fixed random network.

Where keifu's convention is another one on purpose, the case is left out here and named in `DIFFERENT`.
"""

import math
import warnings
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from keifu.errors import UserError  # noqa: E402
from keifu.inference.images.denoiser import Denoiser, guided_denoiser  # noqa: E402
from keifu.inference.images.pixel_diffusion import SeededNoise  # noqa: E402
from keifu.inference.images.samplers import (
    SAMPLERS,
    configure_sampler,  # noqa: E402
)
from keifu.layers.diffusion.noise_schedule import Noise  # noqa: E402
from keifu.layers.diffusion.sampling_schedule import Level  # noqa: E402

warnings.filterwarnings("ignore", module="diffusers")

TARGETS = {"noise": "epsilon", "picture": "sample", "velocity": "v_prediction"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
SHAPE = (3, 2, 5, 6)  # an odd size
GENERATOR = torch.Generator().manual_seed(7)
KERNEL = torch.randn(2, 2, 3, 3, generator=GENERATOR) / 3
BOTH = torch.randn(4, 2, 3, 3, generator=GENERATOR) / 3

DIFFERENT = {
    "plms": "with linspace, diffusers' first correction begins at another level than its first step",
    "ddpm": "diffusers adds noise to the finished picture where the last timestep is not 0 (fixed_large)",
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # products this small wait for a second thread longer than they take


def network(x: Tensor, timestep: Tensor, kernel: Tensor = KERNEL) -> Tensor:
    """Return a fixed random function of x and the timestep, smooth and of the size of noise."""
    phase = timestep.to(x.dtype).reshape(-1, 1, 1, 1) / 300
    return torch.tanh(torch.nn.functional.conv2d(x, kernel.to(x.dtype), padding=1) + torch.cos(phase)) * 1.5


def kwargs(noise: Noise) -> dict:
    """Return the schedule as diffusers' arguments."""
    words = {"num_train_timesteps": noise.steps, "beta_start": noise.beta_start, "beta_end": noise.beta_end}
    words |= {"beta_schedule": SCHEDULES[noise.schedule], "prediction_type": TARGETS[noise.target]}
    return words | {"timestep_spacing": noise.spacing, "steps_offset": noise.steps_offset}


def clipping(noise: Noise) -> dict:
    return {"clip_sample": noise.clip is not None, "clip_sample_range": noise.clip or 1.0}


def thresholding(noise: Noise) -> dict:
    on = noise.threshold is not None
    return {"thresholding": on, "dynamic_thresholding_ratio": noise.threshold or 0.9} | {
        "sample_max_value": noise.threshold_max
    }


def terminal(noise: Noise) -> dict:
    return {"rescale_betas_zero_snr": noise.zero_terminal_snr}


def published(name: str, noise: Noise, karras: bool = False):
    """Return diffusers' scheduler of a sampler."""
    d, common = diffusers, kwargs(noise)
    ends = {"set_alpha_to_one": noise.last_alpha_one}
    bounds, levels = clipping(noise) | thresholding(noise), {"use_karras_sigmas": karras}
    multistep = common | thresholding(noise) | levels | terminal(noise)
    return {
        "ddpm": lambda: d.DDPMScheduler(**common, **bounds, **terminal(noise), variance_type=noise.variance),
        "ddim": lambda: d.DDIMScheduler(**common, **bounds, **terminal(noise), **ends),
        "euler": lambda: d.EulerDiscreteScheduler(**common, **levels, **terminal(noise)),
        "euler-ancestral": lambda: d.EulerAncestralDiscreteScheduler(**common, **terminal(noise)),
        "heun": lambda: d.HeunDiscreteScheduler(**common, **clipping(noise), **levels),
        "lms": lambda: d.LMSDiscreteScheduler(**common, **levels),
        "plms": lambda: d.PNDMScheduler(**common, **ends, skip_prk_steps=True),
        "dpm++-2m": lambda: d.DPMSolverMultistepScheduler(**multistep),
        "dpm++-2m-sde": lambda: d.DPMSolverMultistepScheduler(**multistep, algorithm_type="sde-dpmsolver++"),
        "unipc": lambda: d.UniPCMultistepScheduler(**multistep),
    }[name]()


def theirs(name: str, noise: Noise, steps: int, karras: bool, eta: float, start: Tensor, seeds: list[int], predict):
    """Return x after each of the scheduler's steps, as the network sees it."""
    scheduler = published(name, noise, karras)
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for each in generators:
        torch.randn(start.shape[1:], generator=each)  # the noise that the picture begins with
    more = {} if name in ("heun", "lms", "plms", "unipc") else {"generator": generators}
    if name == "ddim":
        more |= {"eta": eta, "use_clipped_model_output": True}
    if start.dtype == torch.float64:
        scheduler.sigmas = scheduler.sigmas.double()
    x, found = start * scheduler.init_noise_sigma, []
    scaled = name in ("euler", "euler-ancestral", "heun", "lms")
    for number, t in enumerate(scheduler.timesteps):
        output = predict(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(output, t, x, **more).prev_sample
        found.append(x / (scheduler.sigmas[number + 1] ** 2 + 1) ** 0.5 if scaled else x)
    if name == "heun":  # two of their steps are one
        return found[1::2] + found[-1:]
    return found[1:] if name == "plms" and steps > 1 else found  # the first is taken twice


def compare(name: str, noise: Noise, steps: int, karras: bool = False, eta: float = 0.0, predict=network, kind=None):
    """Compare both trajectories; the difference at each step is measured by the largest number in x there.

    At σ = 20,000, where the cosine schedule begins, a float32 x / alpha has few digits left for what is added to it.
    """
    seeds, random = [3, 11, 5], SeededNoise([3, 11, 5])
    start = random(torch.empty(SHAPE, dtype=kind))
    found = configure_sampler(noise, name, steps, karras=karras, eta=eta)
    walk = found.run(found.denoiser(predict), start * found.schedule.initial_sigma, found.schedule, random)
    mine = [state.x for state in walk]
    other = theirs(name, noise, steps, karras, eta, start, seeds, predict)
    assert len(mine) == len(other) == steps
    lost = 0.0
    for number, (a, b, step) in enumerate(zip(mine, other, found.schedule.steps, strict=True), 1):
        difference = float((a - b).abs().max() / b.abs().max().clamp(min=1))
        lost = max(lost, 2**-22 * step.level.ratio * step.next_level.alpha if name.startswith("euler") else 0.0)
        assert difference < 1e-5 + lost, f"step {number} of {steps}: {difference:.1e}"


def admissible(name: str, target: str, schedule: str, spacing: str) -> bool:
    """Return whether diffusers has this combination, and no difference from it is named above."""
    refused = {("plms", "picture"), ("euler-ancestral", "picture")}
    if schedule == "sigmoid" and name != "ddpm":
        return False
    return (name, target) not in refused and (name, spacing) != ("plms", "linspace")


CASES = [
    (name, target, schedule, spacing)
    for name, target, (schedule, spacing) in product(
        SAMPLERS, TARGETS, zip(SCHEDULES, ("leading", "trailing", "linspace", "leading"), strict=True)
    )
    if admissible(name, target, schedule, spacing)
]


@pytest.mark.parametrize(("name", "target", "schedule", "spacing"), CASES)
def test_each_step_is_that_of_the_published_scheduler(name, target, schedule, spacing) -> None:
    kind = torch.float64 if name in ("heun", "lms") and schedule == "cosine" else torch.float32
    compare(name, Noise(schedule, target=target, spacing=spacing, clip=None), 10, kind=kind)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, pytest.param(20, marks=pytest.mark.slow), 33])
def test_any_number_of_steps(name: str, steps: int) -> None:
    compare(name, Noise("scaled_linear", beta_start=0.00085, beta_end=0.012, clip=None), steps)


@pytest.mark.parametrize("name", [name for name, each in SAMPLERS.items() if each.karras and name != "euler-ancestral"])
@pytest.mark.parametrize(
    ("schedule", "spacing", "steps"), [("linear", "linspace", 9), ("scaled_linear", "trailing", 14)]
)
def test_karras_levels(name: str, schedule, spacing, steps: int) -> None:
    compare(name, Noise(schedule, spacing=spacing, target="velocity", clip=None), steps, karras=True)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun"])
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_clipped_pictures(name: str, clip: float) -> None:
    compare(name, Noise(clip=clip), 12)
    compare(name, Noise(clip=clip, target="velocity"), 12)


@pytest.mark.parametrize("name", [name for name, each in SAMPLERS.items() if each.threshold])
def test_thresholded_pictures(name: str) -> None:
    compare(name, Noise(clip=None, threshold=0.9, threshold_max=1.5), 12)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "euler-ancestral", "dpm++-2m", "dpm++-2m-sde", "unipc"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_nothing_of_the_picture_left_at_the_last_level(name: str, spacing) -> None:
    compare(name, Noise("scaled_linear", target="velocity", zero_terminal_snr=True, spacing=spacing, clip=None), 8)


def test_plms_begins_at_a_level_without_a_picture_as_ddim_does() -> None:
    noise = Noise("scaled_linear", target="velocity", zero_terminal_snr=True, spacing="trailing", clip=None)
    first, second, *_ = drawn("plms", noise, 8)
    assert first.isfinite().all() and second.isfinite().all()
    torch.testing.assert_close(drawn("plms", noise, 1)[0], drawn("ddim", noise, 1)[0])


@pytest.mark.parametrize("name", ["lms", "dpm++-2m", "dpm++-2m-sde", "unipc"])
def test_samplers_that_look_back_refuse_a_timestep_twice(name: str) -> None:
    with pytest.raises(UserError, match="With quadratic spacing 80 steps visit some timesteps twice"):
        configure_sampler(Noise(), name, 80, "quadratic")
    assert len(drawn(name, Noise(spacing="quadratic"), 20)) == 20


def test_a_learned_variance_of_a_step_that_goes_nowhere() -> None:
    noise = Noise(variance="learned_range", spacing="quadratic")
    *_, last = drawn("ddpm", noise, 80, partial(network, kernel=BOTH))
    assert last.isfinite().all()


def drawn(name: str, noise: Noise, steps: int, predict=network) -> list[Tensor]:
    """Return x after each step."""
    chosen = configure_sampler(noise, name, steps)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * chosen.schedule.initial_sigma
    return [x for x, _ in chosen.run(chosen.denoiser(predict), x, chosen.schedule, SeededNoise(range(SHAPE[0])))]


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_with_fresh_noise(eta: float, spacing) -> None:
    compare("ddim", Noise(spacing=spacing), 10, eta=eta)


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("target", TARGETS)
def test_variances_of_ddpm(variance, target) -> None:
    predict = partial(network, kernel=BOTH) if variance == "learned_range" else network
    compare("ddpm", Noise(variance=variance, target=target), 25, predict=predict)
    compare("ddpm", Noise(steps=12, beta_end=0.3, variance=variance, target=target), 12, predict=predict)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_settings_of_stable_diffusion(name: str) -> None:
    noise = Noise("scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, last_alpha_one=False, clip=None)
    compare(name, noise, 20)


def test_betas_that_are_given_and_offsets() -> None:
    betas = tuple(torch.linspace(1e-3, 0.3, 40).tolist())
    ours, published = Noise(steps=40, betas=betas), diffusers.DDIMScheduler(40, trained_betas=betas)
    assert torch.equal(ours.rounded_alpha_bar.float(), published.alphas_cumprod)
    compare("ddim", Noise(steps_offset=3, clip=None), 7)


FLOW = Noise("flow", target="flow", clip=None)
FLOWS = [*product((1.0, 3.0, 0.6, 2.37), (1000, 50, 7), (1, 2, 3, 7, 28, 50), (False, True))]


@pytest.mark.parametrize(("shift", "total", "steps", "karras"), [case for case in FLOWS if case[2] <= case[1]])
def test_a_flow_is_that_of_diffusers(shift, total, steps, karras) -> None:
    """Each level, each timestep that the network sees, and x after each Euler step."""
    noise = Noise("flow", total, target="flow", clip=None, shift=shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(total, shift, use_karras_sigmas=karras)
    scheduler.set_timesteps(steps)
    chosen, start = configure_sampler(noise, "euler", steps, karras=karras), torch.randn(SHAPE)
    levels = torch.tensor([step.level for step in chosen.schedule.steps], dtype=torch.float64)
    assert (levels[:, 0] - scheduler.timesteps).abs().max() <= 1e-6 * total
    assert (levels[:, 2] - scheduler.sigmas[:-1]).abs().max() <= 1e-6
    x = start * chosen.schedule.initial_sigma
    walk = chosen.run(chosen.denoiser(network), x, chosen.schedule, torch.randn_like)
    expected = start
    for t, state in zip(scheduler.timesteps, walk, strict=True):
        expected = scheduler.step(network(expected, t.expand(len(start))), t, expected).prev_sample
        assert (state.x - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler"])
def test_a_flow_that_knows_the_picture_ends_there(name) -> None:
    picture, noise = torch.rand(SHAPE) * 2 - 1, FLOW
    chosen = configure_sampler(noise, name, 5)

    def knows(x: Tensor, timestep: Tensor) -> Tensor:
        return (x - picture) / (timestep / noise.steps).reshape(-1, 1, 1, 1)  # noise - picture at every time

    *_, last = chosen.run(chosen.denoiser(knows), torch.randn(SHAPE), chosen.schedule, torch.randn_like)
    torch.testing.assert_close(last.x, picture, rtol=0, atol=1e-5)


def test_the_noise_of_a_velocity_keeps_its_digits_at_a_small_sigma() -> None:
    generator = torch.Generator().manual_seed(3)
    picture, added = torch.randn(2, *SHAPE, generator=generator)
    sigma = 1e-4
    alpha = math.sqrt(1 - sigma**2)
    denoiser = Denoiser(network, Noise(target="velocity", clip=None))
    output = alpha * added - sigma * picture
    found = denoiser.read(output, alpha * picture + sigma * added, Level(0, alpha, sigma))
    torch.testing.assert_close(found.noise, added, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["picture", "velocity", "flow"])
def test_the_targets_of_a_flow_are_one_path(target) -> None:
    """A network that says the same picture in other words draws the same, whichever alpha² + sigma² is."""
    noise, picture = Noise("flow", target=target, clip=None), torch.rand(SHAPE)

    def knows(x: Tensor, timestep: Tensor) -> Tensor:
        sigma = (timestep / noise.steps).reshape(-1, 1, 1, 1)
        added = (x - (1 - sigma) * picture) / sigma
        return {"picture": picture, "velocity": (1 - sigma) * added - sigma * picture, "flow": added - picture}[target]

    chosen, start = configure_sampler(noise, "ddim", 7), torch.randn(SHAPE)
    for state, (_, level) in zip(
        chosen.run(chosen.denoiser(knows), start, chosen.schedule, torch.randn_like), chosen.schedule.steps, strict=True
    ):
        torch.testing.assert_close(state.x, level.alpha * picture + level.sigma * start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, each in SAMPLERS.items() if not each.flow])
def test_a_sampler_that_divides_by_alpha_refuses_a_flow(name) -> None:
    with pytest.raises(UserError, match="divides by alpha.* one of ddpm, ddim, euler"):
        configure_sampler(FLOW, name, 5)


def test_settings_that_a_flow_cannot_have_are_refused() -> None:
    with pytest.raises(UserError, match="leave out the spacing trailing"):
        configure_sampler(FLOW, "euler", 5, "trailing")
    with pytest.raises(UserError, match="1 to 1000 steps, not 1001"):
        configure_sampler(FLOW, "euler", 1001)
    words: dict[str, dict[str, Any]] = {
        "target flow": {"target": "noise"}, "no β": {"variance": "learned_range"}, "shift": {"shift": 0.0}
    }  # fmt: skip
    for word, wrong in words.items():
        with pytest.raises(UserError, match=word):
            replace(FLOW, **wrong)
    with pytest.raises(UserError, match="no ᾱ"):
        _ = FLOW.alpha_bar


def test_guidance_takes_the_learned_variance_of_the_conditional_half() -> None:
    given, without = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    network = guided_denoiser(lambda x, t: torch.cat([given, without]), Noise(variance="learned_range"), 3.0)
    prediction, share = network(torch.zeros(3, 2, 2, 2), torch.zeros(3)).chunk(2, 1)
    torch.testing.assert_close(prediction, without[:, :2] + 3 * (given - without)[:, :2])
    assert torch.equal(share, given[:, 2:])

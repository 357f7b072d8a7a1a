"""Scores of points of a plane by denoising score matching (Song and Ermon, 2019), and points drawn with them.

Papers: "Generative Modeling by Estimating Gradients of the Data Distribution" (2019); pictures, ten levels of noise,
and annealed Langevin dynamics. "Score-Based Generative Modeling through Stochastic Differential Equations" (Song et
al., 2021); levels without gaps, the reverse SDE and the ODE. "Denoising Diffusion Implicit Models" (Song et al., 2020)
and "Classifier-Free Diffusion Guidance" (Ho and Salimans, 2022) are options here. Points need a small network and no
convolution, and as mixtures of normal distributions they have a known score to compare with.
Command: keifu train score --data moons
Cost: a minute on one core; the network has 35 thousand parameters.
Expected: see docs/results.md, "Samplers of a score".
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from keifu.data.classification.batches import TensorBatches
from keifu.data.classification.points import PointMixture, mixture
from keifu.data.classification.tables import LabelledTensors
from keifu.devices import choose
from keifu.evaluation.images.distances import sliced_wasserstein
from keifu.evaluation.plots.score_field import PointCloud, strip
from keifu.inference.images import samplers
from keifu.inference.images.samplers import SamplingFunction
from keifu.inference.images.score_sde import (
    ScoreDenoiser,
    guided_score,
    langevin,
    probability_flow,
    reverse_sde,
    ve_schedule,
)
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.diffusion.sampling_schedule import Schedule, ddpm_schedule
from keifu.models.diffusion import score
from keifu.ranges import BelowOne, Count, NotNegative, check
from keifu.recipes.training_options import TrainingOptions
from keifu.training.job import Job, Jobs, RunFacts, parameters
from keifu.training.objectives.diffusion import add_draws
from keifu.training.objectives.score_matching import ScoreMatching
from keifu.training.settings import Settings

SAMPLERS: dict[str, SamplingFunction] = {
    "sde": reverse_sde, "ode": probability_flow, "langevin": partial(langevin, repeats=10), "ddpm": samplers.ddpm,
    "ddim": samplers.ddim, "euler": samplers.euler,
}  # fmt: skip
Sampler = Literal["sde", "ode", "langevin", "ddpm", "ddim", "euler"]
SIGMAS, FARTHEST = (2.0, 0.5, 0.2, 0.1), 10.0  # levels of the drawn fields; sigma at the beginning of a VE process


@dataclass(frozen=True, kw_only=True)
class PointSampling:
    """How points are drawn with the score."""

    sampler: Sampler = "sde"
    """sde, ode, langevin; ddpm, ddim or euler, which solve the same equations otherwise."""
    process: Literal["vp", "ve"] = "vp"
    """Whether noise replaces the points (vp, DDPM's levels) or is only added (ve)."""
    sampling_steps: Count = 100
    """Steps of the sampler."""
    guidance: NotNegative = 1.0
    """Classifier-free guidance towards the class of each drawn point; 1 is none."""
    count: Count = 1000
    """Points that are drawn, as many of each class."""

    def schedule(self, sigma_min: float) -> Schedule:
        """Return the levels from noise to points."""
        if self.process == "ve":
            return ve_schedule(sigma_min, FARTHEST, self.sampling_steps)
        return ddpm_schedule(Noise(clip=None), self.sampling_steps, "trailing")


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    data: str = "moons"
    """Points: moons, spiral or clusters."""
    points: Count = 20_000
    """Points to learn from; a tenth as many are held out."""
    hidden_dim: Count = 128
    """Width of the hidden layers."""
    n_layers: Count = 3
    """Hidden layers."""
    label_dropout: BelowOne = 0.3
    """Share of the points whose class is hidden, for guidance."""
    sampling: PointSampling = PointSampling()
    """Sampling of the points in the pictures."""
    training: TrainingOptions = Settings(
        steps=6000, batch_size=512, learning_rate=5e-3, warmup=100, final_ratio=0.0, weight_decay=0.0,
        betas=(0.9, 0.99), ema=0.999, precision="float32", evaluate_every=500, sample_every=2000, save_every=2000,
    )  # fmt: skip
    """Settings of the training."""

    def __post_init__(self) -> None:
        check(self)


def prepare(recipe: Recipe) -> tuple[PointMixture, TensorBatches, score.ScoreNetwork]:
    """Draw the points, and build the network."""
    exact, seed = mixture(recipe.data), recipe.training.seed
    generator = Generator().manual_seed(seed)
    training, held_out = (
        LabelledTensors(*exact.draw(count, generator)) for count in (recipe.points, max(1, recipe.points // 10))
    )
    torch.manual_seed(seed)
    config = score.Config(n_classes=exact.n_classes, hidden_dim=recipe.hidden_dim, n_layers=recipe.n_layers)
    return exact, TensorBatches(training, held_out, recipe.training.batch_size, seed), score.build(config)


@torch.no_grad()
def draw(model: Any, options: PointSampling, label: Tensor, sigma_min: float, seed: int) -> list[Tensor]:
    """Draw a point of each class in `label`, and return x in units of DDPM at the beginning and after each step.

    model: a function of x, each point's sigma and class that returns the score."""
    generator, schedule = Generator().manual_seed(seed), options.schedule(sigma_min)

    def random(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    denoise = ScoreDenoiser(guided_score(model, label, options.guidance), Noise(clip=None))
    x = schedule.initial_sigma * random(torch.empty(len(label), 2))
    states = [x, *(state.x for state in SAMPLERS[options.sampler](denoise, x, schedule, random))]
    levels = [schedule.steps[0].level, *(step.next_level for step in schedule.steps)]
    return [x / (level.alpha**2 + level.sigma**2) ** 0.5 for x, level in zip(states, levels, strict=True)]


def sampler(model: score.ScoreNetwork, exact: PointMixture, recipe: Recipe) -> Callable[[int], bytes]:
    """Return a function that draws the field of the score, learned and exact, and points on their way from noise."""
    label = torch.arange(recipe.sampling.count) % exact.n_classes
    shown, of_shown = exact.draw(1000, Generator().manual_seed(recipe.training.seed))

    @torch.no_grad()
    def sample(step: int) -> bytes:
        network = model.to("cpu")
        states = draw(network, recipe.sampling, label, network.config.sigma_min, recipe.training.seed)
        last = len(states) - 1
        shown_states = [0, last // 2, last * 4 // 5, last]
        clouds = [PointCloud(f"step {number} of {last}", states[number], label) for number in shown_states]
        scores = {"exact score": exact.score, "learned": lambda x, sigma: network(x, sigma)}
        return strip(PointCloud("", shown, of_shown), scores, SIGMAS, clouds)

    return sample


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, and print how far the drawn points are from the distribution."""
    exact, data, model = prepare(recipe)
    seed = recipe.training.seed
    objective = ScoreMatching(model.config.sigma_min, model.config.sigma_max, recipe.label_dropout)
    yield Job(
        model=model.to(choose()), objective=objective, data=add_draws(data, seed), settings=recipe.training,
        sample=sampler(model, exact, recipe),
        facts=RunFacts(
            title=f"A network learns the score of “{recipe.data}”",
            about={
                "paper": "Song and Ermon, Generative Modeling by Estimating Gradients of the Data Distribution (2019)",
                "parameters": parameters(model),
            },
            data={"source": recipe.data, "points": len(data.training), "held out": len(data.held_out)},
            options={"model": asdict(model.config), "label_dropout": recipe.label_dropout}, unit="points",
        ),
    )  # fmt: skip
    label = torch.arange(recipe.sampling.count) % exact.n_classes
    points = draw(model.to("cpu"), recipe.sampling, label, model.config.sigma_min, seed)[-1]
    real, others = (exact.draw(len(label), Generator().manual_seed(seed + number))[0] for number in (1, 2))
    print(
        f"Sliced Wasserstein distance of {len(label):,} drawn points from the distribution: "
        f"{sliced_wasserstein(real, points):.3f}; of as many exact ones: {sliced_wasserstein(real, others):.3f}."
    )

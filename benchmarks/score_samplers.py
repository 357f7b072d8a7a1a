"""Samplers of a score: distance of drawn points from the distribution by number of steps, learned and exact score.

python benchmarks/score_samplers.py [--data moons] [--seeds 0 1 2] [--steps 5 10 20 50 100] [--count 5000]
    [--training 3000] [--write JSON] [--picture PNG]

The points are a mixture of normal distributions whose score is known, so the error of a sampler's steps (with the exact
score) and the error of the network (which is left with many steps) are apart. For each seed a network of 35 thousand
weights learns from 20,000 points, and each sampler draws `--count` points from the same noise. The figures are the
sliced Wasserstein distance from as many exact points, times 1,000; "exact points" is that of two exact sets. VP is
DDPM's process of 1,000 timesteps, trailing; VE has geometric levels from 10 to 0.01. A step evaluates the score once.
The picture has the learned and the exact score of the first seed, and points on their way by the reverse SDE, VP.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _results import of_seeds, print_rows, typed, usual, write_table
from _rounds import machine
from torch import Generator, Tensor

from keifu.data.classification.points import PointMixture
from keifu.evaluation.images.distances import sliced_wasserstein
from keifu.evaluation.plots.score_field import PointCloud, strip
from keifu.inference.images import samplers
from keifu.inference.images.samplers import last_x
from keifu.inference.images.score_sde import ScoreDenoiser, probability_flow, reverse_sde, ve_schedule
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.diffusion.sampling_schedule import Schedule, ddpm_schedule
from keifu.recipes.images import score
from keifu.training.objectives.diffusion import add_draws
from keifu.training.objectives.score_matching import ScoreMatching
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

NOISE = Noise(clip=None)


def vp(steps: int) -> Schedule:
    """Return DDPM's levels."""
    return ddpm_schedule(NOISE, steps, "trailing")


def ve(steps: int) -> Schedule:
    """Return geometric levels."""
    return ve_schedule(0.01, score.FARTHEST, steps)


WAYS: dict[str, tuple[Callable[..., Iterator[samplers.SamplerStep]], Callable[[int], Schedule]]] = {
    "reverse SDE, VE": (reverse_sde, ve),
    "ODE, VE": (probability_flow, ve),
    "DDIM, VE": (samplers.ddim, ve),
    "reverse SDE, VP": (reverse_sde, vp),
    "ODE, VP": (probability_flow, vp),
    "DDPM, VP": (samplers.ddpm, vp),
    "DDIM, VP": (samplers.ddim, vp),
}


def learned(data: str, steps: int, seed: int) -> tuple[PointMixture, Any]:
    """Return the distribution, and a network that has learned its score."""
    settings = Settings(
        steps=steps, batch_size=512, micro_batch=512, learning_rate=5e-3, warmup=min(100, steps), final_ratio=0.0,
        weight_decay=0.0, betas=(0.9, 0.99), precision="float32", seed=seed,
    )  # fmt: skip
    exact, batches, model = score.prepare(score.Recipe(data, training=settings))
    rows, objective = add_draws(batches, seed), ScoreMatching(model.config.sigma_min, model.config.sigma_max, 0.3)
    trainer, start = Trainer(model.train(), objective, settings), time.process_time()
    for step in range(steps):
        gradient = trainer.gradient(step, rows.batch(step))
        assert gradient is not None
        trainer.update(gradient)
    print(f"seed {seed}: {time.process_time() - start:.0f} s of training", flush=True)
    return exact, model.eval()


@torch.no_grad()
def distances(network: Any, exact: PointMixture, options: argparse.Namespace, seed: int) -> dict[str, list[float]]:
    """Return the distances of each way by number of steps."""
    real, other = (exact.draw(options.count, Generator().manual_seed(seed + 100 * k))[0] for k in (1, 2))
    floor = 1000 * sliced_wasserstein(real, other)
    found = {"exact points": [floor] * len(options.steps)}
    for kind, of_points in (("exact", exact.score), ("learned", network)):
        denoise = ScoreDenoiser(of_points, NOISE)
        for name, (run, levels) in WAYS.items():
            row = []
            for steps in options.steps:
                generator, schedule = Generator().manual_seed(seed), levels(steps)

                def random(x: Tensor, generator: Generator = generator) -> Tensor:
                    return torch.randn(x.shape, generator=generator)

                x = schedule.initial_sigma * random(torch.empty(options.count, 2))
                row.append(1000 * sliced_wasserstein(real, last_x(run(denoise, x, schedule, random))))
            found[f"{name}, {kind} score"] = row
    return found


def picture(network: Any, exact: PointMixture) -> bytes:
    """Draw the fields of the exact and the learned score, and points on the way from noise by the SDE."""
    recipe = score.Recipe(sampling=score.PointSampling(count=1000))
    label = torch.arange(1000) % exact.n_classes
    states = score.draw(network, recipe.sampling, label, network.config.sigma_min, seed=0)
    clouds = [PointCloud(f"step {number} of 100", states[number], label) for number in (0, 60, 85, 100)]
    points = PointCloud("", *exact.draw(1000, Generator().manual_seed(0)))
    with torch.no_grad():
        scores = {"exact score": exact.score, "learned": lambda x, sigma: network(x, sigma)}
        return strip(points, scores, score.SIGMAS, clouds)


def main() -> None:
    """Train, draw, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="moons")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 100])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--training", type=int, default=3000)
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[list[float]]] = {}
    for seed in options.seeds:
        exact, network = learned(options.data, options.training, seed)
        for name, row in distances(network, exact, options, seed).items():
            for column, value in zip(found.setdefault(name, [[] for _ in row]), row, strict=True):
                column.append(value)
            print(f"seed {seed}, {name}: {[round(value) for value in row]}", flush=True)
        if options.picture and seed == options.seeds[0]:
            options.picture.write_bytes(picture(network, exact))
    rows, values = of_seeds(found, ".0f")
    columns = ["1000 · distance", *(f"{steps} steps" for steps in options.steps)]
    print(f"{machine()}\n")
    print_rows([columns, *rows])
    if options.write:
        command = typed("score_samplers.py", vars(options), usual(parser))
        write_table(options.write, "Samplers of a score", command, columns, rows, values)


if __name__ == "__main__":
    main()

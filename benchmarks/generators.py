"""Digits from noise: two GANs, a VAE with the same generator and a DDPM, after equal times of one core.

python benchmarks/generators.py [--minutes 0.5] [--seeds 0 1 2] [--pictures 300] [--ways ...] [--write JSON]
    [--picture PNG]

Every network learns from the same digits for the same time of one core (`time.process_time`). Then it draws as many
digits as --pictures. A convolutional classifier of eleven classes, which keifu trains first, reads them. Its last class
is "no digit": means of two digits, digits put together from two halves, and noise. A drawing is readable if its
likeliest class is a digit. "digits" is the exponential of the entropy of the likeliest digits: 10 if all are equally
frequent, and 1 if there is only one. "apart" is the root mean squared difference of the pixels of two drawings, from 0
to 255. Held-out digits, and the same three kinds of pictures made of them, show what the figures are worth. The
packaged `digits`, a DDPM that was trained for 6,000 steps, draws each digit by its label: it has had far more time.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from _results import of_seeds, print_rows, typed, usual, write_table
from _rounds import machine
from flow import learn
from torch import Tensor, nn
from torch.nn import functional as F

import keifu
from keifu.checkpoints.loading import load_model
from keifu.data.images.grid import grid
from keifu.data.images.io import to_signed
from keifu.data.images.splits import ImageSplit
from keifu.evaluation.images.distances import kernel_distance
from keifu.evaluation.images.features import extractor
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline, SeededNoise, to_pixels
from keifu.inference.images.single_pass import GeneratorPipeline
from keifu.layers.counter_rng import normal
from keifu.models.classic import gan
from keifu.recipes.images import ddpm, gan as gan_recipe
from keifu.training.settings import Settings

SIZES: dict[str, Any] = {"widths": (16, 32)}  # a quarter of the recipe's
BATCH, RATE, STEPS = 32, 1e-3, 20  # pictures in a step, Adam's rate, steps of DDIM
JUDGE = Settings(steps=1000, batch_size=64, learning_rate=1e-3, warmup=50, final_ratio=0.0, evaluate_every=500)
SHOWN = 16  # drawings of a row of the picture
COLUMNS = ("network", "readable, %", "digits", "apart", "1000 · kernel distance", "µs per drawing")
HELD_OUT, NO_DIGITS, PACKAGED = "held-out digits", "no digits, made of held-out ones", "DDPM with labels, packaged"


class VAE(nn.Module):
    """Variational autoencoder (Kingma and Welling, 2013) whose decoder is DCGAN's generator, and whose encoder has the
    convolutions of its discriminator."""

    def __init__(self, config: gan.Config):
        super().__init__()
        self.config = config
        self.encoder = nn.Sequential(
            gan.dcgan_features(config), nn.Linear(config.widths[-1] * config.base**2, 2 * config.latent_dim)
        )
        self.decoder = gan.dcgan_generator(config)

    def loss(self, pictures: Tensor, draws: Tensor) -> Tensor:
        """Return the mean of the bound: the Bernoulli likelihood of the pixels, and the divergence of the latents."""
        mean, log_variance = self.encoder(to_signed(pictures)).chunk(2, 1)
        latent = mean + (0.5 * log_variance).exp() * normal(draws, mean.shape[1:])
        logits = 2 * self.decoder[:-1](latent)  # sigmoid(2x) is (tanh(x) + 1) / 2
        error = F.binary_cross_entropy_with_logits(logits, pictures / 255, reduction="sum")
        return (error + 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()) / len(pictures)


class Painter(NamedTuple):
    """A trained way of drawing: a function of seeds, and the number of updates that it took."""

    draw: Callable[[range], Tensor]
    updates: int


def adversarial(seconds: float, seed: int, **sizes: Any) -> Painter:
    """Train a GAN as `keifu train gan` does, with smaller networks at a higher rate."""
    settings = Settings(batch_size=BATCH, seed=seed)
    task = gan_recipe.prepare(gan_recipe.Recipe(model=gan.Config(**SIZES, **sizes), training=settings))
    optimizer = torch.optim.Adam(task.model.parameters(), RATE, betas=gan_recipe.Recipe().training.betas)

    def loss(step: int) -> Tensor:
        found = task.objective(task.model, task.data.batch(step))
        return found.total / found.weight

    updates = train(task.model, optimizer, loss, seconds)
    pipeline = GeneratorPipeline(task.model)
    return Painter(lambda seeds: pipeline.draw(pipeline.resolved(ImageRequest(seed=0)), seeds), updates)


def variational(seconds: float, seed: int) -> Painter:
    """Train a VAE with DCGAN's generator."""
    task = gan_recipe.prepare(
        gan_recipe.Recipe(model=gan.Config(**SIZES), training=Settings(batch_size=BATCH, seed=seed))
    )
    model = VAE(task.model.config)
    optimizer = torch.optim.Adam(model.parameters(), RATE)

    def loss(step: int) -> Tensor:
        batch = task.data.batch(step)
        return model.loss(batch["pictures"], batch["draws"])

    updates = train(model, optimizer, loss, seconds)

    @torch.inference_mode()
    def draw(seeds: range) -> Tensor:
        return to_pixels(model.decoder(SeededNoise(seeds)(torch.empty(len(seeds), model.config.latent_dim))))

    return Painter(draw, updates)


def denoising(seconds: float, seed: int) -> Painter:
    """Train a DDPM as `keifu train ddpm` does, with half its width."""
    recipe = ddpm.Recipe(data="mnist", dim=16, batch_size=32, steps=1, seed=seed)
    model, updates = learn(ddpm.prepare(recipe.resolved()), seconds)
    pipeline = PixelPipeline(model)
    return Painter(lambda seeds: pipeline.draw(ImageRequest("ddim", STEPS), seeds), updates)


def train(model: nn.Module, optimizer: Any, loss: Callable[[int], Tensor], seconds: float) -> int:
    """Train for `seconds` of one core, and return the number of updates."""
    start, step = time.process_time(), 0
    model.train()
    while time.process_time() - start < seconds or not step:
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        step += 1
    model.eval()
    return step


WAYS: dict[str, Callable[[float, int], Painter]] = {
    "GAN (2014)": lambda seconds, seed: adversarial(seconds, seed, network="mlp", hidden_dim=400),
    "DCGAN": adversarial,
    "VAE with DCGAN's generator": variational,
    "DDPM": denoising,
}


def packaged(seeds: range) -> Tensor:
    """Draw digits with the packaged DDPM, a tenth with each label."""
    pipeline = PixelPipeline(load_model("digits"))
    classes = len(pipeline.model.config.classes)
    return torch.cat([pipeline.draw(ImageRequest("ddim", STEPS, label=n), seeds[n::classes]) for n in range(classes)])


def no_digits(digits: Tensor, seed: int) -> Tensor:
    """Return as many pictures that are no digits: means of two, halves of two, and noise with their grey values."""
    random = torch.Generator().manual_seed(seed)
    other, third = digits[torch.randperm(len(digits), generator=random)], len(digits) // 3
    means = (digits[:third].float() + other[:third].float()) / 2
    halves = digits[third : 2 * third].clone()
    halves[:, :, 14:] = other[third : 2 * third, :, 14:]
    rest = digits[2 * third :].flatten(1)
    order = torch.rand(rest.shape, generator=random).argsort(1)
    return torch.cat([means.to(torch.uint8), halves, rest.gather(1, order).view_as(digits[2 * third :])])


class Judge:
    """Figures of drawings: what a classifier reads in them, and how far they are from each other and real digits."""

    def __init__(self, parts: ImageSplit, folder: str):
        digits = parts.train.take(slice(None))
        labels = torch.from_numpy(parts.train.labels)
        pictures = torch.cat([digits, no_digits(digits, 0)])
        self.extract = extractor()
        self.real = self.extract(digits)
        torch.manual_seed(0)
        config = gan.Config(widths=(32, 64))
        self.network = nn.Sequential(gan.dcgan_features(config), nn.Linear(64 * config.base**2, 11))
        data = {"pictures": pictures, "labels": torch.cat([labels, torch.full((len(digits),), 10)])}
        keifu.train(
            self.network,
            lambda model, batch: F.cross_entropy(model(to_signed(batch["pictures"])), batch["labels"]),
            data, JUDGE, folder, replace=True,
        )  # fmt: skip
        self.network.eval()

    @torch.inference_mode()
    def figures(self, pictures: Tensor) -> list[float]:
        """Return the share of readable drawings, the digits, the difference of two, and the kernel distance."""
        logits = self.network(to_signed(pictures))
        counts = torch.bincount(logits[:, :10].argmax(1), minlength=10) / len(pictures)
        entropy = -(counts * counts.clamp(min=1e-12).log()).sum()
        flat = pictures.flatten(1).float()
        apart = (flat - flat.roll(1, 0)).square().mean(1).sqrt().mean()
        readable = (logits.argmax(1) < 10).float().mean()
        distance = 1e3 * kernel_distance(self.real, self.extract(pictures)).mean
        return [100 * float(readable), float(entropy.exp()), float(apart), distance]


def drawings_of(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the drawings of a way and a seed, its updates and its microseconds per drawing; kept ones if there are."""
    kept = options.keep / f"{list(WAYS).index(name)}-{seed}.pt" if options.keep else None
    if kept and kept.exists():
        return torch.load(kept, weights_only=True)
    painter = WAYS[name](60 * options.minutes, seed)
    seeds, start = range(options.pictures * seed, options.pictures * (seed + 1)), time.process_time()
    drawn = torch.cat([painter.draw(seeds[n : n + 100]) for n in range(0, len(seeds), 100)])
    cost = 1e6 * (time.process_time() - start) / len(seeds)
    found = {"drawn": drawn, "updates": painter.updates, "microseconds": cost}
    if kept:
        torch.save(found, kept)
    return found


def measure(
    options: argparse.Namespace,
) -> tuple[dict[str, list[list[float]]], dict[str, list[int]], dict[str, Tensor]]:
    """Return by way the values of the seeds for each figure, the updates, and drawings of the first seed."""
    every = {name: [drawings_of(name, seed, options) for seed in options.seeds] for name in options.ways}
    if options.draw_only:
        raise SystemExit
    parts = gan_recipe.prepare(gan_recipe.Recipe()).parts
    with TemporaryDirectory() as folder:
        judge = Judge(parts, folder)
    held = torch.cat([parts.validation.take(slice(None)), parts.test.take(slice(None))])
    sets = {HELD_OUT: [held], NO_DIGITS: [no_digits(held, 1)]}
    sets |= {name: [each["drawn"] for each in seeds] for name, seeds in every.items()}
    start, count = time.process_time(), options.packaged
    sets[PACKAGED] = [packaged(range(count))]
    costs = {name: [each["microseconds"] for each in seeds] for name, seeds in every.items()}
    costs[PACKAGED] = [1e6 * (time.process_time() - start) / count]
    found = dict[str, list[list[float]]]()
    for name, seeds in sets.items():
        figures = [judge.figures(drawn) for drawn in seeds]
        found[name] = [list(column) for column in zip(*figures, strict=True)] + ([costs[name]] if name in costs else [])
        print(f"{name}: {figures}", flush=True)
    updates = {name: [each["updates"] for each in seeds] for name, seeds in every.items()}
    shown = {name: seeds[0][:: len(seeds[0]) // SHOWN][:SHOWN] for name, seeds in sets.items() if name != NO_DIGITS}
    return found, updates, shown


def main() -> None:
    """Train, draw, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.5, help="of a core, for each network and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    parser.add_argument("--packaged", type=int, default=100, help="drawings of the packaged model")
    parser.add_argument("--keep", type=Path, help="folder in which drawings are kept, to go on with them")
    parser.add_argument("--draw-only", action="store_true", help="train and keep drawings alone")
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, updates, drawings = measure(options)
    rows, values = of_seeds({name: found[name] for name in options.ways}, ".1f")
    references = {name: [round(value, 5) for (value,) in found[name]] for name in (HELD_OUT, NO_DIGITS, PACKAGED)}
    print(f"{machine()}\n")
    print_rows([COLUMNS, *rows])
    print(references)
    if options.write:
        command = typed("generators.py", vars(options), usual(parser) | {"keep": options.keep})
        write_table(
            options.write,
            "A generator against a discriminator",
            command,
            COLUMNS,
            rows,
            values | {"references": references, "updates": updates},
        )
    if options.picture:
        options.picture.write_bytes(grid(torch.cat([*drawings.values()]), columns=SHOWN))


if __name__ == "__main__":
    main()

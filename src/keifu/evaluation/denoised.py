"""How well a model takes noise off pictures that it never saw: PSNR and SSIM of what it finds again, and the bits that
a picture costs at most. It knows no model by name.

Axes: picture, channels, height, width.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import UInt8
from torch import Tensor

from keifu.data.images import signed, to_bytes
from keifu.data.pictures import Pictures
from keifu.data.progress import counting
from keifu.errors import UserError
from keifu.evaluation.likelihood import bits_per_dimension
from keifu.evaluation.reconstruction import WINDOW, psnr, ssim
from keifu.evaluation.task import Table
from keifu.generation.denoiser import Denoising, of_label
from keifu.generation.sampler_table import Route, route
from keifu.generation.seeds import Seeds
from keifu.layers.counted_random import normal
from keifu.layers.noise_levels import Level, Path
from keifu.training.diffusion import HELD_OUT, draws

LEFT = 0.9, 0.5, 0.1  # ᾱ, the shares of a picture's variance that are left in the noise it is found again in
STEPS = 50  # of the whole path, from pure noise
COLUMNS = "picture left in the noise", "timestep", "PSNR of the noisy picture", "PSNR", "SSIM"
Bytes = UInt8[Tensor, "picture channels height width"]


@dataclass(frozen=True)
class Again:
    """Pictures that were noised to a level, and what was found in them again, bytes both."""

    level: Level
    noisy: Bytes
    found: Bytes


def reconstructed(
    model: Denoising, pictures: Pictures, seed: int, batch_size: int, steps: int | None = None
) -> tuple[dict[str, float | int | str], Table]:
    """Mean PSNR in decibels and SSIM of pictures that were noised to each level of `LEFT` and denoised without chance.

    By DDIM (η = 0), along what is left from there of a path of so many steps. Figures are those of the middle level.
    SSIM has no number for pictures smaller than its window.
    """
    way, rows = route(model.noise, "ddim", steps or min(STEPS, model.noise.steps)), []
    with counting("Finding pictures again", len(LEFT) * len(pictures), "pictures") as advance:
        for place, left in enumerate(LEFT):
            parts: list[Again] = []
            for first, given, label in _batches(model, pictures, batch_size):
                parts.append(again(model, way, given, label, left, draws(seed, HELD_OUT, len(given), first)))
                advance(place * len(pictures) + first + len(given))
            rows.append(_row(pictures.take(slice(None)), parts))
    figures = dict(zip(COLUMNS[2:], rows[1][2:], strict=True))
    return {name: value for name, value in figures.items() if value is not None}, Table(COLUMNS, rows)


@torch.inference_mode()
def again(model: Denoising, way: Route, pictures: Bytes, label: Tensor | None, left: float, seeds: Tensor) -> Again:
    """Pictures with noise of these seeds, at the noisiest level of the path where at least the share `left` of their
    variance is left, and what the path leads to from there."""
    strides = [stride for stride in way.path.strides if stride.here.alpha**2 >= left] or [*way.path.strides[-1:]]
    level, clean = strides[0].here, signed(pictures)
    x = level.alpha * clean + level.sigma * normal(seeds.to(clean.device), clean.shape[1:])
    walk = way.walk(way.denoiser(of_label(model, label)), x, Path(tuple(strides)), Seeds(seeds.tolist()))
    return Again(level, to_bytes(x).cpu(), to_bytes(deque(walk, maxlen=1)[0].x).cpu())


def bits(model: Denoising, pictures: Pictures, seed: int, batch_size: int) -> dict[str, float | int | str]:
    """The variational bound in bits per number of a picture, its three parts, and the standard error of its mean."""
    batches = [(signed(given), label) for _, given, label in _batches(model, pictures, batch_size)]
    with counting("Counting bits", model.noise.steps * len(batches), "steps") as advance:
        reached = iter(range(1, 1 + model.noise.steps * len(batches)))
        found = bits_per_dimension(
            lambda label: of_label(model, label), model.noise, batches, seed, lambda: advance(next(reached))
        )
    return {f"bits/dim{', ' * bool(part)}{part}": round(value, 4) for part, value in found.items()}


def told_labels(model: Denoising, pictures: Pictures) -> Tensor | None:
    """Each picture's class as the model numbers it; None where the model is told none.

    A model without names for its classes has the pictures' own order. What it must be told and the pictures do not say
    is a `UserError`.
    """
    if not model.config.n_classes:
        return None
    known = model.config.classes or pictures.classes[: model.config.n_classes]
    names = [pictures.classes[label] if label >= 0 else "" for label in pictures.labels]
    if all(name in known for name in names):
        return torch.tensor([known.index(name) for name in names])
    if model.config.null_class:
        return None
    raise UserError(
        f"This model must be told a class of each picture, and those of {pictures.source} are not of its classes."
    )


def _batches(model: Denoising, pictures: Pictures, size: int) -> Iterator[tuple[int, Bytes, Tensor | None]]:
    """The first one's place, the pictures and their labels, on the model's device."""
    labels, device = told_labels(model, pictures), next(cast(Any, model).parameters()).device
    for first in range(0, len(pictures), size):
        part = slice(first, first + size)
        yield first, pictures.take(part).to(device), None if labels is None else labels[part].to(device)


def _row(given: Bytes, parts: list[Again]) -> tuple[float, int, float, float, float | None]:
    """A level's cells."""
    level, found = parts[0].level, torch.cat([part.found for part in parts])
    large = min(given.shape[2:]) >= WINDOW
    before, after = (_mean(psnr(given, each)) for each in (torch.cat([part.noisy for part in parts]), found))
    return round(level.alpha**2, 3), int(level.timestep), before, after, _mean(ssim(given, found), 4) if large else None


def _mean(values: Tensor, digits: int = 2) -> float:
    return round(math.fsum(values.tolist()) / len(values), digits)

"""From noise to pictures in steps that use what the network sees now: DDPM, DDIM, Euler, Heun; knows no network.

A sampler is a generator: it takes a denoiser, x at the first level, the path and the noise to draw from, and yields x
and the predicted picture after each step. x is what the network sees, x = alpha · picture + sigma · noise; where papers
write x / alpha (Karras et al., 2022), the arithmetic here is that, multiplied out.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.generation.denoiser import Denoiser, Seen, deviation
from keifu.layers.noise_levels import Level, Path

Random: TypeAlias = Callable[[Tensor], Tensor]  # normal noise in the shape of x, each picture's from its own seed


class Drawn(NamedTuple):
    """Where a sampler stands after a step: x at the level it went to, and the picture that the network saw in it."""

    x: Float[Tensor, "batch *shape"]
    picture: Float[Tensor, "batch *shape"]


Walk: TypeAlias = Callable[[Denoiser, Tensor, Path, Random], Iterator[Drawn]]


def ddpm(denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: Path, random: Random) -> Iterator[Drawn]:
    """Ho et al. (2020), algorithm 2, from level to level: the posterior given the predicted picture, equation 7.

    Its variance is as the denoiser's `Noise` says. A step that ends at the clean picture adds no noise; diffusers adds
    it there unless the step begins at timestep 0.
    """
    for here, there in path.strides:
        seen = denoise(x, here)
        beta = 1 - (here.alpha / there.alpha) ** 2
        kept = here.alpha / there.alpha * there.sigma**2 / here.sigma**2
        x = there.alpha * beta / here.sigma**2 * seen.picture + kept * x
        if there.sigma:
            x = x + _spread(seen, denoise.noise.variance, here, there) * random(x)
        yield Drawn(x, seen.picture)


def _spread(seen: Seen, variance: str, here: Level, there: Level) -> Tensor | float:
    """The standard deviation of a DDPM step: √β̃, √β, or what the network says lies between, in logarithms (Nichol and
    Dhariwal, 2021, equation 15)."""
    small, large = deviation(here, there), math.sqrt(1 - (here.alpha / there.alpha) ** 2)
    if variance == "learned_range":
        assert seen.share is not None
        low, high = math.log(max(small, 1e-10)), math.log(large)
        return torch.exp(low + (seen.share + 1) / 2 * (high - low))
    return small if variance == "fixed_small" else large


def ddim(
    denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: Path, random: Random, eta: float = 0.0
) -> Iterator[Drawn]:
    """Song et al. (2021), equation 12; `eta` of the noise that equation 16 has for DDPM, 0 for none.

    The noise in x is the network's own, also where the picture was clipped.
    """
    for here, there in path.strides:
        seen = denoise(x, here)
        fresh = eta * deviation(here, there)
        x = there.alpha * seen.picture + math.sqrt(max(0.0, there.sigma**2 - fresh**2)) * seen.noise
        x = x + fresh * random(x) if eta else x
        yield Drawn(x, seen.picture)


def euler(denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: Path, random: Random) -> Iterator[Drawn]:
    """Euler's method on the probability flow (Karras et al., 2022, algorithm 1 of one order, without churn)."""
    for here, there in path.strides:
        picture = denoise(x, here).picture
        x = along(x, slope(x, picture, here), here, there)
        yield Drawn(x, picture)


def euler_ancestral(denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: Path, random: Random) -> Iterator[Drawn]:
    """Euler's method to a level below, and noise up to the level that was meant: k-diffusion's (Crowson, 2022).

    In exact arithmetic this is DDIM with η = 1 on the continuous path.
    """
    for here, there in path.strides:
        picture = denoise(x, here).picture
        up = there.ratio * math.sqrt(max(0.0, 1 - (there.ratio / here.ratio) ** 2))
        down = there.ratio**2 / here.ratio
        step = along(x, slope(x, picture, here), here, Level(there.timestep, there.alpha, there.alpha * down))
        x = step + there.alpha * up * random(x)
        yield Drawn(x, picture)


def heun(denoise: Denoiser, x: Float[Tensor, "batch *shape"], path: Path, random: Random) -> Iterator[Drawn]:
    """Karras et al. (2022), algorithm 1 without churn: the mean of the slopes at both ends; two evaluations a step,
    one in the last."""
    for here, there in path.strides:
        picture = denoise(x, here).picture
        first = slope(x, picture, here)
        end = along(x, first, here, there)
        if there.sigma:
            picture = denoise(end, there).picture
            end = along(x, (first + slope(end, picture, there)) / 2, here, there)
        x = end
        yield Drawn(x, picture)


def slope(x: Float[Tensor, "batch *shape"], picture: Float[Tensor, "batch *shape"], level: Level) -> Tensor:
    """The noise in x beside this picture: d(x / alpha) / dσ of the probability flow."""
    return (x - level.alpha * picture) / level.sigma


def along(x: Float[Tensor, "batch *shape"], noise: Tensor, here: Level, there: Level) -> Tensor:
    """x moved to another level along a constant slope; with the network's noise, DDIM's deterministic step."""
    scale = there.alpha / here.alpha
    return scale * x + (there.sigma - scale * here.sigma) * noise

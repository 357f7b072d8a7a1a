"""Which noise levels a sampler visits, and from which to which it goes; knows no network and no sampler's arithmetic.

A level is a share of picture and one of noise, x = alpha · picture + sigma · noise with alpha² + sigma² = 1, and the
timestep that the network is told. Samplers that are published with x / alpha and the ratio sigma / alpha (Karras et
al., 2022) are written with these too: one notation, and x always is what the network sees.

Three families of timesteps are in use, and so are here: whole ones (DDPM, DDIM, PLMS), a continuous scale (Euler, Heun,
LMS) and whole ones without the lowest (DPM-Solver++, UniPC).
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.errors import UserError
from keifu.layers.diffusion.noise_schedule import Noise, Spacing

RHO = 7.0  # how far Karras levels crowd towards little noise (Karras et al., 2022, table 1)
LEAST_ALPHA_BAR = 2.0**-24  # in place of 0 where a sampler divides by it: the smallest number of half precision


class Level(NamedTuple):
    """x = alpha · picture + sigma · noise, which the network knows as this timestep."""

    timestep: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha: the σ of Karras et al. (2022)."""
        return self.sigma / self.alpha

    @property
    def log_snr(self) -> float:
        """λ = ln(alpha / sigma), half the logarithm of the signal-to-noise ratio (Lu et al., 2022); ∞ without noise."""
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


class Stride(NamedTuple):
    """One step of a sampler: from this level to that one."""

    here: Level
    there: Level


class SamplingPath(NamedTuple):
    """All steps of a sampler, and the standard deviation of the noise that it begins with."""

    strides: tuple[Stride, ...]
    start: float = 1.0


CLEAN = Level(-1.0, 1.0, 0.0)


def timesteps(
    noise: Noise, steps: int, spacing: Spacing | None = None, rounded: bool = True
) -> Float[Tensor, " steps"]:
    """So many of the schedule's timesteps, the noisiest first, float64 (Lin et al., 2023, table 2).

    leading: 0, T // steps, ..., raised by `steps_offset`; trailing: T - 1 downwards by T / steps; linspace: both ends
    and whatever lies evenly between, whole where `rounded`; quadratic: (√(0.8 T) · i / (steps - 1))², whole (Song et
    al., 2021, D.2). A number that there is no room for is a ValueError.
    """
    total = noise.steps
    if not 1 <= steps <= total:
        raise UserError(f"The model knows {total} noise levels, so it takes 1 to {total} steps, not {steps}.")
    count, kind = torch.arange(steps, dtype=torch.float64, device="cpu"), spacing or noise.spacing
    if kind == "trailing":
        return (total - count * (total / steps)).round() - 1
    if kind == "leading":
        return _inside(count * (total // steps) + noise.steps_offset, noise).flip(0)
    share = count / (steps - 1) if steps > 1 else count + 1
    if kind == "quadratic":
        return (share * math.sqrt(0.8 * total)).square().floor().flip(0)
    even = (count * ((total - 1) / (steps - 1)) if steps > 1 else count + total - 1).flip(0)
    return even.round() if rounded else even


def _inside(found: Tensor, noise: Noise) -> Tensor:
    if found.max() >= noise.steps:
        raise UserError(
            f"{len(found)} steps with the offset {noise.steps_offset} begin at timestep {int(found.max())}, and the "
            f"last is {noise.steps - 1}: take fewer steps, or trailing spacing."
        )
    return found


def whole_path(noise: Noise, steps: int, spacing: Spacing | None = None, last_alpha_one: bool = True) -> SamplingPath:
    """From each timestep to the next, and at last to the clean picture, or to timestep 0's noise: DDPM's path."""
    visited = [_whole(noise, int(t)) for t in timesteps(noise, steps, spacing)]
    end = CLEAN if last_alpha_one else _whole(noise, 0)
    return SamplingPath(_chain([*visited, end]))


def jumping_path(noise: Noise, steps: int, spacing: Spacing | None = None) -> SamplingPath:
    """From each timestep down by T // steps, whichever comes next: DDIM's and PLMS's path as diffusers has it.

    With leading spacing, and with trailing where `steps` divides T, that is the next timestep; with linspace it is not.
    The end obeys `noise.last_alpha_one`.
    """
    if (spacing or noise.spacing) == "quadratic":
        return whole_path(noise, steps, spacing, noise.last_alpha_one)
    visited, jump = [int(t) for t in timesteps(noise, steps, spacing)], noise.steps // steps
    end = CLEAN if noise.last_alpha_one else _whole(noise, 0)
    return SamplingPath(tuple(Stride(_whole(noise, t), _whole(noise, t - jump) if t >= jump else end) for t in visited))


def continuous_path(noise: Noise, steps: int, spacing: Spacing | None = None, karras: bool = False) -> SamplingPath:
    """Levels whose σ = sigma / alpha is interpolated between timesteps, down to the clean picture: k-diffusion's path.

    With `karras` the levels between the first and the last are those of Karras et al. (2022, equation 5), and the
    network is told the timesteps, no longer whole, that have such σ.
    """
    ratios, visited = _ratios(noise), timesteps(noise, steps, spacing, rounded=False)
    low = visited.floor().clamp(max=noise.steps - 2).long()
    chosen = torch.lerp(ratios[low], ratios[low + 1], visited - low)
    if karras:
        chosen = karras_ratios(chosen[0], chosen[-1], steps)
        visited = timesteps_of(chosen, ratios)
    path = _path(visited, chosen)
    return path if (spacing or noise.spacing) == "leading" else path._replace(start=path.strides[0].here.sigma)


def inner_path(noise: Noise, steps: int, spacing: Spacing | None = None, karras: bool = False) -> SamplingPath:
    """Whole timesteps, of one more than asked for all but the lowest, down to the clean picture: DPM-Solver's path.

    With `karras` the levels are those of Karras et al. (2022) between the noisiest and the least noisy of the schedule.
    """
    ratios, kind = _ratios(noise), spacing or noise.spacing
    if karras:
        chosen = karras_ratios(ratios[-1], ratios[0], steps)
        return _path(timesteps_of(chosen, ratios).round(), chosen)
    lowest = kind != "trailing"
    if lowest and steps == noise.steps:
        raise UserError(f"With {kind} spacing this sampler takes at most {noise.steps - 1} steps, not {steps}.")
    visited = timesteps(noise, steps + lowest, spacing)[:steps]
    return _path(visited, ratios[visited.long()])


def karras_ratios(highest: Tensor, lowest: Tensor, steps: int) -> Float[Tensor, " steps"]:
    """σ from the highest to the lowest, evenly spaced in σ^(1/7) (Karras et al., 2022, equation 5)."""
    ramp = torch.arange(steps, dtype=torch.float64, device="cpu") / max(1, steps - 1)
    return torch.lerp(highest ** (1 / RHO), lowest ** (1 / RHO), ramp) ** RHO


def timesteps_of(chosen: Float[Tensor, " n"], ratios: Float[Tensor, " steps"]) -> Float[Tensor, " n"]:
    """Where in the schedule such σ lie, linear in ln σ between whole timesteps."""
    logs, wanted = ratios.log(), chosen.clamp(min=1e-10).log()
    low = (torch.searchsorted(logs, wanted, right=True) - 1).clamp(0, len(logs) - 2)
    return low + ((wanted - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)


def _ratios(noise: Noise) -> Float[Tensor, " steps"]:
    """sigma / alpha of every timestep, finite also where nothing of the picture is left."""
    left = noise.rounded_alpha_bar
    left = left.clamp(min=LEAST_ALPHA_BAR) if noise.zero_terminal_snr else left
    return ((1 - left) / left).sqrt()


def _whole(noise: Noise, timestep: int) -> Level:
    left = float(noise.rounded_alpha_bar[timestep])
    return Level(float(timestep), math.sqrt(left), math.sqrt(1 - left))


def _path(visited: Tensor, ratios: Tensor) -> SamplingPath:
    alphas = (1 + ratios.square()).rsqrt()
    levels = [Level(*row) for row in torch.stack([visited, alphas, ratios * alphas], 1).tolist()]
    return SamplingPath(_chain([*levels, CLEAN]))


def _chain(levels: list[Level]) -> tuple[Stride, ...]:
    return tuple(Stride(*pair) for pair in pairwise(levels))

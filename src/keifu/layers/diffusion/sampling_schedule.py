"""Sampling schedules: the noise levels that a diffusion sampler visits, and the level that each step goes to.

A level is x = alpha · image + sigma · noise, and the timestep that the network is conditioned on. For diffusion, alpha²
+ sigma² is 1; for a flow, alpha + sigma is 1. Samplers that are published in terms of x / alpha and sigma / alpha
(Karras et al., 2022) use this notation here too: x is always the network's input.

Three kinds of timesteps are used: whole ones (DDPM, DDIM, PLMS), a continuous scale (Euler, Heun, LMS), and whole ones
without the lowest (DPM-Solver++, UniPC). A flow has one schedule for all its samplers.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from keifu.errors import UserError
from keifu.layers.diffusion.noise_schedule import Noise, Spacing

RHO = 7.0  # concentration of Karras levels at low noise (Karras et al., 2022, table 1)
LEAST_ALPHA_BAR = 2.0**-24  # replaces 0 if a sampler divides by it: the smallest number of half precision


class Level(NamedTuple):
    """The noise level of x = alpha · image + sigma · noise, and its timestep."""

    timestep: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha: the σ of Karras et al. (2022); ∞ if nothing of the image is left."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def log_snr(self) -> float:
        """λ = ln(alpha / sigma), half the logarithm of the signal-to-noise ratio (Lu et al., 2022); ∞ without noise."""
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


class Step(NamedTuple):
    """One step of a sampler: the level of x, and the level that it goes to."""

    level: Level
    next_level: Level


class Schedule(NamedTuple):
    """All steps of a sampler, and the standard deviation of its initial noise."""

    steps: tuple[Step, ...]
    initial_sigma: float = 1.0


CLEAN = Level(-1.0, 1.0, 0.0)


def timesteps(
    noise: Noise, steps: int, spacing: Spacing | None = None, rounded: bool = True
) -> Float[Tensor, " steps"]:
    """Choose `steps` of the noise's timesteps, the noisiest first, in float64 (Lin et al., 2023, table 2).

    leading: 0, T // steps, ..., raised by `steps_offset`. trailing: T - 1 downwards by T / steps. linspace: both ends
    and evenly between them, whole if `rounded`. quadratic: (√(0.8 T) · i / (steps - 1))², whole (Song et al., 2021,
    D.2). Raises UserError for a number of steps out of range.
    """
    total = noise.steps
    if not 1 <= steps <= total:
        raise UserError(f"The model knows {total} noise levels, so it takes 1 to {total} steps, not {steps}.")
    spacing = spacing or noise.spacing
    count = torch.arange(steps, dtype=torch.float64, device="cpu")
    if spacing == "trailing":
        return (total - count * (total / steps)).round() - 1
    if spacing == "leading":
        visited = count * (total // steps) + noise.steps_offset
        if visited[-1] >= total:
            raise UserError(
                f"{steps} steps with the offset {noise.steps_offset} begin at timestep {int(visited[-1])}, and the "
                f"last is {total - 1}: take fewer steps, or trailing spacing."
            )
        return visited.flip(0)
    share = count / (steps - 1) if steps > 1 else count + 1
    if spacing == "quadratic":
        return (share * math.sqrt(0.8 * total)).square().floor().flip(0)
    even = (count * ((total - 1) / (steps - 1)) if steps > 1 else count + total - 1).flip(0)
    return even.round() if rounded else even


def ddpm_schedule(noise: Noise, steps: int, spacing: Spacing | None = None, last_alpha_one: bool = True) -> Schedule:
    """Return DDPM's schedule: from each timestep to the next, and last to the clean image or the noise of
    timestep 0."""
    visited = [_level_at(noise, int(t)) for t in timesteps(noise, steps, spacing)]
    return _through([*visited, CLEAN if last_alpha_one else _level_at(noise, 0)])


def ddim_schedule(noise: Noise, steps: int, spacing: Spacing | None = None) -> Schedule:
    """Return DDIM's and PLMS's schedule as in diffusers: each step goes down by T // steps.

    With leading spacing, and with trailing if `steps` divides T, this is the next visited timestep; with linspace it is
    not. The last step goes to the clean image or to timestep 0, depending on `noise.last_alpha_one`.
    """
    if (spacing or noise.spacing) == "quadratic":
        return ddpm_schedule(noise, steps, spacing, noise.last_alpha_one)
    visited = [int(t) for t in timesteps(noise, steps, spacing)]
    jump = noise.steps // steps
    end = CLEAN if noise.last_alpha_one else _level_at(noise, 0)
    return Schedule(tuple(Step(_level_at(noise, t), _level_at(noise, t - jump) if t >= jump else end) for t in visited))


def continuous_schedule(noise: Noise, steps: int, spacing: Spacing | None = None, karras: bool = False) -> Schedule:
    """Return k-diffusion's schedule: σ = sigma / alpha, interpolated between timesteps, down to the clean image.

    karras: the levels between the first and the last are those of Karras et al. (2022, equation 5), and the network is
    conditioned on the (fractional) timesteps with these σ.
    """
    ratios, visited = _ratios(noise), timesteps(noise, steps, spacing, rounded=False)
    low = visited.floor().clamp(max=noise.steps - 2).long()
    sigmas = torch.lerp(ratios[low], ratios[low + 1], visited - low)
    if karras:
        sigmas = karras_sigmas(sigmas[0], sigmas[-1], steps)
        visited = timesteps_of(sigmas, ratios)
    schedule = _schedule_of(visited, sigmas)
    leading = (spacing or noise.spacing) == "leading"
    return schedule if leading else schedule._replace(initial_sigma=schedule.steps[0].level.sigma)


def dpm_solver_schedule(noise: Noise, steps: int, spacing: Spacing | None = None, karras: bool = False) -> Schedule:
    """Return DPM-Solver's schedule: steps + 1 whole timesteps without the lowest, down to the clean image.

    karras: the levels are those of Karras et al. (2022) between the noisiest and the least noisy of the schedule.
    """
    ratios, spacing = _ratios(noise), spacing or noise.spacing
    if karras:
        sigmas = karras_sigmas(ratios[-1], ratios[0], steps)
        return _schedule_of(timesteps_of(sigmas, ratios).round(), sigmas)
    lowest = spacing != "trailing"
    if lowest and steps == noise.steps:
        raise UserError(f"With {spacing} spacing this sampler takes at most {noise.steps - 1} steps, not {steps}.")
    visited = timesteps(noise, steps + lowest, spacing)[:steps]
    return _schedule_of(visited, ratios[visited.long()])


def flow_schedule(noise: Noise, steps: int, spacing: Spacing | None = None, karras: bool = False) -> Schedule:
    """Return a flow's schedule: sigma evenly from 1 to 1 / T, shifted, then the clean image; t = sigma · T.

    As in diffusers' `FlowMatchEulerDiscreteScheduler`, a constant shift is applied twice to the two ends (first in
    float32), and a dynamic one once. karras: the levels between the ends are those of Karras et al. (2022, equation 5),
    of sigma.
    """
    if spacing is not None:
        raise UserError(f"A flow has times and no timesteps to choose from: leave out the spacing {spacing}.")
    if not 1 <= steps <= noise.steps:
        raise UserError(f"The model knows {noise.steps} noise levels: it takes 1 to {noise.steps} steps, not {steps}.")
    count = torch.tensor([noise.steps, 1], dtype=torch.float32, device="cpu")
    first, last = _shifted(count / noise.steps, 1.0 if noise.dynamic else noise.shift).tolist()
    even = torch.linspace(first * noise.steps, last * noise.steps, steps, dtype=torch.float64, device="cpu")
    sigmas = _shifted(even / noise.steps, noise.dynamic.shift if noise.dynamic else noise.shift)
    sigmas = (karras_sigmas(sigmas[0], sigmas[-1], steps) if karras else sigmas).float()
    levels = torch.stack([sigmas * noise.steps, 1 - sigmas, sigmas], 1).double()
    return _through([*(Level(*row) for row in levels.tolist()), CLEAN])


def _shifted(sigmas: Tensor, shift: float) -> Tensor:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def karras_sigmas(highest: Tensor, lowest: Tensor, steps: int) -> Float[Tensor, " steps"]:
    """Return σ from the highest to the lowest, evenly spaced in σ^(1/7) (Karras et al., 2022, equation 5)."""
    ramp = torch.arange(steps, dtype=torch.float64, device="cpu") / max(1, steps - 1)
    return torch.lerp(highest ** (1 / RHO), lowest ** (1 / RHO), ramp) ** RHO


def timesteps_of(sigmas: Float[Tensor, " n"], ratios: Float[Tensor, " steps"]) -> Float[Tensor, " n"]:
    """Return the timesteps with these σ, interpolated linearly in ln σ between whole timesteps."""
    logs, log_sigmas = ratios.log(), sigmas.clamp(min=1e-10).log()
    low = (torch.searchsorted(logs, log_sigmas, right=True) - 1).clamp(0, len(logs) - 2)
    return low + ((log_sigmas - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)


def _ratios(noise: Noise) -> Float[Tensor, " steps"]:
    """Return sigma / alpha of every timestep, finite even if nothing of the image is left."""
    alpha_bar = noise.rounded_alpha_bar
    alpha_bar = alpha_bar.clamp(min=LEAST_ALPHA_BAR) if noise.zero_terminal_snr else alpha_bar
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def _level_at(noise: Noise, timestep: int) -> Level:
    alpha_bar = float(noise.rounded_alpha_bar[timestep])
    return Level(float(timestep), math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))


def _schedule_of(visited: Tensor, ratios: Tensor) -> Schedule:
    alphas = (1 + ratios.square()).rsqrt()
    levels = [Level(*row) for row in torch.stack([visited, alphas, ratios * alphas], 1).tolist()]
    return _through([*levels, CLEAN])


def _through(levels: list[Level]) -> Schedule:
    return Schedule(tuple(Step(*pair) for pair in pairwise(levels)))

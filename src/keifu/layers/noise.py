"""How pictures dissolve into noise, as a table of what is left of the picture after each step, and what a network may
predict of it; knows no network, no sampler and no random numbers.

x_t = √ᾱ_t · picture + √(1 - ᾱ_t) · noise (Ho et al., 2020, equation 4). Tables are float64 on the CPU: differences of
neighbouring ᾱ, which every sampler takes, lose half their digits in float32.

Axes: batch, `*shape` = whatever the picture has, steps = T of the schedule; timesteps go from 0 (least noise) to T - 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.errors import UserError

Schedule = Literal["linear", "scaled_linear", "cosine", "sigmoid"]
Target = Literal["noise", "picture", "velocity"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]
Spacing = Literal["leading", "trailing", "linspace", "quadratic"]


@dataclass(frozen=True)
class Noise:
    """The noise that a network was trained to remove. The defaults are DDPM's (Ho et al., 2020, section 4).

    Attributes:
        schedule: how β grows, a name in `SCHEDULES`.
        steps: T, the number of noise levels.
        beta_start, beta_end: the first and last β, where the schedule takes them; the cosine one does not.
        betas: β of every step, in place of the schedule; empty for the schedule's.
        zero_terminal_snr: √ᾱ shifted and scaled so that nothing of the picture is left at T - 1 (Lin et al., 2023,
            algorithm 1).
        target: what the network predicts: the noise, the picture, or the velocity √ᾱ·noise - √(1-ᾱ)·picture
            (Salimans and Ho, 2022).
        variance: of DDPM's steps: β̃ (fixed_small), β (fixed_large), or a share of the way between their logarithms
            that the network predicts beside its target, with twice the channels (learned_range; Nichol and Dhariwal,
            2021, equation 15).
        clip: the largest number in a picture, to which predictions of it are clipped; None for no bound (latents).
        threshold, threshold_max: clip each picture, in place of that, at this quantile of its own absolute numbers,
            held between 1 and the maximum, and divide by it (dynamic thresholding, Saharia et al., 2022, section 2.3).
        spacing, steps_offset: which timesteps a sampler visits, if nobody asks for others; see `noise_levels.py`.
        last_alpha_one: whether the last step ends at the clean picture (ᾱ = 1) or, as the released Stable Diffusion
            does, at the noise of timestep 0 (diffusers' `set_alpha_to_one`).

    A value that cannot be is a ValueError.
    """

    schedule: Schedule = "linear"
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    betas: tuple[float, ...] = ()
    zero_terminal_snr: bool = False
    target: Target = "noise"
    variance: Variance = "fixed_small"
    clip: float | None = 1.0
    threshold: float | None = None
    threshold_max: float = 1.0
    spacing: Spacing = "leading"
    steps_offset: int = 0
    last_alpha_one: bool = True

    def __post_init__(self) -> None:
        for kind, known in _NAMES.items():
            known_name(kind, vars(self)[kind], known)
        if self.steps < 1 + self.zero_terminal_snr:
            raise UserError(f"The noise schedule has {self.steps} steps, which is too few.")
        if self.betas and len(self.betas) != self.steps:
            raise UserError(f"There are {len(self.betas)} betas for {self.steps} steps: give one for each.")
        outside = [beta for beta in self.betas or (self.beta_start, self.beta_end) if not 0 < beta < 1]
        if outside:
            raise UserError(f"A beta is a share of noise between 0 and 1, and one is {outside[0]}.")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"Pictures are clipped at a positive number, not {self.clip}; None clips nothing.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UserError(f"A threshold is a share of a picture's numbers, between 0 and 1, not {self.threshold}.")

    @cached_property
    def beta(self) -> Float[Tensor, " steps"]:
        """β of each timestep, float32 as published models' code has it: where β is 0.999, that rounding moves 1 - β by
        more than two implementations may differ."""
        betas = torch.tensor(self.betas, device="cpu") if self.betas else SCHEDULES[self.schedule](self)
        return with_zero_terminal_snr(betas.float()) if self.zero_terminal_snr else betas.float()

    @cached_property
    def alpha_bar(self) -> Float[Tensor, " steps"]:
        """ᾱ: the share of the picture's variance that is left at each timestep, float64."""
        if not self.zero_terminal_snr:
            return (1 - self.beta.double()).cumprod(0)
        plain = replace(self, zero_terminal_snr=False).beta.double()
        return (1 - with_zero_terminal_snr(plain)).cumprod(0)

    @cached_property
    def rounded_alpha_bar(self) -> Float[Tensor, " steps"]:
        """ᾱ with the rounding of diffusers' float32 tables, float64: the levels that its samplers visit.

        Of the little noise of the first timesteps, 1 - ᾱ, it has but four digits; paths agree only with the same four.
        """
        return (1 - self.beta).cumprod(0).double()


def _linear(noise: Noise) -> Tensor:
    """Ho et al. (2020), section 4."""
    return torch.linspace(noise.beta_start, noise.beta_end, noise.steps, dtype=torch.float32, device="cpu")


def _scaled_linear(noise: Noise) -> Tensor:
    """Linear in √β: Rombach et al. (2022), as released."""
    ends = noise.beta_start**0.5, noise.beta_end**0.5
    return torch.linspace(*ends, noise.steps, dtype=torch.float32, device="cpu").square()


def _cosine(noise: Noise) -> Tensor:
    """ᾱ a squared cosine of time, β at most 0.999: Nichol and Dhariwal (2021), equation 17."""
    times = torch.arange(noise.steps + 1, dtype=torch.float64, device="cpu") / noise.steps
    left = torch.cos((times + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - left[1:] / left[:-1]).clamp(max=0.999)


def _sigmoid(noise: Noise) -> Tensor:
    """β a logistic curve from -6 to 6: GeoDiff (Xu et al., 2022), as released."""
    curve = torch.linspace(-6, 6, noise.steps, dtype=torch.float32, device="cpu").sigmoid()
    return curve * (noise.beta_end - noise.beta_start) + noise.beta_start


SCHEDULES: dict[str, Callable[[Noise], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
}


def with_zero_terminal_snr(betas: Float[Tensor, " steps"]) -> Float[Tensor, " steps"]:
    """β of the schedule whose √ᾱ is shifted to end at 0 and scaled to begin where it did (Lin et al., 2023,
    algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    left = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    return 1 - torch.cat([left[:1], left[1:] / left[:-1]])


def at(table: Float[Tensor, " steps"], timestep: Int[Tensor, " batch"], x: Tensor) -> Tensor:
    """The table's numbers at each row's timestep, shaped to be multiplied with x [batch, *shape]; at least float32."""
    kind = torch.promote_types(x.dtype, torch.float32)
    picked = table.to(x.device, kind)[timestep]
    return picked.reshape(-1, *[1] * (x.ndim - 1))


def add_noise(
    picture: Float[Tensor, "batch *shape"],
    noise: Float[Tensor, "batch *shape"],
    alpha_bar: Float[Tensor, " steps"],
    timestep: Int[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """x_t: the picture after so many steps of noise at once (Ho et al., 2020, equation 4)."""
    return at(alpha_bar.sqrt(), timestep, picture) * picture + at((1 - alpha_bar).sqrt(), timestep, picture) * noise


_NAMES = {
    "schedule": tuple(SCHEDULES),
    "target": get_args(Target),
    "variance": get_args(Variance),
    "spacing": get_args(Spacing),
}


def known_name(kind: str, name: str, known: tuple[str, ...]) -> None:
    """Refuses a name that is not known, with the nearest that is."""
    if name not in known:
        near = get_close_matches(str(name).lower(), known, n=1, cutoff=0.3)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"There is no {kind} {name!r}.{guess} Known: {', '.join(known)}.")

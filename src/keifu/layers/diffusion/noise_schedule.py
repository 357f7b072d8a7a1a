"""Noise schedules of diffusion (ᾱ of every timestep), prediction targets, loss weights, and the exact posterior.

x_t = alpha · picture + sigma · noise. Diffusion has alpha = √ᾱ_t and sigma = √(1 - ᾱ_t) (Ho et al., 2020, equation 4),
and SNR = ᾱ / (1 - ᾱ). A flow has alpha = 1 - sigma, the straight line from the picture to the noise (Liu et al., 2022,
rectified flow; Lipman et al., 2022, example II). Tables are float64 on the CPU: samplers use differences of
neighbouring ᾱ, which would lose half their digits in float32.

Axes: batch, `*shape` = shape of an image, steps = T of the schedule. Timesteps are 0 (least noise) to T - 1; for a flow
also fractions, t = sigma · T.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from keifu.errors import UserError, require_known

Sample = Float[Tensor, "batch *shape"]
Timesteps = Int[Tensor, " batch"]
Times = Num[Tensor, " batch"]  # timesteps, or fractions between them

Schedule = Literal["linear", "scaled_linear", "cosine", "sigmoid", "flow"]
Target = Literal["noise", "picture", "velocity", "flow"]
Sampling = Literal["uniform", "logit_normal"]
Variance = Literal["fixed_small", "fixed_large", "learned_range"]
Spacing = Literal["leading", "trailing", "linspace", "quadratic"]
Weighting = Literal["simple", "min_snr", "p2"]
_NAMES = {"schedule": Schedule, "target": Target, "variance": Variance, "spacing": Spacing}


@dataclass(frozen=True)
class DynamicShift:
    """Shift of a flow that grows with the number of patches of a picture (diffusers' `use_dynamic_shifting`).

    mu is base_shift at base_length patches and max_shift at max_length, and linear between; the shift is e^mu, or mu if
    not `exponential`. length: number of patches of the picture that is drawn; None if not known yet.
    """

    base_shift: float = 0.5
    max_shift: float = 1.15
    base_length: int = 256
    max_length: int = 4096
    exponential: bool = True
    length: int | None = None

    def __post_init__(self) -> None:
        if self.base_length == self.max_length:
            raise UserError(f"A shift that grows needs two numbers of patches, and both are {self.base_length}.")

    @property
    def shift(self) -> float:
        """The shift for this picture. Raises UserError if its number of patches is not known."""
        if self.length is None:
            raise UserError("The shift of this flow depends on a picture's patches, and this model has none.")
        share = (self.length - self.base_length) / (self.max_length - self.base_length)
        mu = self.base_shift + share * (self.max_shift - self.base_shift)
        if not self.exponential and mu <= 0:
            raise UserError(f"The shift of a picture of {self.length} patches is {mu:g}, which must be above 0.")
        return math.exp(mu) if self.exponential else mu


@dataclass(frozen=True)
class Noise:
    """The noise that a network was trained to remove. The defaults are DDPM's (Ho et al., 2020, section 4).

    Attributes:
        schedule: growth of β, a name in `SCHEDULES`; or flow, which has no β.
        steps: T, the number of noise levels.
        beta_start, beta_end: the first and last β. The cosine schedule does not use them.
        betas: β of every step, instead of the schedule; empty for the schedule's.
        zero_terminal_snr: whether √ᾱ is shifted and scaled to be 0 at T - 1 (Lin et al., 2023, algorithm 1).
        target: the network's prediction: the noise, the picture, the velocity alpha·noise - sigma·picture (Salimans and
            Ho, 2022), or the flow, noise - picture, the direction of a straight path.
        variance: of DDPM's steps: β̃ (fixed_small), β (fixed_large), or an interpolation of their logarithms that the
            network predicts too, with twice the channels (learned_range; Nichol and Dhariwal, 2021, equation 15).
        clip: the largest magnitude of a picture's numbers; predictions are clipped to it. None for no bound (latents).
        threshold, threshold_max: instead of `clip`, clip each picture at this quantile of its absolute numbers, limited
        to between 1 and the maximum, and divide by it (dynamic thresholding, Saharia et al., 2022, section 2.3).
        spacing, steps_offset: the timesteps that a sampler visits by default; see `sampling_schedule.timesteps`.
        last_alpha_one: whether the last step ends at the clean picture (ᾱ = 1) or, as in the released Stable Diffusion,
            at the noise of timestep 0 (diffusers' `set_alpha_to_one`).
        shift: of a flow's sampling: sigma becomes shift · sigma / (1 + (shift - 1) · sigma), so that more than half of
            the steps have much noise (Esser et al., 2024, section 5.3.2; Stable Diffusion 3 has 3).
        dynamic: a shift that depends on the picture's size, instead of `shift`.

    Raises UserError for impossible values.
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
    shift: float = 1.0
    dynamic: DynamicShift | None = None

    def __post_init__(self) -> None:
        for name, known_names in _NAMES.items():
            require_known(name, vars(self)[name], get_args(known_names))
        if self.steps < 1 + self.zero_terminal_snr:
            raise UserError(f"The noise schedule has {self.steps} steps, which is too few.")
        if self.steps_offset < 0:
            raise UserError(f"steps_offset is {self.steps_offset}, and there is no timestep before 0.")
        if self.betas and len(self.betas) != self.steps:
            raise UserError(f"There are {len(self.betas)} betas for {self.steps} steps: give one for each.")
        outside = [beta for beta in self.betas or (self.beta_start, self.beta_end) if not 0 < beta < 1]
        if outside:
            raise UserError(f"A beta is a share of noise between 0 and 1, and one is {outside[0]}.")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"Pictures are clipped at a positive number, not {self.clip}; None clips nothing.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UserError(f"A threshold is a share of a picture's numbers, between 0 and 1, not {self.threshold}.")
        if not 0 < self.shift < math.inf:
            raise UserError(f"The shift of a flow is a positive number, not {self.shift}.")
        if self.flows and self.target == "noise":
            raise UserError("A flow begins at noise, where a predicted noise gives no picture: use the target flow.")
        if self.flows and (self.variance == "learned_range" or self.betas or self.zero_terminal_snr):
            raise UserError("A flow has no β: leave out learned_range, betas and zero_terminal_snr.")

    @property
    def flows(self) -> bool:
        """Whether alpha is 1 - sigma, and not √(1 - sigma²)."""
        return self.schedule == "flow"

    def time(self, share: Float[Tensor, " batch"]) -> Times:
        """Return the timesteps at these shares, below 1, of the way from the picture to the noise."""
        return (share * self.steps).float() if self.flows else (share * self.steps).long()

    def levels(self, timestep: Times, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma at each row's timestep, in a shape that broadcasts with x (batch, *shape)."""
        if self.flows:
            sigma = timestep.reshape(-1, *[1] * (x.ndim - 1)) / self.steps
            return 1 - sigma, sigma
        return at(self._roots[0], timestep, x), at(self._roots[1], timestep, x)

    @cached_property
    def _roots(self) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
        return self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()

    @cached_property
    def beta(self) -> Float[Tensor, " steps"]:
        """β of each timestep, float32 as in the code of published models: near β = 0.999, this rounding changes 1 - β
        by more than implementations may differ."""
        if self.flows:
            raise UserError("A flow has no β and no ᾱ, which this computation is made of: take a model of diffusion.")
        betas_given = torch.tensor(self.betas, dtype=torch.float32, device="cpu")
        betas = betas_given if self.betas else SCHEDULES[self.schedule](self)
        return with_zero_terminal_snr(betas.float()) if self.zero_terminal_snr else betas.float()

    @cached_property
    def alpha_bar(self) -> Float[Tensor, " steps"]:
        """ᾱ: the remaining share of the picture's variance at each timestep, float64."""
        if not self.zero_terminal_snr:
            return (1 - self.beta.double()).cumprod(0)
        plain = replace(self, zero_terminal_snr=False).beta.double()
        return (1 - with_zero_terminal_snr(plain)).cumprod(0)

    @cached_property
    def rounded_alpha_bar(self) -> Float[Tensor, " steps"]:
        """ᾱ with the rounding of diffusers' float32 tables, as float64: the levels that its samplers visit.

        For the first timesteps, 1 - ᾱ has only four digits there. Sampling paths agree only with the same four.
        """
        return (1 - self.beta).cumprod(0).double()


def _linear(noise: Noise) -> Tensor:
    """Return β linear in time (Ho et al., 2020, section 4)."""
    return torch.linspace(noise.beta_start, noise.beta_end, noise.steps, dtype=torch.float32, device="cpu")


def _scaled_linear(noise: Noise) -> Tensor:
    """Return β whose root is linear in time (Rombach et al., 2022, as released)."""
    ends = noise.beta_start**0.5, noise.beta_end**0.5
    return torch.linspace(*ends, noise.steps, dtype=torch.float32, device="cpu").square()


def _cosine(noise: Noise) -> Tensor:
    """Return β, at most 0.999, whose ᾱ is a squared cosine of time (Nichol and Dhariwal, 2021, equation 17)."""
    times = torch.arange(noise.steps + 1, dtype=torch.float64, device="cpu") / noise.steps
    alpha_bar = torch.cos((times + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def _sigmoid(noise: Noise) -> Tensor:
    """Return β as a logistic curve from -6 to 6 (GeoDiff, Xu et al., 2022, as released)."""
    curve = torch.linspace(-6, 6, noise.steps, dtype=torch.float32, device="cpu").sigmoid()
    return curve * (noise.beta_end - noise.beta_start) + noise.beta_start


SCHEDULES: dict[str, Callable[[Noise], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
}


def with_zero_terminal_snr(betas: Float[Tensor, " steps"]) -> Float[Tensor, " steps"]:
    """Return β of the schedule whose √ᾱ is shifted to end at 0 and scaled to keep its first value (Lin et al., 2023,
    algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def at(table: Float[Tensor, " steps"], timestep: Timesteps, x: Tensor) -> Tensor:
    """Return the table's value at the timestep of each row, in at least float32, in a shape that broadcasts with x
    (batch, *shape)."""
    picked = moved(table, x.device, torch.promote_types(x.dtype, torch.float32))[timestep]
    return picked.reshape(-1, *[1] * (x.ndim - 1))


_COPIES: Any = WeakIdKeyDictionary()  # copies of tables, by device and dtype


def moved(table: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return the table on a device. A GPU gets a copy once, not at each step: the host would wait for each copy."""
    dtype = dtype or table.dtype
    if device.type == table.device.type:
        return table.to(device, dtype)
    copies: dict[Any, Tensor] = _COPIES.setdefault(table, {})
    if (device, dtype) not in copies:
        with torch.inference_mode(False):
            copies[device, dtype] = table.to(device, dtype)
    return copies[device, dtype]


def add_noise(picture: Sample, noise: Sample, alpha_bar: Float[Tensor, " steps"], timestep: Timesteps) -> Sample:
    """Return x_t, the picture with the noise of t steps (Ho et al., 2020, equation 4)."""
    return at(alpha_bar.sqrt(), timestep, picture) * picture + at((1 - alpha_bar).sqrt(), timestep, picture) * noise


def training_target(noise: Noise, picture: Sample, added: Sample, timestep: Times) -> Sample:
    """Return the target of the network for a picture with this noise added."""
    if noise.target == "noise":
        return added
    if noise.target == "picture":
        return picture
    if noise.target == "flow":
        return added - picture
    alpha, sigma = noise.levels(timestep, picture)
    return alpha * added - sigma * picture


Number = TypeVar("Number", float, Tensor)


def picture_of(target: Target, output: Sample, x: Sample, alpha: Number, sigma: Number) -> Sample:
    """Return the picture, not clipped, that a network's output for x = alpha · picture + sigma · noise implies."""
    if target == "picture":
        return output
    if target == "noise":
        return (x - sigma * output) / alpha
    if target == "flow":
        return (x - sigma * output) / (alpha + sigma)
    return (alpha * x - sigma * output) / (alpha * alpha + sigma * sigma)


def predicted_x0(noise: Noise, output: Sample, x: Sample, timestep: Times) -> Sample:
    """Return `picture_of` the output for x with the noise of these timesteps."""
    return picture_of(noise.target, output, x, *noise.levels(timestep, x))


def shares(draws: Float[Tensor, " batch"], sampling: Sampling) -> Float[Tensor, " batch"]:
    """Return shares of the way to the noise from uniform numbers in [0, 1).

    uniform: the numbers themselves. logit_normal: the logistic function of standard normal numbers, which are mostly in
    the middle, where the prediction is hardest (Esser et al., 2024, section 3.1).
    """
    require_known("sampling of times", sampling, get_args(Sampling))
    return draws if sampling == "uniform" else torch.special.ndtri(draws).sigmoid()


def loss_weights(noise: Noise, weighting: Weighting = "simple", gamma: float | None = None) -> Float[Tensor, " steps"]:
    """Return the weight of the target's squared error at each timestep, float64.

    simple: 1 (Ho et al., 2020, equation 14). min_snr: makes the weight of the picture's error min(SNR, γ), default γ 5
    (Hang et al., 2023). p2: makes the weight of the noise's error 1 / (1 + SNR)^γ, default γ 1 (Choi et al., 2022).
    """
    require_known("weighting", weighting, get_args(Weighting))
    if weighting == "simple":
        return torch.ones(noise.steps, dtype=torch.float64, device="cpu")
    if "flow" in (noise.schedule, noise.target):
        raise UserError(f"The weighting {weighting} is defined by ᾱ, which a flow does not have: take simple.")
    alpha_bar = noise.alpha_bar
    if weighting == "p2":  # the noise's error is √SNR times the picture's and √ᾱ times the velocity's
        unit = (1 - alpha_bar) ** (1.0 if gamma is None else gamma)  # 1 / (1 + SNR) is 1 - ᾱ
        return (
            unit
            * {"noise": torch.ones_like(alpha_bar), "picture": alpha_bar / (1 - alpha_bar), "velocity": alpha_bar}[
                noise.target
            ]
        )
    most = 5.0 if gamma is None else gamma
    of_picture = torch.minimum(alpha_bar / (1 - alpha_bar), torch.full_like(alpha_bar, most))
    share = torch.minimum(
        torch.ones_like(alpha_bar), most * (1 - alpha_bar) / alpha_bar
    )  # min(SNR, γ) / SNR, defined for SNR 0 too
    return {"noise": share, "picture": of_picture, "velocity": share * alpha_bar}[noise.target]


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, picture) of every timestep (Ho et al., 2020, equations 6 and 7), float64.

    Its mean is of_picture · picture + of_x · x_t; its variance is β̃. log_small: ln β̃, but at timestep 0, where β̃ is
    0, that of timestep 1, as in DDPM's code. log_large: ln β.
    """

    of_picture: Tensor
    of_x: Tensor
    log_small: Tensor
    log_large: Tensor

    def log_variance(self, noise: Noise, timestep: Timesteps, share: Tensor | None, x: Tensor) -> Tensor:
        """Return the logarithm of the model's variance at these timesteps, in a shape that broadcasts with x.

        share: the network's output, -1 for β̃ and 1 for β (Nichol and Dhariwal, 2021, equation 15). With fixed_large,
        timestep 0 has β̃ of timestep 1, which makes a better decoder.
        """
        if noise.variance == "learned_range":
            assert share is not None
            low, high = at(self.log_small, timestep, x), at(self.log_large, timestep, x)
            return low + (share + 1) / 2 * (high - low)
        large = torch.cat([self.log_small[:1], self.log_large[1:]])
        return at(self.log_small if noise.variance == "fixed_small" else large, timestep, x)


def posterior(noise: Noise) -> Posterior:
    """Return the exact reverse step, given the picture, at every timestep of a schedule."""
    alpha_bar = noise.alpha_bar
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    first = variance[1:2] if len(alpha_bar) > 1 else beta
    return Posterior(
        beta * before.sqrt() / (1 - alpha_bar),
        (alpha_bar / before).sqrt() * (1 - before) / (1 - alpha_bar),
        torch.cat([first, variance[1:]]).log(),
        beta.log(),
    )


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return the KL divergence of N(mean1, variance1) from N(mean2, variance2), for each number, in nats."""
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretised_log_likelihood(picture: Sample, mean: Tensor, log_variance: Tensor) -> Sample:
    """Return the log-probability of N(mean, variance) for each number's grey value, one of 256 from -1 to 1: the
    integral over a bin of width 2/255; the first and last bins are unbounded (Ho et al., 2020, equation 13)."""
    scale, gap = torch.exp(-0.5 * log_variance), picture - mean
    # Computed in the lower tail, where float32 is precise. By symmetry this covers the upper tail.
    near, far = (_normal_cdf(scale * (side / 255 - gap.abs())) for side in (1, -1))
    inside = torch.log((near - far).clamp(min=1e-12))
    darkest, lightest = (torch.log(_normal_cdf(scale * (1 / 255 + side * gap)).clamp(min=1e-12)) for side in (1, -1))
    return torch.where(picture < -0.999, darkest, torch.where(picture > 0.999, lightest, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))

"""What a network learns to predict of a noisy picture, how much each timestep counts, and the exact step back; knows no
network and no loop.

SNR = ᾱ / (1 - ᾱ). Axes: batch, `*shape` = a picture's own, steps = T of the schedule.
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.layers.noise import Noise, at, known_name

Weighting = Literal["simple", "min_snr", "p2"]
WEIGHTINGS = ("simple", "min_snr", "p2")


def target_of(
    noise: Noise,
    picture: Float[Tensor, "batch *shape"],
    added: Float[Tensor, "batch *shape"],
    timestep: Int[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """What the network should say of a picture with this noise added."""
    if noise.target == "noise":
        return added
    if noise.target == "picture":
        return picture
    alpha_bar = noise.alpha_bar
    return at(alpha_bar.sqrt(), timestep, picture) * added - at((1 - alpha_bar).sqrt(), timestep, picture) * picture


def picture_of(
    noise: Noise,
    output: Float[Tensor, "batch *shape"],
    x: Float[Tensor, "batch *shape"],
    timestep: Int[Tensor, " batch"],
) -> Float[Tensor, "batch *shape"]:
    """The picture that a network's prediction means, in x with the noise of these timesteps; never clipped."""
    if noise.target == "picture":
        return output
    root, rest = (at(table.sqrt(), timestep, x) for table in (noise.alpha_bar, 1 - noise.alpha_bar))
    return (x - rest * output) / root if noise.target == "noise" else root * x - rest * output


def loss_weights(noise: Noise, weighting: Weighting = "simple", gamma: float | None = None) -> Float[Tensor, " steps"]:
    """How much the squared error of the target counts at each timestep, float64.

    simple: 1 (Ho et al., 2020, equation 14). min_snr: what makes the weight of the picture's error min(SNR, γ), γ 5
    (Hang et al., 2023). p2: what makes that of the noise's error 1 / (1 + SNR)^γ, γ 1 (Choi et al., 2022).
    """
    known_name("weighting", weighting, WEIGHTINGS)
    left = noise.alpha_bar
    if weighting == "simple":
        return torch.ones_like(left)
    if weighting == "p2":  # the noise's error is √SNR times the picture's and √ᾱ times the velocity's
        unit = (1 - left) ** (1.0 if gamma is None else gamma)  # 1 / (1 + SNR) is 1 - ᾱ
        return unit * {"noise": torch.ones_like(left), "picture": left / (1 - left), "velocity": left}[noise.target]
    most = 5.0 if gamma is None else gamma
    of_picture = torch.minimum(left / (1 - left), torch.full_like(left, most))
    share = torch.minimum(torch.ones_like(left), most * (1 - left) / left)  # min(SNR, γ) / SNR, also where SNR is 0
    return {"noise": share, "picture": of_picture, "velocity": share * left}[noise.target]


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, picture) of every timestep (Ho et al., 2020, equations 6 and 7), float64.

    Its mean is of_picture · picture + of_x · x_t, its variance β̃. `log_small` is ln β̃, at timestep 0, where β̃ is 0,
    that of timestep 1, as DDPM's code has it; `log_large` is ln β.
    """

    of_picture: Tensor
    of_x: Tensor
    log_small: Tensor
    log_large: Tensor

    def log_variance(self, noise: Noise, timestep: Int[Tensor, " batch"], share: Tensor | None, x: Tensor) -> Tensor:
        """ln of the variance that the model has at these timesteps, shaped as x or to be broadcast to it.

        share: what the network says, -1 for β̃ and 1 for β (Nichol and Dhariwal, 2021, equation 15). A fixed large
        variance has β̃ of timestep 1 at timestep 0, which makes a better decoder.
        """
        if noise.variance == "learned_range":
            assert share is not None
            low, high = at(self.log_small, timestep, x), at(self.log_large, timestep, x)
            return low + (share + 1) / 2 * (high - low)
        large = torch.cat([self.log_small[:1], self.log_large[1:]])
        return at(self.log_small if noise.variance == "fixed_small" else large, timestep, x)


def posterior(noise: Noise) -> Posterior:
    """The exact step back, given the picture, at every timestep of a schedule."""
    left = noise.alpha_bar
    before = torch.cat([torch.ones_like(left[:1]), left[:-1]])
    beta = 1 - left / before
    variance = beta * (1 - before) / (1 - left)
    first = variance[1:2] if len(left) > 1 else beta
    return Posterior(
        beta * before.sqrt() / (1 - left),
        (left / before).sqrt() * (1 - before) / (1 - left),
        torch.cat([first, variance[1:]]).log(),
        beta.log(),
    )


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL divergence of N(mean1, variance1) from N(mean2, variance2), for each number, in nats."""
    ratio = torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1 + ratio + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretised_log_likelihood(
    picture: Float[Tensor, "batch *shape"], mean: Tensor, log_variance: Tensor
) -> Float[Tensor, "batch *shape"]:
    """ln of the probability that N(mean, variance) gives to each number's grey value, one of 256 from -1 to 1: the
    integral over a bin of width 2/255, the first and last without end (Ho et al., 2020, equation 13)."""
    scale, gap = torch.exp(-0.5 * log_variance), picture - mean
    # In the lower tail, where float32 has digits for what is left; by symmetry it is the upper one's too.
    near, far = (_normal_cdf(scale * (side / 255 - gap.abs())) for side in (1, -1))
    inside = torch.log((near - far).clamp(min=1e-12))
    darkest, lightest = (torch.log(_normal_cdf(scale * (1 / 255 + side * gap)).clamp(min=1e-12)) for side in (1, -1))
    return torch.where(picture < -0.999, darkest, torch.where(picture > 0.999, lightest, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))

"""Denoisers: convert a network's output at a noise level to the predicted clean image and the predicted noise.

Also classifier-free guidance and dynamic thresholding. Axes: batch, `*shape` = of an image (channels, height,
width).
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.errors import UserError
from keifu.layers.diffusion.image_model import ImageModel
from keifu.layers.diffusion.noise_schedule import Noise, picture_of
from keifu.layers.diffusion.sampling_schedule import Level

Sample = Float[Tensor, "batch *shape"]
Labels = Int[Tensor, " batch"]
Network: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # x and each row's timestep to the output


class DenoiserOutput(NamedTuple):
    """Prediction for x = alpha · picture + sigma · noise.

    picture: clipped or thresholded if the denoiser does so. noise: computed from that picture, so that x = alpha ·
    picture + sigma · noise still holds. variance_fraction: predicted interpolation between log β̃ (-1) and log β (1),
    if the network predicts it.
    """

    picture: Tensor
    noise: Tensor
    variance_fraction: Tensor | None = None


class Denoiser:
    """Converter of the network's prediction target (noise, image, velocity or flow) to an image and noise.

    clip, threshold: whether to apply these bounds of the `Noise`; samplers differ in this. Outputs in half precision
    are converted to x's dtype.
    """

    def __init__(self, network: Network, noise: Noise, clip: bool = True, threshold: bool = True):
        if noise.zero_terminal_snr and noise.target == "noise":
            raise UserError(
                "This model predicts the noise, which says nothing of the picture at its last level, where nothing is "
                "left of it (zero terminal SNR): such a schedule needs the target velocity or picture."
            )
        self.network, self.noise = network, noise
        self.clip = noise.clip if clip else None
        self.threshold = noise.threshold if threshold else None

    def __call__(self, x: Sample, level: Level) -> DenoiserOutput:
        """Return the image and the noise predicted from x."""
        return self.read(self.output(x, level), x, level)

    def output(self, x: Sample, level: Level) -> Tensor:
        """Compute the network's raw output. Integer timesteps are passed as int64, others as float32."""
        dtype = torch.int64 if level.timestep.is_integer() else torch.float32
        timestep = torch.full((len(x),), level.timestep, dtype=dtype, device=x.device)
        return self.network(x, timestep).to(x.dtype)

    def read(self, output: Tensor, x: Sample, level: Level) -> DenoiserOutput:
        """Convert a raw output to image and noise by the prediction target."""
        fraction = None
        if self.noise.variance == "learned_range":
            output, fraction = output.chunk(2, 1)
        (_, alpha, sigma), target = level, self.noise.target
        picture = picture_of(target, output, x, alpha, sigma)
        noise = output if target == "noise" else (x - alpha * picture) / sigma
        if target == "velocity":  # subtracting the picture from x would lose digits at a small sigma
            noise = (alpha * output + sigma * x) / (alpha * alpha + sigma * sigma)
        if self.threshold is not None or self.clip is not None:
            picture = self._bounded(picture)
            noise = (x - alpha * picture) / sigma
        return DenoiserOutput(picture, noise, fraction)

    def _bounded(self, picture: Tensor) -> Tensor:
        if self.threshold is not None:
            return dynamic_threshold(picture, self.threshold, self.noise.threshold_max)
        return picture if self.clip is None else picture.clamp(-self.clip, self.clip)


def dynamic_threshold(picture: Sample, share: float, most: float) -> Sample:
    """Apply dynamic thresholding (Saharia et al., 2022, section 2.3): clip each image at the quantile `share` of its
    absolute values, limited to [1, `most`], and divide by this threshold."""
    flat = picture.flatten(1)
    bound = flat.abs().quantile(share, dim=1, keepdim=True).clamp(1, most)
    return (flat.clamp(-bound, bound) / bound).view_as(picture)


def guide(conditional: Sample, unconditional: Sample, guidance: float, rescale: float = 0.0) -> Sample:
    """Apply classifier-free guidance: extrapolate from the unconditional through the conditional prediction.

    guidance: s in unconditional + s · (conditional - unconditional); 1 gives the conditional prediction. Ho and
    Salimans (2022) write s = 1 + w. rescale: share by which each image's standard deviation is moved to that of the
    conditional prediction (Lin et al., 2023, equations 15 and 16).
    """
    moved = unconditional + guidance * (conditional - unconditional)
    if not rescale:
        return moved
    axes = tuple(range(1, moved.ndim))
    ratio = conditional.std(axes, keepdim=True) / moved.std(axes, keepdim=True)
    return moved * (rescale * ratio + (1 - rescale))


def guided_denoiser(both: Network, noise: Noise, guidance: float, rescale: float = 0.0) -> Network:
    """Return a network with classifier-free guidance.

    both: network that gets x twice along the batch: the first half with the condition, the second without. A predicted
    variance is that of the conditional half.
    """

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        conditional, without = both(torch.cat([x, x]), torch.cat([timestep, timestep])).chunk(2)
        if noise.variance != "learned_range":
            return guide(conditional, without, guidance, rescale)
        (conditional, share), (without, _) = conditional.chunk(2, 1), without.chunk(2, 1)
        return torch.cat([guide(conditional, without, guidance, rescale), share], 1)

    return network


def label_denoiser(model: ImageModel, label: Labels | None, guidance: float = 1.0, rescale: float = 0.0) -> Network:
    """Return the model's network for these labels. With guidance, both predictions are computed in one batch."""
    if label is None or guidance == 1:
        return lambda x, timestep: model(x, timestep, label)
    labels = torch.cat([label, torch.full_like(label, model.config.n_classes)])
    return guided_denoiser(lambda x, timestep: model(x, timestep, labels), model.noise, guidance, rescale)


def standard_deviation(level: Level, next_level: Level) -> float:
    """Return the standard deviation of x at the next level given x and the image: √β̃ (Ho et al., 2020, equation 7)."""
    return next_level.sigma / level.sigma * math.sqrt(new_variance(level, next_level))


def new_variance(level: Level, next_level: Level) -> float:
    """Return the variance of the noise that the forward process adds from the next level to this one: β if alpha² +
    sigma² = 1."""
    return max(0.0, level.sigma**2 - (level.alpha / next_level.alpha * next_level.sigma) ** 2)

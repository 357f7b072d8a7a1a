"""A network at a noise level as the picture and the noise that it sees; knows no sampler and no kind of network.

Axes: batch, `*shape` = a picture's own (channels, height, width).
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.errors import UserError
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.diffusion.sampling_schedule import Level

Network: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # from x and the timestep of every row to the output


@runtime_checkable
class DiffusionConfig(Protocol):
    """What is asked of a denoising model's config: its pictures' height and width, channels and labels."""

    @property
    def size(self) -> int | tuple[int, int] | None:
        """Height and width that it was trained with, one number for both; None where nothing says so."""
        ...

    @property
    def channels(self) -> int:
        """Of a picture."""
        ...

    @property
    def n_classes(self) -> int:
        """Labels that it knows; 0 for a model without."""
        ...

    @property
    def null_class(self) -> bool:
        """Whether the label `n_classes` stands for none, as guidance needs it."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels' names, where they have some."""
        ...


@runtime_checkable
class DiffusionModel(Protocol):
    """A network that was trained to remove noise, and the noise that it was trained with.

    `model(x [batch, channels, height, width], timestep [batch], label [batch] | None)` gives its target for each row;
    with a learned variance, twice the channels.
    """

    @property
    def noise(self) -> Noise:
        """The noise that it removes."""
        ...

    @property
    def config(self) -> DiffusionConfig:
        """Its sizes."""
        ...

    def __call__(
        self,
        x: Float[Tensor, "batch channels height width"],
        timestep: Float[Tensor, " batch"] | Int[Tensor, " batch"],
        label: Int[Tensor, " batch"] | None = None,
    ) -> Tensor:
        """Its prediction."""
        ...

    def check_size(self, channels: int, height: int, width: int) -> None:
        """Refuses pictures that do not fit the network, with the nearest size that does, in a `UserError`."""
        ...


class DenoiserOutput(NamedTuple):
    """What a network sees in x = alpha · picture + sigma · noise.

    picture: clipped where the denoiser clips. noise: as the network has it, whatever was clipped.
    share: the network's word on the variance, from -1 (β̃) to 1 (β), where it gives one.
    """

    picture: Tensor
    noise: Tensor
    share: Tensor | None = None


class Denoiser:
    """The picture and the noise that a network sees at a level, by what it was trained to predict.

    `clip` and `threshold` say whether the bounds of the `Noise` are put to use: samplers differ in it. Outputs in half
    precision are read in x's type.
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

    def __call__(self, x: Float[Tensor, "batch *shape"], level: Level) -> DenoiserOutput:
        """The picture and the noise in x."""
        return self.read(self.output(x, level), x, level)

    def output(self, x: Float[Tensor, "batch *shape"], level: Level) -> Tensor:
        """What the network says, before it is read; whole timesteps are given as int64, others as float32."""
        kind = torch.int64 if level.timestep.is_integer() else torch.float32
        told = torch.full((len(x),), level.timestep, dtype=kind, device=x.device)
        return self.network(x, told).to(x.dtype)

    def read(self, output: Tensor, x: Float[Tensor, "batch *shape"], level: Level) -> DenoiserOutput:
        """What an output says of x, by the target."""
        share = None
        if self.noise.variance == "learned_range":
            output, share = output.chunk(2, 1)
        (_, alpha, sigma), target = level, self.noise.target
        if target == "noise":
            picture, noise = (x - sigma * output) / alpha, output
        elif target == "picture":
            picture, noise = output, (x - alpha * output) / sigma
        else:
            picture, noise = alpha * x - sigma * output, alpha * output + sigma * x
        return DenoiserOutput(self._bounded(picture), noise, share)

    def _bounded(self, picture: Tensor) -> Tensor:
        if self.threshold is not None:
            return dynamic_threshold(picture, self.threshold, self.noise.threshold_max)
        return picture if self.clip is None else picture.clamp(-self.clip, self.clip)


def dynamic_threshold(
    picture: Float[Tensor, "batch *shape"], share: float, most: float
) -> Float[Tensor, "batch *shape"]:
    """Each picture clipped at the quantile `share` of its own absolute numbers, held between 1 and `most`, and divided
    by it (dynamic thresholding; Saharia et al., 2022, section 2.3)."""
    flat = picture.flatten(1)
    bound = flat.abs().quantile(share, dim=1, keepdim=True).clamp(1, most)
    return (flat.clamp(-bound, bound) / bound).view_as(picture)


def guide(
    conditional: Float[Tensor, "batch *shape"],
    unconditional: Float[Tensor, "batch *shape"],
    guidance: float,
    rescale: float = 0.0,
) -> Float[Tensor, "batch *shape"]:
    """Classifier-free guidance: from the prediction without a condition through the one with it, and on.

    `guidance` is the s of unconditional + s · (conditional - unconditional): 1 is the conditional prediction itself,
    and Ho and Salimans (2022) write s = 1 + w. `rescale` goes that far towards the standard deviation that each
    picture's conditional prediction had (Lin et al., 2023, equations 15 and 16).
    """
    moved = unconditional + guidance * (conditional - unconditional)
    if not rescale:
        return moved
    axes = tuple(range(1, moved.ndim))
    ratio = conditional.std(axes, keepdim=True) / moved.std(axes, keepdim=True)
    return moved * (rescale * ratio + (1 - rescale))


def guided_denoiser(
    conditional: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    noise: Noise,
    guidance: float,
    rescale: float = 0.0,
) -> Network:
    """A network guided by its own prediction without the condition.

    `conditional` gives both outputs, with and without the condition, of x at a timestep. The variance that a network
    predicts beside its target is that with the condition.
    """

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        given, without = conditional(x, timestep)
        if noise.variance != "learned_range":
            return guide(given, without, guidance, rescale)
        (given, share), (without, _) = given.chunk(2, 1), without.chunk(2, 1)
        return torch.cat([guide(given, without, guidance, rescale), share], 1)

    return network


def label_denoiser(
    model: DiffusionModel, label: Int[Tensor, " batch"] | None, guidance: float = 1.0, rescale: float = 0.0
) -> Network:
    """The network of a model for these labels; guided, both predictions are made in one batch."""
    if label is None or guidance == 1:
        return lambda x, timestep: model(x, timestep, label)
    both = torch.cat([label, torch.full_like(label, model.config.n_classes)])

    def conditional(x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        given, without = model(torch.cat([x, x]), torch.cat([timestep, timestep]), both).chunk(2)
        return given, without

    return guided_denoiser(conditional, model.noise, guidance, rescale)


def standard_deviation(here: Level, there: Level) -> float:
    """The standard deviation of x there, given x here and the picture: √β̃ (Ho et al., 2020, equation 7)."""
    return there.sigma / here.sigma * math.sqrt(max(0.0, 1 - (here.alpha / there.alpha) ** 2))

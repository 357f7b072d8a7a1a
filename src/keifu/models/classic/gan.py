"""Generative adversarial network (Goodfellow et al., 2014, "Generative Adversarial Nets") and DCGAN (Radford et al.,
2015, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks").

New in 2014: no likelihood. A generator turns noise into pictures, and a discriminator learns to tell them from real
ones; each is the other's loss. Both were fully connected. New in 2015: networks of strided convolutions that train
without collapse, by batch normalisation, ReLU in the generator, leaky ReLU in the discriminator, and no pooling.

Axes: batch, latent, channels, height, width.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from keifu.errors import UserError, require_known
from keifu.layers.diffusion.image_model import ImageModel
from keifu.ranges import Count, check

Noise = Float[Tensor, "batch latent"]
Pixels = Float[Tensor, "batch channels height width"]
Scores = Float[Tensor, " batch"]
LEAK = 0.2  # slope of the discriminator's leaky ReLU below 0
# layer between a linear one and its activation
NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "none": lambda width: nn.Identity()}


@dataclass(frozen=True)
class Config:
    """Sizes of both networks. The defaults are a DCGAN for digits."""

    size: Count = 28  # side of the pictures in pixels
    channels: Count = 1  # channels of the pictures
    latent_dim: Count = 100  # numbers of noise from which a picture is made
    network: str = "dcgan"  # kind of both networks: dcgan, or mlp (fully connected, 2014)
    widths: tuple[Count, ...] = (64, 128)  # channels of dcgan's levels, the finest first; each halves the sides
    hidden_dim: Count = 1200  # width of mlp's two hidden layers
    norm: str = "batch"  # normalisation in dcgan: batch or none

    def __post_init__(self) -> None:
        check(self)
        require_known("network", self.network, NETWORKS)
        require_known("norm", self.norm, NORMS)
        factor = 2 ** len(self.widths)
        if self.network == "dcgan" and self.size % factor:
            raise UserError(f"size is {self.size}, and {len(self.widths)} widths need a multiple of {factor}.")

    @property
    def base(self) -> int:
        """Side of the coarsest level of dcgan."""
        return self.size // 2 ** len(self.widths)


def up(width: int, finer: int) -> nn.ConvTranspose2d:
    """Return a convolution that doubles the sides."""
    return nn.ConvTranspose2d(width, finer, 4, stride=2, padding=1, bias=False)


def down(width: int, coarser: int) -> nn.Conv2d:
    """Return a convolution that halves the sides."""
    return nn.Conv2d(width, coarser, 4, stride=2, padding=1, bias=False)


def dcgan_generator(config: Config) -> nn.Sequential:
    """Build DCGAN's generator: noise becomes a coarse map of features, and each level doubles its sides."""
    norm, coarsest = NORMS[config.norm], config.widths[-1]
    layers: list[nn.Module] = [
        nn.Linear(config.latent_dim, coarsest * config.base**2, bias=False),
        nn.Unflatten(1, (coarsest, config.base, config.base)), norm(coarsest), nn.ReLU(),
    ]  # fmt: skip
    for width, finer in zip(config.widths[:0:-1], config.widths[-2::-1], strict=True):
        layers += [up(width, finer), norm(finer), nn.ReLU()]
    return nn.Sequential(*layers, up(config.widths[0], config.channels), nn.Tanh())


def dcgan_features(config: Config) -> nn.Sequential:
    """Build the convolutions of DCGAN's discriminator. The first has no normalisation, as in the paper."""
    norm = NORMS[config.norm]
    layers: list[nn.Module] = [down(config.channels, config.widths[0]), nn.LeakyReLU(LEAK)]
    for width, coarser in zip(config.widths[:-1], config.widths[1:], strict=True):
        layers += [down(width, coarser), norm(coarser), nn.LeakyReLU(LEAK)]
    return nn.Sequential(*layers, nn.Flatten())


def dcgan_discriminator(config: Config) -> nn.Sequential:
    """Build DCGAN's discriminator."""
    return nn.Sequential(*dcgan_features(config), nn.Linear(config.widths[-1] * config.base**2, 1), nn.Flatten(0))


def mlp_generator(config: Config) -> nn.Sequential:
    """Build the generator of 2014, with two hidden layers."""
    shape = config.channels, config.size, config.size
    return nn.Sequential(
        nn.Linear(config.latent_dim, config.hidden_dim), nn.ReLU(), nn.Linear(config.hidden_dim, config.hidden_dim),
        nn.ReLU(), nn.Linear(config.hidden_dim, config.channels * config.size**2), nn.Tanh(), nn.Unflatten(1, shape),
    )  # fmt: skip


def mlp_discriminator(config: Config) -> nn.Sequential:
    """Build the discriminator of 2014, with leaky ReLU for maxout and without dropout."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(config.channels * config.size**2, config.hidden_dim), nn.LeakyReLU(LEAK),
        nn.Linear(config.hidden_dim, config.hidden_dim), nn.LeakyReLU(LEAK), nn.Linear(config.hidden_dim, 1),
        nn.Flatten(0),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[Config], nn.Sequential], Callable[[Config], nn.Sequential]]] = {
    "dcgan": (dcgan_generator, dcgan_discriminator),
    "mlp": (mlp_generator, mlp_discriminator),
}


class GAN(ImageModel):
    """A generator of pictures from noise, and a discriminator of real pictures and generated ones."""

    draws = "once"

    def __init__(self, config: Config, generator: nn.Module, discriminator: nn.Module):
        super().__init__()
        self.config, self.generator, self.discriminator = config, generator, discriminator

    def forward(self, noise: Noise) -> tuple[Pixels, Scores]:
        """Return pictures from -1 to 1, and the logits that the discriminator gives them to be real."""
        pictures = self.generator(noise)
        return pictures, self.discriminator(pictures)

    def check_size(self, channels: int, height: int, width: int) -> None:
        """Raise UserError for pictures of another shape than the model's."""
        here = self.config.channels, self.config.size, self.config.size
        if (channels, height, width) != here:
            raise UserError(
                f"The model draws pictures of {here[0]} x {here[1]} x {here[2]} (channels, height, width), not "
                f"{channels} x {height} x {width}."
            )


def build(config: Config) -> GAN:
    """Build a model with DCGAN's initialisation: weights with deviation 0.02, gains around 1."""
    model = GAN(config, *(make(config) for make in NETWORKS[config.network]))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
    return model


SIZES = {
    "dcgan-64": Config(size=64, channels=3, widths=(128, 256, 512, 1024)),
    "gan-mnist": Config(network="mlp"),
}
WEIGHT_NAMES = {"generator.*": "generator.*", "discriminator.*": "discriminator.*"}  # there is no published format
WRITES_TEXT = False

"""The autoencoder of latent diffusion (Rombach et al., 2022, "High-Resolution Image Synthesis with Latent Diffusion
Models", section 3.1): a variational autoencoder compresses images to small latents that keep only perceptible detail,
so that the diffusion model need not generate the rest. A small KL penalty keeps the latents near the normal
distribution.

Axes: batch, channels, height, width; latents have 1/factor of the sides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from keifu.layers.activations import activation
from keifu.layers.unet.conv import Downsample, Pixels, ResidualBlock, SpatialAttention, Upsample
from keifu.layers.unet.unet import Middle, check_sides
from keifu.models.hf import config as hf
from keifu.models.hf.unet import ATTENTION, ENDS, OLD_ATTENTION, SIZE, nested, stage_names

Latents = Float[Tensor, "batch latent_channels height width"]


@dataclass(frozen=True)
class Config:
    """The defaults are Stable Diffusion's.

    Attributes:
        size: the side of the training images in pixels, or their height and width.
        channels, latent_channels: channels of images, and of latents.
        widths: channels of each level, the finest first; each but the last halves the sides.
        n_residual_blocks: blocks of each level of the encoder; the decoder's levels have one more.
        scale: factor that gives latents a variance near 1 for the diffusion model.
    """

    size: int | tuple[int, int] = 512
    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    n_residual_blocks: int = 2
    norm_groups: int = 32
    activation: str = "silu"
    scale: float = 0.18215

    @property
    def factor(self) -> int:
        """Downsampling factor of the encoder: pixels per latent, along a side."""
        return 2 ** (len(self.widths) - 1)


# The paper's number of parameters in sizes.json was counted in the released weights.
SIZES = {
    "stable-diffusion-autoencoder": Config(),
    "latent-diffusion-f4-autoencoder": Config(size=256, latent_channels=3, widths=(128, 256, 512)),
}


class Gaussian(NamedTuple):
    """The encoder's output for an image: a diagonal normal distribution of latents."""

    mean: Latents
    log_variance: Latents

    def sample(self, noise: Latents) -> Latents:
        """Return a sample of latents from standard normal noise (reparametrisation)."""
        return self.mean + torch.exp(0.5 * self.log_variance) * noise

    def kl(self) -> Float[Tensor, " batch"]:
        """Return the KL divergence from the standard normal distribution, in nats per image."""
        return 0.5 * (self.mean.square() + self.log_variance.exp() - 1 - self.log_variance).sum((1, 2, 3))


class PixelEncoder(nn.Module):
    """Network first → levels, finest first → middle → last(swish(norm(·)))."""

    def __init__(self, first: nn.Module, levels: Sequence[Middle], middle: Middle, norm: nn.Module, last: nn.Module):
        super().__init__()
        self.first, self.levels, self.middle, self.norm, self.last = first, nn.ModuleList(levels), middle, norm, last

    def forward(self, x: Pixels) -> Float[Tensor, "batch moments small_height small_width"]:
        x = self.first(x).contiguous(memory_format=torch.channels_last)
        for level in self.levels:
            x = level(x)
        return self.last(F.silu(self.norm(self.middle(x))))


class PixelDecoder(PixelEncoder):
    """Network first → middle → levels, coarsest first → last(swish(norm(·)))."""

    def forward(self, x: Latents) -> Float[Tensor, "batch channels large_height large_width"]:
        x = self.middle(self.first(x).contiguous(memory_format=torch.channels_last))
        for level in self.levels:
            x = level(x)
        return self.last(F.silu(self.norm(x)))


class AutoencoderKL(nn.Module):
    """`PixelEncoder`, `PixelDecoder`, and a 1×1 convolution before and after the latents."""

    def __init__(self, config: Config, encoder: PixelEncoder, decoder: PixelDecoder):
        super().__init__()
        self.config, self.encoder, self.decoder = config, encoder, decoder
        self.to_moments = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.from_latents = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pictures: Pixels) -> Gaussian:
        """Return the distribution of an image's latents, in the image's dtype. Pixels are between -1 and 1.

        Raises UserError, with the nearest size, for sides that are not multiples of the factor.
        """
        self.check_size(*pictures.shape[2:])
        moments = self.to_moments(self.encoder(pictures.to(self.to_moments.weight.dtype))).to(pictures.dtype)
        mean, log_variance = moments.chunk(2, 1)
        return Gaussian(mean, log_variance.clamp(-30, 20))

    def decode(self, latents: Latents) -> Float[Tensor, "batch channels large_height large_width"]:
        """Return the images, about from -1 to 1, in the latents' dtype."""
        return self.decoder(self.from_latents(latents.to(self.from_latents.weight.dtype))).to(latents.dtype)

    def forward(self, pictures: Pixels) -> Pixels:
        """Return the reconstruction of images from the mean of their latents."""
        return self.decode(self.encode(pictures).mean)

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError, with the nearest size, for sides that are not multiples of the factor."""
        check_sides(height, width, self.config.factor)


def build(config: Config) -> AutoencoderKL:
    """Build a model with PyTorch's default initialisation, as in the released code."""
    return AutoencoderKL(config, *coders(config, 2 * config.latent_channels))


def coders(config: Any, outputs: int) -> tuple[PixelEncoder, PixelDecoder]:
    """Build an encoder with this number of output channels, and a decoder of latents.

    config: `Config`, or that of another autoencoder with the same fields of sizes.
    """
    norm = partial(nn.GroupNorm, config.norm_groups, eps=1e-6)
    residual = partial(ResidualBlock, norm=norm, activation=activation(config.activation))
    widths, last, count = config.widths, len(config.widths) - 1, config.n_residual_blocks

    def middle() -> Middle:
        return Middle([residual(widths[-1], widths[-1]) for _ in range(2)], [SpatialAttention(widths[-1], norm)])

    def level(before: int, width: int, blocks: int, resample: nn.Module | None) -> Middle:
        return Middle([residual(before if n == 0 else width, width) for n in range(blocks)], [], resample)

    down = [
        level(widths[max(0, n - 1)], width, count, Downsample(width) if n < last else None)
        for n, width in enumerate(widths)
    ]
    up = [
        level(widths[min(last, n + 1)], width, count + 1, Upsample(width) if n else None)
        for n, width in reversed([*enumerate(widths)])
    ]
    conv, inner = partial(nn.Conv2d, kernel_size=3, padding=1), config.latent_channels
    ends = (conv(config.channels, widths[0]), conv(widths[-1], outputs))
    encoder = PixelEncoder(ends[0], down, middle(), norm(widths[-1]), ends[1])
    ends = (conv(inner, widths[-1]), conv(widths[0], config.channels))
    return encoder, PixelDecoder(ends[0], up, middle(), norm(widths[0]), ends[1])


def coder_names(way: str) -> dict[str, str]:
    """Return the weight names of the encoder (way "down") or of the decoder ("up")."""
    resample = {"levels.*.resample.conv": f"{way}_blocks.*.{way}samplers.0.conv"}
    levels = stage_names("levels.*", f"{way}_blocks.*", {})
    return ENDS | levels | resample | stage_names("middle", "mid_block", ATTENTION)


CODER_NAMES = {
    **nested("encoder", "encoder", coder_names("down")),
    **nested("decoder", "decoder", coder_names("up")),
}
WEIGHT_NAMES = {
    **CODER_NAMES,
    "to_moments": "quant_conv",
    "from_latents": "post_quant_conv",
}
OLD_ENDINGS = OLD_ATTENTION
MODEL_TYPES = {"AutoencoderKL": "AutoencoderKL"}
FILES = ("config.json", "diffusion_pytorch_model.safetensors")
WRITES_TEXT = False
UNSUPPORTED: dict[str, Any] = {
    "shift_factor": None, "latents_mean": None, "latents_std": None, "use_quant_conv": True,
    "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

FIELDS: hf.Fields = {
    "size": SIZE._replace(default=32),
    "channels": hf.Field("in_channels", 3, also=("out_channels",)),
    "latent_channels": hf.Field("latent_channels", 4),
    "widths": hf.Field("block_out_channels", (64,), tuple, list),
    "n_residual_blocks": hf.Field("layers_per_block", 1),
    "norm_groups": hf.Field("norm_num_groups", 32),
    "activation": hf.activation_field("act_fn", "silu"),
    "scale": hf.Field("scaling_factor", 0.18215, float),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of diffusers' config.json of an AutoencoderKL."""
    fields = hf.read_fields(json, FIELDS)
    check_blocks(json, len(fields["widths"]), fields["channels"])
    return Config(**fields)


def check_blocks(json: Mapping[str, Any], levels: int, channels: int) -> None:
    """Raise ValueError if a published config has blocks that are not implemented, or changes the channels."""
    for field, block in BLOCKS.items():
        if json.get(field, [block]) != [block] * levels:
            raise ValueError(f"its {field} are {json.get(field)}, and what is implemented is {levels} {block}.")
    if json.get("out_channels", 3) != channels:
        raise ValueError(f"it reads {channels} channels and gives {json.get('out_channels', 3)}.")


def block_types(levels: int) -> dict[str, list[str]]:
    """Return the fields of a published config that name the blocks of each level."""
    return {field: [block] * levels for field, block in BLOCKS.items()}


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that diffusers reads."""
    return hf.write(config, MODEL_TYPES, FIELDS) | block_types(len(config.widths))

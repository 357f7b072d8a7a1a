"""The discrete variational autoencoder (dVAE) of DALL-E (Ramesh et al., 2021, "Zero-Shot Text-to-Image Generation",
section 2.1): an image becomes a small grid of codes from a codebook. They are trained through a relaxation of the
discrete choice (Gumbel-softmax).

Axes: batch, channels, height, width; rows, columns of the grid, 1/factor of the sides; codebook = its codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.unet.conv import grow_kernel
from keifu.layers.unet.unet import check_sides

Pixels = Float[Tensor, "batch channels height width"]
Logits = Float[Tensor, "batch codebook rows columns"]
Codes = Int[Tensor, "batch rows columns"]


@dataclass(frozen=True)
class Config:
    """The defaults are the released model's.

    Attributes:
        size: the side of the training images.
        channels: channels of the images.
        codebook_size: number of codes in the codebook.
        widths: channels of each level, the finest first; each but the last halves the sides.
        n_residual_blocks: blocks of each level, in the encoder and in the decoder.
        code_dim: dimension of a code's embedding in the decoder.
        edge: ε; pixel values are between ε and 1 - ε for the logit-Laplace distribution (appendix A.3).
    """

    size: int = 256
    channels: int = 3
    codebook_size: int = 8192
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    n_residual_blocks: int = 2
    code_dim: int = 128
    edge: float = 0.1

    @property
    def factor(self) -> int:
        """Downsampling factor of the encoder: pixels per code, along a side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """The side of the grid of codes of an image of `size`."""
        return self.size // self.factor


SIZES = {"dall-e-dvae": Config()}


class Laplace(NamedTuple):
    """The decoder's output for each pixel value: location and log-scale of the logit-Laplace distribution."""

    location: Pixels
    log_scale: Pixels

    def log_likelihood(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the log-density at values strictly between 0 and 1 (appendix A.3)."""
        spread = (torch.logit(values) - self.location).abs() * torch.exp(-self.log_scale)
        return -spread - self.log_scale - math.log(2) - torch.log(values * (1 - values))


class BottleneckBlock(nn.Module):
    """Block x + gain · convolutions(x), where each convolution follows a ReLU, with a quarter of the channels inside
    (appendix A.2).

    kernels: the sides of the four kernels. gain: 1 / (number of blocks in the encoder or decoder)².
    """

    def __init__(self, channels: int, out_channels: int, kernels: Sequence[int], gain: float):
        super().__init__()
        inner = out_channels // 4
        widths = [channels, inner, inner, inner, out_channels]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel, padding=kernel // 2)
            for before, after, kernel in zip(widths, widths[1:], kernels, strict=False)
        )
        self.shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None
        self.gain = gain

    def forward(self, x: Pixels) -> Float[Tensor, "batch out_channels height width"]:
        hidden = x
        for convolution in self.convolutions:
            hidden = convolution(F.relu(hidden))
        return (x if self.shortcut is None else self.shortcut(x)) + self.gain * hidden


class CodeEncoder(nn.Module):
    """A 7×7 convolution, levels with 2×2 max-pooling between them, and a logit for each code."""

    def __init__(self, config: Config):
        super().__init__()
        widths = (config.widths[0], *config.widths)
        self.first = nn.Conv2d(config.channels, widths[0], 7, padding=3)
        self.levels = _levels(widths, config.n_residual_blocks, (3, 3, 3, 1))
        self.last = nn.Conv2d(widths[-1], config.codebook_size, 1)

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks of all levels."""
        return [block for level in self.levels for block in level.children()]

    def forward(self, x: Pixels) -> Logits:
        x = self.first(x).contiguous(memory_format=torch.channels_last)
        for number, level in enumerate(self.levels):
            x = level(F.max_pool2d(x, 2) if number else x)
        return self.last(F.relu(x))


class CodeDecoder(nn.Module):
    """Embeddings of codes, levels with nearest-neighbour upsampling between them, and two numbers for each
    pixel value."""

    def __init__(self, config: Config):
        super().__init__()
        widths = (config.code_dim, *reversed(config.widths))
        self.first = nn.Conv2d(config.codebook_size, config.code_dim, 1)
        self.levels = _levels(widths, config.n_residual_blocks, (1, 3, 3, 3))
        self.last = nn.Conv2d(widths[-1], 2 * config.channels, 1)

    @property
    def blocks(self) -> list[nn.Module]:
        """Return the residual blocks of all levels."""
        return [block for level in self.levels for block in level.children()]

    def forward(self, shares: Logits) -> Float[Tensor, "batch twice height width"]:
        return self.pictured(self.first(shares))

    def of_codes(self, codes: Codes) -> Float[Tensor, "batch twice height width"]:
        """Compute the same for one code at each position, by looking up its embedding."""
        vectors = F.embedding(codes, self.first.weight[:, :, 0, 0].T).permute(0, 3, 1, 2)
        bias = self.first.bias
        return self.pictured(vectors if bias is None else vectors + bias[:, None, None])

    def pictured(self, x: Float[Tensor, "batch code_dim rows columns"]) -> Float[Tensor, "batch twice height width"]:
        """Compute everything after the first layer."""
        x = x.contiguous(memory_format=torch.channels_last)
        for number, level in enumerate(self.levels):
            x = level(grow_kernel(x) if number else x)
        return self.last(F.relu(x))


def _levels(widths: Sequence[int], blocks: int, kernels: Sequence[int]) -> nn.ModuleList:
    gain = 1 / (blocks * (len(widths) - 1)) ** 2

    def level(before: int, width: int) -> nn.Module:
        return nn.Sequential(*(BottleneckBlock(width if n else before, width, kernels, gain) for n in range(blocks)))

    return nn.ModuleList(level(before, width) for before, width in zip(widths, widths[1:], strict=False))


class DiscreteVAE(nn.Module):
    """The encoder and the decoder."""

    def __init__(self, config: Config, encoder: CodeEncoder, decoder: CodeDecoder):
        super().__init__()
        self.config, self.encoder, self.decoder = config, encoder, decoder

    def values(self, pictures: Pixels) -> Pixels:
        """Convert images from -1 to 1 to values from ε to 1 - ε, the encoder's input and the decoder's target."""
        edge = self.config.edge
        return (pictures + 1) / 2 * (1 - 2 * edge) + edge

    def logits(self, pictures: Pixels) -> Logits:
        """Return the logits of the codes at each grid position of images from -1 to 1, in the images' dtype.

        Raises UserError, with the nearest size, for sides that are not multiples of the factor.
        """
        self.check_size(*pictures.shape[2:])
        return self.encoder(self.values(pictures).to(self.encoder.last.weight.dtype)).to(pictures.dtype)

    def encode(self, pictures: Pixels) -> Codes:
        """Return the most likely code of each grid position."""
        return self.logits(pictures).argmax(1)

    def relaxed(self, shares: Logits) -> Laplace:
        """Return the decoder's output for relaxed codes. shares: weights of the codebook's codes at each grid position;
        they sum to one."""
        output = self.decoder(shares.to(self.decoder.first.weight.dtype)).to(shares.dtype)
        return Laplace(*output.chunk(2, 1))

    def decode(self, codes: Codes) -> Pixels:
        """Return the images of codes, from -1 to 1, float32: medians of the decoder's distributions."""
        location = self.decoder.of_codes(codes).float().chunk(2, 1)[0]
        edge = self.config.edge
        return (location.sigmoid() - edge).div(1 - 2 * edge).clamp(0, 1) * 2 - 1

    def forward(self, pictures: Pixels) -> Pixels:
        """Return the reconstruction of images from their most likely codes."""
        return self.decode(self.encode(pictures))

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError, with the nearest size, for sides that are not multiples of the factor."""
        check_sides(height, width, self.config.factor)


def build(config: Config) -> DiscreteVAE:
    """Build a model with the released code's initialisation: standard deviations of 1/√(inputs), biases zero."""
    if wrong := [width for width in config.widths if width % 4]:
        raise UserError(f"A level has {wrong[0]} channels, and blocks take a quarter of them: choose multiples of 4.")
    model = DiscreteVAE(config, CodeEncoder(config), CodeDecoder(config))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


WRITES_TEXT = False

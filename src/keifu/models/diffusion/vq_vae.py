"""VQ-VAE (van den Oord et al., 2017, "Neural Discrete Representation Learning"). New: an autoencoder whose latents are
discrete. Each vector of the encoder is replaced by the nearest one of a learned codebook, and gradients pass straight
through the replacement.

The encoder and the decoder are those of VQGAN (Esser et al., 2021, "Taming Transformers"), which latent diffusion and
diffusers' VQModel use too.

Axes: batch, channels, height, width; rows, columns of the grid of codes, 1/factor of the sides.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.layers.unet.conv import Pixels
from keifu.layers.unet.unet import check_sides
from keifu.models.diffusion.autoencoder_kl import (
    CODER_NAMES,
    PixelDecoder,
    PixelEncoder,
    block_types,
    check_blocks,
    coders,
)
from keifu.models.hf import config as hf
from keifu.models.hf.unet import OLD_ATTENTION, SIZE
from keifu.ranges import Count, Positive, check

Vectors = Float[Tensor, "batch code_dim rows columns"]
Codes = Int[Tensor, "batch rows columns"]


@dataclass(frozen=True)
class Config:
    """The defaults are those of latent diffusion's autoencoder for faces.

    Attributes:
        size: the side of the training images in pixels, or their height and width.
        channels, latent_channels: channels of images, and of the encoder's output.
        widths: channels of each level, the finest first; each but the last halves the sides.
        n_residual_blocks: blocks of each level of the encoder; the decoder's levels have one more.
        codebook_size: number of codes in the codebook.
        code_dim: dimension of a code; None: latent_channels.
        scale: factor that gives latents a variance near 1 for a diffusion model.
    """

    size: Count | tuple[Count, Count] = 256
    channels: Count = 3
    latent_channels: Count = 3
    widths: tuple[Count, ...] = (128, 256, 512)
    n_residual_blocks: Count = 2
    codebook_size: Count = 8192
    code_dim: Count | None = None
    norm_groups: Count = 32
    activation: str = "silu"
    scale: Positive = 0.18215

    def __post_init__(self) -> None:
        check(self)

    @property
    def factor(self) -> int:
        """Downsampling factor of the encoder: pixels per code, along a side."""
        return 2 ** (len(self.widths) - 1)


SIZES = {"latent-diffusion-vq-f4-autoencoder": Config()}


class CodeTable(nn.Module):
    """Base class of codebooks: a table of vectors, by which the vectors of an encoder are replaced."""

    weight: Tensor
    averages = False  # whether `update` moves the codes, instead of a gradient

    def nearest(self, vectors: Vectors) -> Codes:
        """Return the number of the nearest code (Euclidean distance) at each position."""
        flat = vectors.movedim(1, -1).flatten(0, 2)
        codes = torch.cdist(flat.float(), self.weight.float()).argmin(1)
        return codes.view(len(vectors), *vectors.shape[2:])

    def vectors(self, codes: Codes) -> Vectors:
        """Return the vectors of codes."""
        return F.embedding(codes, self.weight).movedim(-1, 1)


class Codebook(CodeTable, nn.Embedding):
    """Table of vectors that learn by their gradient (van den Oord et al., 2017, equation 3)."""


class AveragedCodebook(CodeTable):
    """Table in which each code is a moving average of the vectors that it replaces (appendix A.1 of the paper).

    usage: moving average of the number of vectors that a code replaces in a step. A code with less than `least` is
    moved to a random vector of the batch (Dhariwal et al., 2020, "Jukebox", section 3.1); 0 moves none.
    """

    averages = True

    def __init__(self, weight: Tensor, decay: float = 0.99, least: float = 0.1):
        super().__init__()
        self.decay, self.least = decay, least
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("usage", torch.ones(len(weight), device=weight.device))
        self.usage: Tensor

    @torch.no_grad()
    def update(self, vectors: Vectors, codes: Codes) -> None:
        """Move the codes to the vectors that they have replaced, after a step."""
        flat, index = vectors.movedim(1, -1).flatten(0, 2).float(), codes.flatten()
        sums = torch.zeros_like(self.weight).index_add_(0, index, flat)
        counts = torch.bincount(index, minlength=len(self.usage)).to(self.usage)
        usage = self.decay * self.usage + (1 - self.decay) * counts
        total = self.decay * self.usage[:, None] * self.weight + (1 - self.decay) * sums
        self.weight.copy_(total / usage[:, None].clamp(min=1e-12))
        self.usage.copy_(usage)
        unused = (usage < self.least).nonzero()[:, 0]
        drawn = torch.randint(len(flat), (len(unused),), device=flat.device)
        self.weight[unused], self.usage[unused] = flat[drawn], 1.0


class VQVAE(nn.Module):
    """`PixelEncoder`, codebook, `PixelDecoder`, and a 1×1 convolution before and after the codes."""

    def __init__(self, config: Config, encoder: PixelEncoder, decoder: PixelDecoder):
        super().__init__()
        code_dim = config.code_dim or config.latent_channels
        self.config, self.encoder, self.decoder = config, encoder, decoder
        self.to_vectors = nn.Conv2d(config.latent_channels, code_dim, 1)
        self.codebook: CodeTable = Codebook(config.codebook_size, code_dim)
        self.from_vectors = nn.Conv2d(code_dim, config.latent_channels, 1)

    def vectors(self, pictures: Pixels) -> Vectors:
        """Return the vectors of images from -1 to 1, before they are replaced by codes.

        Raises UserError, with the nearest size, for sides that are not multiples of the factor.
        """
        height, width = pictures.shape[2:]
        check_sides(height, width, self.config.factor)
        return self.to_vectors(self.encoder(pictures.to(self.to_vectors.weight.dtype)))

    def encode(self, pictures: Pixels) -> Codes:
        """Return the codes of images."""
        return self.codebook.nearest(self.vectors(pictures))

    def decode(self, codes: Codes) -> Pixels:
        """Return the images of codes, about from -1 to 1."""
        return self.pictured(self.codebook.vectors(codes))

    def pictured(self, vectors: Vectors) -> Pixels:
        """Return the images of vectors, in training those that let gradients through."""
        return self.decoder(self.from_vectors(vectors))

    def forward(self, pictures: Pixels) -> Pixels:
        """Return the reconstruction of images from their codes."""
        return self.decode(self.encode(pictures)).to(pictures.dtype)


def build(config: Config) -> VQVAE:
    """Build a model with PyTorch's default initialisation; codes are uniform between ±1 / codebook_size."""
    model = VQVAE(config, *coders(config, config.latent_channels))
    nn.init.uniform_(model.codebook.weight, -1 / config.codebook_size, 1 / config.codebook_size)
    return model


WEIGHT_NAMES = {
    **CODER_NAMES,
    "to_vectors": "quant_conv",
    "codebook": "quantize.embedding",
    "from_vectors": "post_quant_conv",
}
OLD_ENDINGS = OLD_ATTENTION
MODEL_TYPES = {"VQModel": "VQModel"}
FILES = ("config.json", "diffusion_pytorch_model.safetensors")
WRITES_TEXT = False
UNSUPPORTED: dict[str, Any] = {"norm_type": "group", "mid_block_add_attention": True, "lookup_from_codebook": False}
FIELDS: hf.Fields = {
    "size": SIZE._replace(default=32),
    "channels": hf.Field("in_channels", 3, also=("out_channels",)),
    "latent_channels": hf.Field("latent_channels", 3),
    "widths": hf.Field("block_out_channels", (64,), tuple, list),
    "n_residual_blocks": hf.Field("layers_per_block", 1),
    "codebook_size": hf.Field("num_vq_embeddings", 256),
    "code_dim": hf.Field("vq_embed_dim", None),
    "norm_groups": hf.Field("norm_num_groups", 32),
    "activation": hf.activation_field("act_fn", "silu"),
    "scale": hf.Field("scaling_factor", 0.18215, float),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of diffusers' config.json of a VQModel."""
    fields = hf.read_fields(json, FIELDS)
    check_blocks(json, len(fields["widths"]), fields["channels"])
    return Config(**fields)


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that diffusers reads."""
    return hf.write(config, MODEL_TYPES, FIELDS) | block_types(len(config.widths))

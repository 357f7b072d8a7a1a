"""Text-conditional latent diffusion (Rombach et al., 2022; Stable Diffusion): a diffusion model in an autoencoder's
latents, where a step costs a fraction of one in pixels. Its U-Net has cross-attention to an encoded text.

Without an autoencoder the same network works in pixels, for comparison: its latents are the images themselves.

Axes: batch, channels, height, width; length = tokens of a text.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from keifu.errors import UserError
from keifu.layers.attention.masks import PaddingMask
from keifu.layers.diffusion.image_model import ImageModel, Predicted, Sample, Time
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.unet.spatial_transformer import Memories
from keifu.layers.unet.unet import check_sides
from keifu.models.clip import text as clip_text
from keifu.models.diffusion import autoencoder_kl, conditioned_unet
from keifu.models.diffusion.autoencoder_kl import AutoencoderKL
from keifu.models.diffusion.conditioned_unet import ConditionedUNet
from keifu.models.hf.config import write_native
from keifu.models.hf.schedulers import read_scheduler, write_scheduler

Parts = Mapping[str, tuple[str, Any]]  # a pipeline's folder → the field of the Config, and the model's file
NOISE = Noise(
    schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip=None, steps_offset=1, last_alpha_one=False
)  # the paper's for latents, as in Stable Diffusion's files


@dataclass(frozen=True)
class Config(clip_text.WithText):
    """The defaults are Stable Diffusion 1's.

    autoencoder: None for a U-Net that works in pixels. noise: the noise schedule and prediction target of the training.
    """

    text: clip_text.Config = field(default_factory=lambda: clip_text.SIZES["stable-diffusion-text"])
    unet: conditioned_unet.Config = field(default_factory=conditioned_unet.Config)
    autoencoder: autoencoder_kl.Config | None = field(default_factory=autoencoder_kl.Config)
    noise: Noise = NOISE

    def __post_init__(self) -> None:
        inner = self.channels
        fits = inner, 2 * inner + 1
        if self.unet.channels not in fits:
            raise UserError(f"The U-Net reads {self.unet.channels} channels and latents have {inner}: {fits} fit.")
        if self.unet.context_dim != self.text.dim:
            numbers = f"{self.unet.context_dim} numbers per token, and the text has {self.text.dim}"
            raise UserError(f"The U-Net reads {numbers}.")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the training images, in pixels; None if unknown."""
        size, factor = self.unet.size, self.factor
        sides = (size, size) if isinstance(size, int) else size
        return None if sides is None else (sides[0] * factor, sides[1] * factor)

    @property
    def channels(self) -> int:
        """The number of channels of the latents."""
        return self.unet.predicted_channels if self.autoencoder is None else self.autoencoder.latent_channels

    @property
    def factor(self) -> int:
        """Downsampling factor of the autoencoder: pixels per latent, along a side."""
        return 1 if self.autoencoder is None else self.autoencoder.factor

    @property
    def scale(self) -> float:
        """Factor by which latents are scaled for the diffusion model."""
        return 1.0 if self.autoencoder is None else self.autoencoder.scale

    @property
    def colours(self) -> int:
        """Channels of the images."""
        return self.channels if self.autoencoder is None else self.autoencoder.channels

    @property
    def masked(self) -> bool:
        """Whether it is an inpainting model, whose U-Net also reads a mask and the masked image."""
        return self.unet.channels > self.channels


_TEXT_2 = clip_text.Config(  # OpenCLIP's ViT-H/14, without its last layer
    dim=1024, hidden_dim=4096, n_layers=23, n_heads=16, activation="gelu", embedding_dim=512, projected=False
)
_SECOND = Config(_TEXT_2, conditioned_unet.SIZES["stable-diffusion-2-base-unet"])
SIZES = {
    "stable-diffusion-1": Config(),
    "stable-diffusion-1-inpainting": Config(unet=conditioned_unet.SIZES["stable-diffusion-1-inpainting-unet"]),
    "stable-diffusion-2-base": _SECOND,
    "stable-diffusion-2": replace(
        _SECOND,
        unet=conditioned_unet.SIZES["stable-diffusion-2-unet"],
        autoencoder=autoencoder_kl.Config(size=768),
        noise=replace(NOISE, target="velocity"),
    ),
}


class LatentDiffusion(ImageModel):
    """The text encoder, the U-Net and the autoencoder, which is None in a model that works in pixels."""

    draws = "latents"

    def __init__(
        self, config: Config, text: clip_text.TextTower, unet: ConditionedUNet, autoencoder: AutoencoderKL | None
    ):
        super().__init__()
        self.config, self.text, self.unet, self.autoencoder = config, text, unet, autoencoder

    @property
    def coder(self) -> AutoencoderKL | None:
        """Return the autoencoder."""
        return self.autoencoder

    def encode_text(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length dim"]:
        """Return the context of the U-Net: the text's hidden states after the last norm, padding included."""
        return self.text.encode(tokens)

    def project(self, context: Float[Tensor, "batch length dim"]) -> Memories:
        """Return the context's keys and values in every transformer of the U-Net. Compute them once per image."""
        return self.unet.project(context)

    def forward(self, x: Sample, timestep: Time, projected: Memories) -> Predicted:
        """Return the prediction for noisy latents."""
        return self.unet.predict(x, timestep, projected, PaddingMask())

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError, with the nearest size, for image sizes in pixels that do not fit the network."""
        check_sides(height, width, self.config.factor * self.unet.factor)


def build(config: Config) -> LatentDiffusion:
    """Build a model. Each part is initialised by its own `build`."""
    return LatentDiffusion(config, **build_parts(config, PARTS))


PARTS: Parts = {
    "vae": ("autoencoder", autoencoder_kl),
    "text_encoder": ("text", clip_text),
    "unet": ("unet", conditioned_unet),
}


def build_parts(config: Any, parts: Parts) -> dict[str, Any]:
    """Build every part of a pipeline by its own `build`. A part that the Config leaves out is None."""
    return {ours: (part := vars(config)[ours]) and module.build(part) for ours, module in parts.values()}


def write_parts(config: Any, parts: Parts) -> dict[str, Any]:
    """Return the published configs of a pipeline's parts by their folders; None for a part that is left out."""
    return {
        folder: (part := vars(config)[ours]) and module.to_published(part) for folder, (ours, module) in parts.items()
    }


def names_of(parts: Parts) -> dict[str, str]:
    """Return the weight names in a pipeline: those of each part, with the part's field as our prefix and its folder as
    theirs."""
    return {
        f"{ours}.{name}": f"{folder}.{theirs}"
        for folder, (ours, module) in parts.items()
        for name, theirs in module.WEIGHT_NAMES.items()
    }


WEIGHT_NAMES = names_of(PARTS)
NOT_WEIGHTS = ("text_encoder.text_model.embeddings.position_ids",)
OLD_ENDINGS = autoencoder_kl.OLD_ENDINGS
MODEL_TYPES = {"StableDiffusionPipeline": "StableDiffusionPipeline"}
FILES = ("model_index.json", "diffusion_pytorch_model.safetensors")


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config from the configs of a pipeline's parts, by their folders."""
    parts = {ours: module.from_published(json[folder]) for folder, (ours, module) in PARTS.items()}
    return Config(**parts, noise=read_scheduler(json["scheduler"]))


def to_published(config: Config) -> dict[str, Any]:
    """Return the configs of a pipeline's parts, as `from_published` reads them. Without an autoencoder, no diffusers
    pipeline fits, and the config is written in keifu's form."""
    if config.autoencoder is None:
        return write_native("keifu_latent_diffusion", config)
    return {
        "model_type": "StableDiffusionPipeline",
        **write_parts(config, PARTS),
        "scheduler": write_scheduler(config.noise),
    }

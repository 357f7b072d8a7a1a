"""unCLIP (Ramesh et al., 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents"; DALL-E 2): CLIP's
image encoder inverted by diffusion. A prior generates an image embedding from a caption, a decoder generates an image
from the embedding, and diffusion upsamplers enlarge it.

Axes: batch, channels, height, width; length = tokens of a caption, embedding = numbers of CLIP's embeddings.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.attention.masks import PaddingMask
from keifu.layers.diffusion.image_model import ImageModel, Predicted, Sample, Time
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.layers.unet.spatial_transformer import Memories
from keifu.models.clip import image as clip_image, text as clip_text
from keifu.models.diffusion import ddpm
from keifu.models.diffusion.latent_diffusion import Parts, build_parts, names_of, write_parts
from keifu.models.hf.image_processor import Pixels, read_pixels, write_pixels
from keifu.models.hf.schedulers import read_scheduler, write_unclip_scheduler
from keifu.models.unclip import conditioning, decoder as unclip_decoder, prior as unclip_prior

Embedding = Float[Tensor, "batch embedding"]
PRIOR = Noise(schedule="cosine", target="picture", clip=5.0, spacing="linspace")
DECODER = Noise(schedule="cosine", variance="learned_range", spacing="linspace")
UPSAMPLER = ddpm.SIZES["karlo-upsampler"]


@dataclass(frozen=True)
class Config(clip_text.WithText):
    """The defaults are Karlo's, the unCLIP whose weights are public.

    Attributes:
        prior: None in a model for image variations only.
        image, pixels: CLIP's image encoder and its preprocessing, for image variations; None without them.
        upsampler, last_upsampler: for all steps but the last, and for the last; None without upsampling.
        prior_noise, decoder_noise: their noise schedules and prediction targets; the upsampler's is in its Config.
    """

    text: clip_text.Config = field(
        default_factory=lambda: replace(clip_text.SIZES["stable-diffusion-text"], projected=True)
    )
    conditions: conditioning.Config = field(default_factory=conditioning.Config)
    decoder: unclip_decoder.Config = field(default_factory=unclip_decoder.Config)
    prior: unclip_prior.Config | None = field(default_factory=unclip_prior.Config)
    image: clip_image.Config | None = None
    pixels: Pixels | None = None
    upsampler: ddpm.Config | None = UPSAMPLER
    last_upsampler: ddpm.Config | None = UPSAMPLER
    prior_noise: Noise = PRIOR
    decoder_noise: Noise = DECODER

    def __post_init__(self) -> None:
        embedding_dim, texts = self.conditions.embedding_dim, (self.text.dim, self.text.embedding_dim)
        images = [] if self.image is None else [self.image.embedding_dim]
        priors = [] if self.prior is None else [self.prior.embedding_dim, self.prior.predicted_dim or embedding_dim]
        if {*texts, *images, *priors} != {embedding_dim}:
            raise UserError(f"Embeddings have {embedding_dim} numbers, and its parts {(*texts, *images, *priors)}.")
        if not all(encoder.projected for encoder in (self.text, self.image) if encoder is not None):
            raise UserError("An encoder has no projection into the space of CLIP's embeddings, which unCLIP needs.")
        widths = self.conditions.time_dim, self.conditions.context_dim
        if widths != (self.decoder.label_dim or self.decoder.time_width, self.decoder.context_dim):
            raise UserError(f"The decoder is given {widths} numbers, which are not as many as it reads.")
        if self.prior is not None and self.prior.context_length != self.text.context_length:
            raise UserError(f"The prior reads {self.prior.context_length} tokens, and captions have "
                             f"{self.text.context_length}.")  # fmt: skip
        for upsampler in (self.upsampler, self.last_upsampler):
            if upsampler is not None and upsampler.channels != 2 * self.decoder.channels:
                raise UserError(f"An upsampler reads {upsampler.channels} channels, not those of noise and a picture.")
        if (self.upsampler is None) != (self.last_upsampler is None):
            raise UserError("unCLIP needs one upsampler for the last step, and one for the steps before it.")

    @property
    def colours(self) -> int:
        """The number of channels of a picture."""
        return self.decoder.channels

    @property
    def small_size(self) -> tuple[int, int] | None:
        """Height and width of the decoder's training images; None if unknown."""
        return _sides(self.decoder.size)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images after upsampling."""
        return self.small_size if self.upsampler is None else _sides(self.upsampler.size)

    @property
    def upsampling_noise(self) -> Noise | None:
        """The noise schedule and prediction target of the upsamplers."""
        return None if self.upsampler is None else self.upsampler.noise

    @property
    def embedding_dim(self) -> int:
        """Dimension of CLIP's embeddings."""
        return self.conditions.embedding_dim


def _sides(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


SIZES = {"karlo": Config()}


class Caption(NamedTuple):
    """An encoded caption: CLIP's embedding, its hidden states, and the mask of its real tokens."""

    embedding: Embedding
    tokens: Float[Tensor, "batch length embedding"]
    real: Bool[Tensor, "batch length"]


class UnclipConditioning(NamedTuple):
    """The conditioning of the decoder, the same at every step: `time` is added to the timestep embedding; `projected`
    and `mask` are for the attentions."""

    time: Float[Tensor, "batch time_dim"]
    projected: Memories
    mask: PaddingMask


class Unclip(ImageModel):
    """All parts of unCLIP. Those that the Config leaves out are None."""

    draws = "embeddings"

    def __init__(self, config: Config, **parts: nn.Module | None):
        super().__init__()
        self.config = config
        for name, part in parts.items():
            self.add_module(name, part)

    text: clip_text.TextTower
    conditions: conditioning.Conditions
    decoder: unclip_decoder.Decoder
    prior: unclip_prior.Prior
    image: clip_image.VisionTransformer
    upsampler: ddpm.DDPM
    last_upsampler: ddpm.DDPM

    def encode_text(self, tokens: Int[Tensor, "batch length"], real: Bool[Tensor, "batch length"]) -> Caption:
        """Return the captions encoded for prior and decoder. Padding follows the end of each."""
        hidden = self.text.encode(tokens)
        return Caption(self.text.projection(self.text.pool(hidden, tokens)), hidden, real)

    def encode_image(self, pixels: Float[Tensor, "batch channels rows columns"]) -> Embedding:
        """Return CLIP's embeddings of images, preprocessed as in the config's `pixels`."""
        if self.config.image is None:
            raise UserError("This unCLIP has no image_encoder, so it cannot see a picture: give a text.")
        return self.image(pixels)

    def predict_embedding(self, x: Embedding, timestep: Time, caption: Caption) -> Embedding:
        """Return the prior's prediction of the normalised image embedding from noisy ones."""
        return self.prior(x, timestep, *caption)

    def null_embedding(self, batch: int) -> Embedding:
        """Return the null image embedding."""
        return self.conditions.none.expand(batch, -1)

    def embed(self, image: Embedding, caption: Caption) -> UnclipConditioning:
        """Return the decoder's conditioning from embeddings and captions. Compute it once per image, for all steps."""
        image = image.to(self.conditions.none.dtype)
        time, context = self.conditions(image, caption.embedding, caption.tokens)
        real = F.pad(caption.real, (self.conditions.config.n_tokens, 0), value=True)
        return UnclipConditioning(time, self.decoder.project(context), PaddingMask(real))

    def forward(self, x: Sample, timestep: Time, conditioning: UnclipConditioning) -> Predicted:
        """Return the decoder's prediction for noisy images."""
        return self.decoder.predict(x, timestep, *conditioning)

    def upsample(self, x: Sample, timestep: Time, small: Sample, last: bool = False) -> Predicted:
        """Return the upsampler's prediction for noisy images, given the small ones resized to the same size. last: for
        the step that ends at the clean image."""
        return (self.last_upsampler if last else self.upsampler)(torch.cat([x, small], 1), timestep)

    def check_size(self, height: int, width: int) -> None:
        """Raise UserError, with the nearest size, for sizes that the decoder cannot generate."""
        self.decoder.network.check_size(self.config.colours, height, width)


def build(config: Config) -> Unclip:
    """Build a model. Each part is initialised by its own `build`."""
    return Unclip(config, **build_parts(config, PARTS))


PARTS: Parts = {
    "text_encoder": ("text", clip_text),
    "text_proj": ("conditions", conditioning),
    "decoder": ("decoder", unclip_decoder),
    "prior": ("prior", unclip_prior),
    "image_encoder": ("image", clip_image),
    "super_res_first": ("upsampler", ddpm),
    "super_res_last": ("last_upsampler", ddpm),
}
WEIGHT_NAMES = names_of(PARTS)
NOT_WEIGHTS = (
    "text_encoder.text_model.embeddings.position_ids", "image_encoder.vision_model.embeddings.position_ids",
)  # fmt: skip
MODEL_TYPES = {"UnCLIPPipeline": "UnCLIPPipeline"}
FILES = ("model_index.json", "diffusion_pytorch_model.safetensors")


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config from the configs of a pipeline's parts, by their folders."""
    enlarging = {"scheduler": json.get("super_res_scheduler")}  # here the upsamplers' configs include their scheduler
    parts = {
        ours: module.from_published(json[folder] | enlarging) if json.get(folder) else None
        for folder, (ours, module) in PARTS.items()
    }
    image_config = parts["image"]
    files: dict[str, Any] = {"prior_noise": json.get("prior_scheduler"), "decoder_noise": json["decoder_scheduler"]}
    noises: dict[str, Any] = {ours: read_scheduler(file) for ours, file in files.items() if file}
    pixels = None if image_config is None else read_pixels(json.get("feature_extractor"), image_config.image_size)
    return Config(**parts, pixels=pixels, **noises)


def to_published(config: Config) -> dict[str, Any]:
    """Return the configs of a pipeline's parts, as `from_published` reads them. A missing part is None."""
    parts = {folder: file and file | ({"scheduler": None} if "scheduler" in file else {})
             for folder, file in write_parts(config, PARTS).items()}  # fmt: skip
    noises = {
        "prior_scheduler": None if config.prior is None else config.prior_noise,
        "decoder_scheduler": config.decoder_noise,
        "super_res_scheduler": config.upsampling_noise,
    }
    return {
        "model_type": "UnCLIPPipeline",
        **parts,
        "feature_extractor": None if config.pixels is None else write_pixels(config.pixels),
        **{name: noise and write_unclip_scheduler(noise) for name, noise in noises.items()},
    }

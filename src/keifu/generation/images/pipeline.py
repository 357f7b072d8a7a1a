"""Image pipelines: one interface for pixel diffusion, latent diffusion, unCLIP and DALL-E."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.images import pixel_diffusion
from keifu.generation.images.autoregressive import AutoregressivePipeline
from keifu.generation.images.latent_diffusion import LatentDiffusionPipeline, TextToImagePipeline
from keifu.generation.images.pixel_diffusion import Bytes, ImageRequest, Watch
from keifu.generation.images.png_metadata import fingerprint
from keifu.generation.images.unclip import UnclipPipeline
from keifu.layers.diffusion.image_model import ImageModel
from keifu.layers.diffusion.noise_schedule import Noise


class PixelPipeline:
    """Generates images with a pixel diffusion model.

    usual_guidance, usual_sampler: the defaults. pixels: whether its steps are images, not latents.
    """

    usual_guidance = 1.0
    usual_sampler = "ddim"
    pixels = True

    def __init__(self, model: ImageModel):
        self.model = model

    @property
    def noise(self) -> Noise:
        """The noise schedule."""
        return self.model.noise

    def fingerprint(self) -> str:
        """A digest of weights and config: equal ones generate the same images."""
        return fingerprint(self.model)

    def label(self, name: str) -> int:
        """A class by its name, or by its number; an unknown one is a `UserError`."""
        return pixel_diffusion.label_number(self.model, name)

    def resolved(self, wanted: ImageRequest) -> ImageRequest:
        """See `ImageRequest.resolved`."""
        return wanted.resolved(self.model)

    def draw(self, wanted: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None) -> Bytes:
        """See `draw_images`."""
        return pixel_diffusion.draw_images(self.model, wanted, seeds, watch)


ImagePipeline: TypeAlias = PixelPipeline | TextToImagePipeline
PIPELINES = {"latents": LatentDiffusionPipeline, "embeddings": UnclipPipeline, "tokens": AutoregressivePipeline}


def is_text_to_image(model: nn.Module) -> bool:
    """Whether the model generates images from text alone."""
    if not isinstance(model, ImageModel) or model.draws == "pixels":
        return False
    if model.draws == "embeddings":
        return model.config.imagines
    return model.draws == "tokens" or not model.config.masked


def text_to_image_pipeline(model: nn.Module, tokenizer: Tokenizer | None) -> TextToImagePipeline:
    """The text-to-image pipeline of a model; any other model is a `UserError`."""
    found = image_pipeline(model, lambda: tokenizer)
    if not isinstance(found, TextToImagePipeline):
        raise UserError(f"A {type(model).__name__} draws from no text: choose a model that reads.")
    return found


def image_pipeline(model: nn.Module, tokenizer: Callable[[], Tokenizer | None]) -> ImagePipeline:
    """The pipeline of an image model, with its tokenizer if it is conditioned on text; any other is a `UserError`."""
    if not isinstance(model, ImageModel) or model.draws == "pixels":
        return PixelPipeline(pixel_diffusion.require_diffusion_model(model))
    found = tokenizer()
    if found is None:
        raise UserError(f"A {type(model).__name__} draws from a text, and there is no tokenizer beside it.")
    return PIPELINES[model.draws](model, found)

"""Image pipelines: one interface for pixel diffusion, latent diffusion, unCLIP and DALL-E."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from torch import nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.generation.images import pixel_diffusion
from keifu.generation.images.autoregressive import AutoregressivePipeline, ImageTokenModel
from keifu.generation.images.denoiser import DiffusionModel
from keifu.generation.images.latent_diffusion import LatentDiffusionPipeline, TextConditionedModel
from keifu.generation.images.pixel_diffusion import Bytes, ImageRequest, Watch
from keifu.generation.images.png_metadata import fingerprint
from keifu.generation.images.unclip import UnclipModel, UnclipPipeline
from keifu.layers.diffusion.noise_schedule import Noise


@runtime_checkable
class ImagePipeline(Protocol):
    """Interface of a model with everything that it needs to generate images.

    usual_guidance, usual_sampler: the defaults. pixels: whether its steps are images, not latents.
    """

    usual_guidance: float
    usual_sampler: str
    pixels: bool

    def fingerprint(self) -> str:
        """A digest of weights, config and tokenizer: equal ones generate the same images."""
        ...

    def label(self, name: str) -> int:
        """A class by its name, or by its number; an unknown one is a `UserError`."""
        ...

    def resolved(self, wanted: ImageRequest) -> ImageRequest:
        """The same request with every default filled in; what the model cannot generate is a `UserError`."""
        ...

    def draw(self, wanted: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None) -> Bytes:
        """A finished image of each seed, as bytes on the CPU; `watch` is called with the state after each step."""
        ...


@runtime_checkable
class TextToImagePipeline(ImagePipeline, Protocol):
    """A text-to-image pipeline. colours: 1 for grey, 3 for colour. tokenizer: of its texts."""

    colours: int
    tokenizer: Tokenizer

    def draw_texts(self, wanted: ImageRequest, seeds: Sequence[int], texts: Sequence[str]) -> Bytes:
        """A finished image of each seed and text; `wanted` as `resolved` gives it."""
        ...


class PixelPipeline:
    """The `ImagePipeline` of a pixel diffusion model."""

    usual_guidance = 1.0
    usual_sampler = "ddim"
    pixels = True

    def __init__(self, model: DiffusionModel):
        self.model = model

    @property
    def noise(self) -> Noise:
        """The noise schedule."""
        return self.model.noise

    def fingerprint(self) -> str:
        """Of the weights and the config."""
        return fingerprint(cast(Any, self.model))

    def label(self, name: str) -> int:
        """A class by its name, or by its number."""
        return pixel_diffusion.label_number(self.model, name)

    def resolved(self, wanted: ImageRequest) -> ImageRequest:
        """See `ImageRequest.resolved`."""
        return wanted.resolved(self.model)

    def draw(self, wanted: ImageRequest, seeds: Sequence[int], watch: Watch = lambda state: None) -> Bytes:
        """See `draw_images`."""
        return pixel_diffusion.draw_images(cast(Any, self.model), wanted, seeds, watch)


def is_text_to_image(model: nn.Module) -> bool:
    """Whether the model generates images from text alone."""
    if isinstance(model, UnclipModel):
        return model.config.imagines
    return isinstance(model, ImageTokenModel) or (isinstance(model, TextConditionedModel) and not model.config.masked)


def text_to_image_pipeline(model: nn.Module, tokenizer: Tokenizer | None) -> TextToImagePipeline:
    """The text-to-image pipeline of a model; any other model is a `UserError`."""
    found = image_pipeline(model, lambda: tokenizer)
    if not isinstance(found, TextToImagePipeline):
        raise UserError(f"A {type(model).__name__} draws from no text: choose a model that reads.")
    return found


def image_pipeline(model: nn.Module, tokenizer: Callable[[], Tokenizer | None]) -> ImagePipeline:
    """The pipeline of an image model, with its tokenizer if it is conditioned on text; any other is a `UserError`."""
    if not isinstance(model, TextConditionedModel | ImageTokenModel | UnclipModel):
        return PixelPipeline(pixel_diffusion.require_diffusion_model(model))
    found = tokenizer()
    if found is None:
        raise UserError(f"A {type(model).__name__} draws from a text, and there is no tokenizer beside it.")
    if isinstance(model, UnclipModel):
        return UnclipPipeline(model, found)
    return (
        AutoregressivePipeline(model, found)
        if isinstance(model, ImageTokenModel)
        else LatentDiffusionPipeline(model, found)
    )

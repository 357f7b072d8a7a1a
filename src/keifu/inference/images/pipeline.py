"""Image pipelines: common interface of pixel diffusion, latent diffusion, unCLIP, DALL-E, flow maps and GANs."""

from collections.abc import Callable
from typing import TypeAlias

from torch import nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.images.autoregressive import AutoregressivePipeline
from keifu.inference.images.flow_map import FlowMapPipeline
from keifu.inference.images.latent_diffusion import LatentDiffusionPipeline
from keifu.inference.images.pixel_diffusion import PixelPipeline
from keifu.inference.images.single_pass import GeneratorPipeline
from keifu.inference.images.unclip import UnclipPipeline
from keifu.layers.diffusion.image_model import ImageModel

TextToImagePipeline: TypeAlias = LatentDiffusionPipeline | UnclipPipeline | AutoregressivePipeline
ImagePipeline: TypeAlias = PixelPipeline | FlowMapPipeline | GeneratorPipeline | TextToImagePipeline
PIPELINES = {"latents": LatentDiffusionPipeline, "embeddings": UnclipPipeline, "tokens": AutoregressivePipeline}


def is_text_to_image(model: nn.Module) -> bool:
    """Return whether the model generates images from text alone."""
    if not isinstance(model, ImageModel) or model.draws in ("pixels", "jumps", "once"):
        return False
    if model.draws == "embeddings":
        return model.config.prior is not None
    return model.draws == "tokens" or not model.config.masked


def text_to_image_pipeline(model: nn.Module, tokenizer: Tokenizer | None) -> TextToImagePipeline:
    """Return the text-to-image pipeline of a model. Raises `UserError` for any other model."""
    pipeline = image_pipeline(model, lambda: tokenizer)
    if not isinstance(pipeline, TextToImagePipeline):
        raise UserError(f"A {type(model).__name__} draws from no text: choose a model that reads.")
    return pipeline


def image_pipeline(model: nn.Module, tokenizer: Callable[[], Tokenizer | None]) -> ImagePipeline:
    """Return the pipeline of an image model, with its tokenizer if it is conditioned on text. Raises `UserError` for
    any other model."""
    if not isinstance(model, ImageModel) or model.draws == "pixels":
        return PixelPipeline(model)
    if model.draws == "jumps":
        return FlowMapPipeline(model)
    if model.draws == "once":
        return GeneratorPipeline(model)
    loaded = tokenizer()
    if loaded is None:
        raise UserError(f"A {type(model).__name__} draws from a text, and it has no tokenizer.")
    return PIPELINES[model.draws](model, loaded)

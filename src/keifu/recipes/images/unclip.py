"""unCLIP (Ramesh et al., 2022; DALL-E 2): text-to-image by way of CLIP's image embedding.

Paper: "Hierarchical Text-Conditional Image Generation with CLIP Latents"; a prior of about 1 B parameters that predicts
the embedding itself, a decoder of 3.5 B with 10% of the embeddings and 50% of the texts left out, upsamplers of 700 M
and 300 M on crops, cosine schedules. Here all three at once, in one network each, on a CLIP of the same captions that
is trained first (or --clip RUN) and then frozen; the last step's upsampler is the other steps'.
Command: keifu train unclip --data emoji
Cost: 9 minutes of training by default, 2 of them for CLIP, and some for samples; good drawings need 85 (--clip-minutes
18 --minutes 67). The steps are fixed before it starts.
Expected: see docs/results.md, "Emoji from text".

Axes: picture, channels, height, width; embedding = numbers of CLIP's vectors.
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

import torch

from keifu.data.images import dataset, splits
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.devices import choose
from keifu.errors import UserError, shell
from keifu.inference.embeddings.clip import preprocessing
from keifu.inference.images.latent_diffusion import text_tokens
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.inference.images.unclip import UnclipPipeline
from keifu.layers.attention.masks import real_tokens
from keifu.layers.diffusion.noise_schedule import Noise, Weighting
from keifu.layers.meta import on_meta
from keifu.models.clip import clip, image as clip_image
from keifu.models.diffusion import ddpm
from keifu.models.unclip import conditioning, decoder as unclip_decoder, prior as unclip_prior, unclip
from keifu.ranges import BelowOne, Count, Finite, Natural, Positive
from keifu.recipes.images import clip as clip_recipe, image_runs
from keifu.training.job import Jobs, JobsReturning
from keifu.training.objectives import unclip as losses
from keifu.training.objectives.diffusion import DiffusionLoss


def model_config(recipe: Any, towers: clip.Config) -> unclip.Config:
    """Return the Config of the whole model around a CLIP's Config. Norms have the largest number of groups that divides
    every level, with at least 4 channels in a group."""
    text, image, widths = towers.text, cast(clip_image.Config, towers.image), recipe.widths
    if "patch_size" not in vars(image) or text.dim != text.embedding_dim:
        raise UserError(
            f"This CLIP has {text.dim} numbers per token and {text.embedding_dim} in its space, or is a ResNet: unCLIP "
            "needs one with a vision transformer whose text tower is as wide as its space."
        )
    if wrong := [level for level in recipe.attention if not 0 <= level < len(widths)]:
        raise UserError(f"attention names level {wrong[0]}, but the levels are 0 to {len(widths) - 1}.")
    decoder = unclip_decoder.Config(
        size=recipe.small, widths=widths, n_residual_blocks=recipe.residual_blocks, attention=recipe.attention,
        up_attention=recipe.attention, head_dim=math.gcd(32, *widths), context_dim=recipe.context_dim,
        norm_groups=_groups(widths),
    )  # fmt: skip
    conditions = conditioning.Config(4, text.embedding_dim, decoder.time_width, recipe.context_dim)
    sizes = {"n_layers": recipe.prior_layers, "n_heads": recipe.prior_heads, "head_dim": recipe.head_dim}
    prior = unclip_prior.Config(text.context_length, text.embedding_dim, **sizes)
    upsampler = None if recipe.small == recipe.size else _upsampler(recipe)
    prior_noise = replace(unclip.PRIOR, steps=recipe.noise_steps)
    decoder_noise = replace(unclip.DECODER, steps=recipe.noise_steps, target=recipe.target)
    networks = text, conditions, decoder, prior, image, towers.pixels, upsampler, upsampler
    return unclip.Config(*networks, prior_noise=prior_noise, decoder_noise=decoder_noise)


def _upsampler(recipe: Any) -> ddpm.Config:
    widths = recipe.upsampler_widths
    levels = tuple(range(len(widths)))
    return replace(
        ddpm.SIZES["karlo-upsampler"], size=recipe.size, dim=widths[0], n_residual_blocks=1,
        multipliers=tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
        residual_down=levels[:-1], residual_up=levels[1:], norm_groups=_groups(widths), middle_groups=_groups(widths),
        noise=Noise("cosine", recipe.noise_steps, target=recipe.target, spacing="linspace"),
    )  # fmt: skip


def _groups(widths: tuple[int, ...]) -> int:
    return math.gcd(32, max(1, widths[0] // 4), *widths)


STEPS = 25  # steps of a sample


@dataclass(frozen=True, kw_only=True)
class Recipe(image_runs.TextToImageOptions):
    """Options of the run."""

    small: Count = 32
    """The side of the decoder's pictures; with that of --size there is no upsampler."""
    crop: Natural = 32
    """The side of the random crops that the upsampler is trained on."""
    prior_layers: Count = 4
    """Blocks of the prior."""
    prior_heads: Count = 4
    """Heads of each."""
    head_dim: Count = 48
    """Dimension of each head of the prior; the prior's width is that times its heads."""
    widths: tuple[Count, ...] = (32, 64, 128)
    """Channels of the decoder's levels, the finest first; each but the last halves the sides."""
    attention: tuple[Natural, ...] = (1, 2)
    """Levels of the decoder with attention to embedding, text and themselves, 0 the finest."""
    residual_blocks: Count = 1
    """Residual blocks of a level of the decoder, on the way down."""
    context_dim: Count = 128
    """Dimension of the tokens that the decoder attends to."""
    upsampler_widths: tuple[Count, ...] = (32, 64)
    """Channels of the upsampler's levels."""
    target: Literal["noise", "picture"] = "noise"
    """Target of decoder and upsampler; the prior predicts the embedding."""
    weighting: Weighting = "simple"
    """How much each noise level counts in the decoder's loss."""
    noise_steps: Count = 1000
    """Noise levels, the paper's T."""
    prior_dropout: BelowOne = losses.PRIOR_DROPOUT
    """Share of the texts that are dropped for the prior, for classifier-free guidance."""
    text_dropout: BelowOne = losses.TEXT_DROPOUT
    """Share of the texts that are dropped for the decoder."""
    image_dropout: BelowOne = losses.IMAGE_DROPOUT
    """Share of the embeddings that are dropped for the decoder."""
    minutes: Positive = field(default=7.0, kw_only=True)
    """Time limit of the training after CLIP's."""
    guidance: Finite = 3.0
    """Scale of the classifier-free guidance of the samples, of decoder and prior."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.crop <= self.size or not self.small <= self.size:
            raise UserError(f"--small {self.small} and --crop {self.crop} must fit into --size {self.size}.")


def prepare(recipe: Recipe) -> JobsReturning[image_runs.TextToImageTask]:
    """Yield the training of CLIP, unless it is given; build the model around it and return its task. Invalid options
    are reported before anything is trained."""
    if not recipe.clip:
        clip_options = clip_recipe.Recipe()
        planned = clip.Config(clip_options.text, clip_options.image, clip_recipe.pixels_of(clip_options))
        with on_meta():
            _check_sizes(recipe, unclip.build(model_config(recipe, planned)))
    parts = image_runs.read_captioned(recipe, 3)
    towers, tokenizer, tokens = yield from clip_recipe.two_towers_of(recipe, parts)
    torch.manual_seed(recipe.seed)
    model = unclip.build(model_config(recipe, towers.config))
    for part, tower in ((model.text, towers.text), (model.image, towers.image)):
        part.load_state_dict(tower.state_dict())
        part.requires_grad_(False)
    if model.config.last_upsampler is not None:
        model.last_upsampler.requires_grad_(False)  # replaced by the other upsampler after training
    _check_sizes(recipe, model)
    model.to(choose())
    ready = preprocessing(towers)
    embed = partial(image_runs.encode_pictures, towers, lambda pixels: towers.encode_image(ready.normalised(pixels)))
    pictures = dataset.read_images(recipe.data, towers.config.pixels.crop, 3)  # the same, at CLIP's input size
    seen_parts = splits.split(pictures)
    assert (seen_parts.train.names, seen_parts.validation.names) == (parts.train.names, parts.validation.names)
    tables = image_runs.of_both(seen_parts, embed)
    with torch.no_grad():
        for to, measured in zip((model.prior.mean, model.prior.std), losses.embedding_moments(tables[0]), strict=True):
            to.copy_(measured)
    batches = image_runs.drawn_batches(parts, recipe.batch_size, recipe.seed, None, *tokens)
    data = losses.add_embeddings(batches, _end(tokenizer), *tables)
    painter = UnclipPipeline(model, tokenizer)
    return image_runs.TextToImageTask(model, parts, data, _objective(recipe, model, tokenizer), painter)


def _check_sizes(recipe: Recipe, model: unclip.Unclip) -> None:
    """Raise a `UserError` if the networks do not fit the pictures."""
    if model.config.last_upsampler is not None:
        model.upsampler.check_size(6, recipe.crop, recipe.crop)
    model.check_size(recipe.small, recipe.small)


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise UserError("The tokenizer of this CLIP has no end of a text, at which CLIP reads a caption.")
    return tokenizer.eos_id


def _objective(recipe: Recipe, model: unclip.Unclip, tokenizer: Tokenizer) -> losses.UnclipLoss:
    config, side = model.config, (recipe.small, recipe.small)
    tokens, noise = text_tokens(tokenizer, [""], config.context_length), config.upsampling_noise
    empty = tokens, real_tokens(tokens, _end(tokenizer))
    return losses.UnclipLoss(
        DiffusionLoss(config.prior_noise), DiffusionLoss(config.decoder_noise, recipe.weighting),
        None if noise is None else DiffusionLoss(noise), side, recipe.crop, empty, recipe.prior_dropout,
        recipe.text_dropout, recipe.image_dropout,
    )  # fmt: skip


def complete_config(model: unclip.Unclip) -> unclip.Unclip:
    """Copy the trained upsampler to the upsampler of the last step. Return the model."""
    if model.config.last_upsampler is not None:
        model.last_upsampler.load_state_dict(model.upsampler.state_dict())
    return model


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training of all parts, whose result keifu draw and diffusers' unCLIP parts read."""
    task = yield from prepare(recipe)
    request = ImageRequest(
        "ddim", min(STEPS, recipe.noise_steps), recipe.seed, guidance=recipe.guidance,
        prior_guidance=recipe.guidance, text=recipe.prompts[0],
    )  # fmt: skip
    summary = yield task.job(
        recipe, request, title="unCLIP",
        paper="Ramesh et al., Hierarchical Text-Conditional Image Generation with CLIP Latents (2022)",
        option_names=("crop", "weighting", "prior_dropout", "text_dropout", "image_dropout"),
        parts={name: part for name, part in task.model.named_children() if name != "last_upsampler"},
        before=partial(complete_config, task.model),
    )  # fmt: skip
    out = summary.directory
    print(f"The model is in {out}: keifu draw {shell(out, recipe.prompts[0])} --guidance {recipe.guidance:g}")

"""Latent diffusion (Rombach et al., 2022): text-to-image diffusion in the latent space of an autoencoder.

Paper: "High-Resolution Image Synthesis with Latent Diffusion Models"; Stable Diffusion 1: an autoencoder with one
latent position for 8 x 8 pixels, CLIP's ViT-L/14 for the text, a U-Net of 860 M parameters, noise as target, a text
left out of 10% of the rows. Here one command trains several models: the autoencoder (one number of 4 x 4 pixels, with a
loss of edges instead of the perceptual and adversarial ones), a CLIP of the same captions (or --clip RUN), and a U-Net
in the latents, which are computed once; it predicts the velocity under a cosine schedule, like keifu train ddpm.
--space pixels trains the same network on pixels, for as long as both together, to show the gain of latents.
Command: keifu train latent-diffusion --data emoji
Cost: 9 minutes of training by default, with an option for each model, and some for samples; good drawings need 85
(--clip-minutes 18 --autoencoder-minutes 22 --minutes 45). The steps of a model are fixed before it starts.
Expected: see docs/results.md, "Emoji from text".
"""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from keifu.data.images import augmentation, dataset, io, splits
from keifu.devices import choose
from keifu.errors import UserError, shell
from keifu.inference.images.latent_diffusion import LatentDiffusionPipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.layers.diffusion.noise_schedule import Noise, Schedule, Target, Weighting
from keifu.layers.meta import on_meta
from keifu.models.clip import text as clip_text
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, latent_diffusion
from keifu.ranges import BelowOne, Count, Finite, Natural, NotNegative, Positive
from keifu.recipes.images import clip, image_runs
from keifu.recipes.starting import holds_families, keeps_best, load_start, scaled
from keifu.training.job import Budget, Job, Jobs, JobsReturning, PlannedSettings
from keifu.training.objectives.autoencoders import AutoencoderKLLoss
from keifu.training.objectives.diffusion import EncodedImages, TextDiffusionLoss, use_latents

MEASURED = 500  # maximal pictures for measuring the scale of latents
STEPS = 20  # DPM-Solver++ steps of a sample
LATENTS: dict[str, Any] = {"widths": (64, 128, 192), "attention": (1, 2)}
PIXELS: dict[str, Any] = {"widths": (32, 64, 128, 128), "attention": (2, 3)}


@dataclass(frozen=True, kw_only=True)
class Recipe(image_runs.TextToImageOptions):
    """Options of the run. Unset ones are those of --space."""

    start_from: str | None = None
    """Latent diffusion model whose weights, sizes and tokenizer the run starts from: a run, a folder or a catalogue
    name such as emoji. Only its U-Net is trained, at a default learning rate of a tenth."""
    keep_best: bool = True
    """Whether a run with --start-from ends with the weights of its lowest validation loss. The held-out pictures are of
    other names: without it the run goes on learning the names that it has."""
    evenly: bool = False
    """Show each group of near copies, such as an emoji in all skin tones, as often as any other picture."""
    autoencoder_widths: tuple[Count, ...] = (16, 32, 64)
    """Channels of the autoencoder's levels, the finest first; each but the last halves the sides."""
    latent_channels: Count = 4
    """Channels of the latents."""
    kl_weight: NotNegative = 1e-3
    """Weight of the KL divergence of the latents from the normal distribution in the autoencoder's loss."""
    edges: NotNegative = 1.0
    """Weight of the gradient difference (edges) in the autoencoder's loss."""
    flip: bool = True
    """Mirror every second picture for the autoencoder; the U-Net sees none mirrored, as captions say left and right."""
    autoencoder_minutes: Positive = 2.5
    """Time limit of the autoencoder's training."""
    autoencoder_steps: Count | None = None
    """Updates of the autoencoder's weights, instead of its minutes."""
    autoencoder_batch: Count = 16
    """Pictures in a step of the autoencoder."""
    autoencoder_rate: NotNegative = 1e-3
    """AdamW's highest rate for the autoencoder."""
    space: Literal["latents", "pixels"] = "latents"
    """Diffusion in the latents of an autoencoder, which is trained first, or in pixels."""
    widths: tuple[Count, ...] | None = None
    """Channels of the U-Net's levels."""
    attention: tuple[Natural, ...] | None = None
    """Levels of the U-Net with cross-attention to the text, 0 the finest."""
    heads: Count = 4
    """Heads of each attention."""
    residual_blocks: Count = 1
    """Residual blocks of a level, on the way down."""
    schedule: Schedule = "cosine"
    """The noise schedule."""
    target: Target = "velocity"
    """Target that the network predicts."""
    weighting: Weighting = "min_snr"
    """How much each noise level counts in the loss."""
    caption_dropout: BelowOne = 0.1
    """Share of the captions that are dropped, for classifier-free guidance."""
    minutes: Positive = field(default=4.5, kw_only=True)
    """Time limit of the U-Net's training; with --space pixels, the autoencoder's minutes are added."""
    batch_size: Count = 16
    """Pictures in a step of the U-Net."""
    learning_rate: NotNegative | None = None
    """Highest learning rate of AdamW for the U-Net. Default: 1e-3, and a tenth of it with --start-from."""
    guidance: Finite = 3.0
    """Scale of the classifier-free guidance of the samples."""

    @property
    def budget(self) -> Budget:
        """Budget of the U-Net. With pixels it includes the autoencoder's minutes."""
        return Budget(self.steps, self.minutes + (self.autoencoder_minutes if self.space == "pixels" else 0.0))

    def autoencoder(self, channels: int) -> autoencoder_kl.Config:
        """Return the autoencoder's Config for pictures with this number of channels."""
        widths = self.autoencoder_widths
        return autoencoder_kl.Config(
            size=self.size, channels=channels, latent_channels=self.latent_channels, widths=widths,
            n_residual_blocks=1, norm_groups=math.gcd(32, max(1, widths[0] // 2), *widths), scale=1.0,
        )  # fmt: skip

    def resolved(self) -> "Recipe":
        """Return the recipe with defaults for unset options."""
        defaults = LATENTS if self.space == "latents" else PIXELS
        defaults = defaults | {"learning_rate": scaled(1e-3, self.start_from)}
        return replace(self, **{name: value for name, value in defaults.items() if vars(self)[name] is None})


def prepare(recipe: Recipe) -> JobsReturning[image_runs.TextToImageTask]:
    """Yield the training of CLIP, unless it is given, and of the autoencoder; build the model and return its task.
    The recipe must be resolved. Invalid options are reported before anything is trained."""
    if recipe.start_from is not None:
        return start_task(recipe, recipe.start_from)
    parts = image_runs.read_captioned(recipe)
    latents, channels = recipe.space == "latents", parts.train.shape[0]
    with on_meta():
        coder = recipe.autoencoder(channels) if latents else None
        planned = model_config(recipe, clip.Recipe().text, coder, channels)
        latent_diffusion.build(planned).check_size(*parts.train.shape[1:])
    towers, tokenizer, tokens = yield from clip.two_towers_of(recipe, parts)
    autoencoder = (yield from autoencoder_of(recipe, parts)) if latents else None
    config = model_config(recipe, towers.config.text, autoencoder.config if autoencoder else None, channels)
    torch.manual_seed(recipe.seed)
    text, unet = clip.text_conditioned(towers), conditioned_unet.build(config.unet)
    model: Any = latent_diffusion.LatentDiffusion(config, text, unet, autoencoder).to(choose())
    return task_of(recipe, LatentDiffusionPipeline(model, tokenizer), parts, tokens, recipe.evenly)


def start_task(recipe: Recipe, name: str) -> image_runs.TextToImageTask:
    """Load the model that a run starts from, and read the pictures at its size, with captions by its tokenizer."""
    model, tokenizer = load_start(name, latent_diffusion.Config)
    if model.config.masked or tokenizer is None:
        raise UserError(f"--start-from {name} does not draw from a text alone: start from another model.")
    for frozen in (model.text, model.autoencoder):
        if frozen is not None:
            frozen.requires_grad_(False).eval()
    sides = model.config.size
    if sides is None or sides[0] != sides[1]:
        raise UserError(f"{name} names no square size that it was trained with: start from another model.")
    channels = 3 if model.config.colours == 3 else 1
    parts = image_runs.read_captioned(replace(recipe, size=sides[0]), channels, holds_families(name))
    length = model.config.context_length
    tokens = clip.caption_tokens(tokenizer, length, parts, recipe.languages, recipe.truncate)
    painter = LatentDiffusionPipeline(model.to(choose()), tokenizer)
    return task_of(recipe, painter, parts, tokens, recipe.evenly)


def task_of(
    recipe: Any, painter: Any, parts: splits.ImageSplit, tokens: clip.CaptionTokens, evenly: bool = False
) -> image_runs.TextToImageTask:
    """Return the task of training the pipeline's model on these pictures and their captions, given as ids (see
    `caption_tokens`). For a model of latents the pictures are encoded here, once."""
    model, empty = painter.model, painter.tokens([""])[0]
    objective = TextDiffusionLoss(model.noise, recipe.weighting, None, recipe.caption_dropout, empty=empty)
    data = image_runs.drawn_batches(parts, recipe.batch_size, recipe.seed, None, *tokens, evenly=evenly)
    if model.autoencoder is not None:
        encode = partial(encode_dataset, model.autoencoder, model.config.scale)
        data = use_latents(data, *image_runs.of_both(parts, encode))
    return image_runs.TextToImageTask(model, parts, data, objective, painter)


def model_config(
    recipe: Recipe, text: clip_text.Config, autoencoder: autoencoder_kl.Config | None, channels: int
) -> latent_diffusion.Config:
    """Return the Config of the whole model. The U-Net's norms have the largest number of groups that divides every
    level, with at least 4 channels in a group."""
    full: dict[str, Any] = vars(recipe)
    widths, attention = full["widths"], full["attention"]
    if wrong := [level for level in attention if not 0 <= level < len(widths)]:
        raise UserError(f"attention names level {wrong[0]}, but the levels are 0 to {len(widths) - 1}.")
    if wrong := [widths[level] for level in attention if widths[level] % recipe.heads]:
        raise UserError(f"{wrong[0]} channels do not part into {recipe.heads} heads: change widths or heads.")
    inner = channels if autoencoder is None else autoencoder.latent_channels
    unet = conditioned_unet.Config(
        size=recipe.size // (1 if autoencoder is None else autoencoder.factor), channels=inner,
        predicted_channels=inner, widths=widths, n_residual_blocks=recipe.residual_blocks, attention=attention,
        up_attention=attention, n_heads=recipe.heads, context_dim=text.dim,
        norm_groups=math.gcd(32, max(1, widths[0] // 4), *widths),
    )  # fmt: skip
    clip_at = None if autoencoder else 1.0
    noise = Noise(recipe.schedule, target=recipe.target, clip=clip_at, spacing="trailing", steps_offset=1)
    return latent_diffusion.Config(replace(text, projected=False), unet, autoencoder, noise)


def autoencoder_of(recipe: Recipe, parts: splits.ImageSplit) -> JobsReturning[autoencoder_kl.AutoencoderKL]:
    """Yield the training of the autoencoder, and return it frozen, with the scale that gives its latents variance 1."""
    torch.manual_seed(recipe.seed)
    model = autoencoder_kl.build(recipe.autoencoder(parts.train.shape[0])).to(choose())
    model.check_size(*parts.train.shape[1:])
    loss = AutoencoderKLLoss(recipe.kl_weight, recipe.edges)
    flipped = augmentation.Augmentation(flip=recipe.flip)
    budget = Budget(recipe.autoencoder_steps, recipe.autoencoder_minutes)
    settings = partial(
        image_runs.part_settings, recipe, minutes=budget.limit, batch_size=recipe.autoencoder_batch,
        learning_rate=recipe.autoencoder_rate, final_ratio=0.0, weight_decay=0.0, betas=(0.9, 0.99),
    )  # fmt: skip
    facts = image_runs.part_facts(
        parts, model, {"loss": vars(loss), "flip": recipe.flip}, title="An autoencoder learns to make pictures small",
        paper="Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (2022), section 3.1",
    )  # fmt: skip
    summary = yield Job(
        model=model, objective=loss, settings=PlannedSettings(budget, settings), stage=image_runs.AUTOENCODER,
        data=image_runs.drawn_batches(parts, recipe.autoencoder_batch, recipe.seed, flipped), facts=facts,
        sample=image_runs.before_and_after(model, parts),
    )  # fmt: skip
    return set_scale(image_runs.load_frozen(summary.directory), parts.train)


def set_scale(model: Any, pictures: dataset.ImageDataset) -> autoencoder_kl.AutoencoderKL:
    """Return the autoencoder with its `scale`: 1 / the standard deviation of the latents of these pictures, or of
    evenly spaced ones of them (Rombach et al., 2022, appendix G)."""
    one = replace(model.config, scale=1.0)
    sample = encode_dataset(model, one.scale, pictures.subset(range(0, len(pictures), 1 + len(pictures) // MEASURED)))
    variance = sample.mean.var() + sample.deviation.square().mean()
    model.config = replace(one, scale=round(float(variance.rsqrt()), 6))
    return model


def encode_dataset(model: autoencoder_kl.AutoencoderKL, scale: float, pictures: dataset.ImageDataset) -> EncodedImages:
    """Encode pictures as latents for diffusion."""

    def mean_and_deviation(pixels: Tensor) -> Tensor:
        latents = model.encode(io.to_signed(pixels))
        return torch.stack([latents.mean, torch.exp(0.5 * latents.log_variance)], 1)

    both = scale * image_runs.encode_pictures(model, mean_and_deviation, pictures)
    return EncodedImages(*(part.contiguous() for part in both.unbind(1)))


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training of all parts, whose result keifu draw and diffusers' StableDiffusionPipeline read."""
    recipe = recipe.resolved()
    task = yield from prepare(recipe)
    model = task.model
    summary = yield task.job(
        recipe,
        ImageRequest(task.painter.usual_sampler, STEPS, recipe.seed, guidance=recipe.guidance, text=recipe.prompts[0]),
        title="Latent diffusion",
        paper="Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (2022)",
        option_names=("space", "weighting", "caption_dropout", "evenly"),
        **keeps_best(recipe.start_from, recipe.keep_best),
        parts={"autoencoder": model.autoencoder, "text encoder": model.text, "U-Net": model.unet},
    )  # fmt: skip
    command = f"keifu draw {shell(summary.directory, recipe.prompts[0])} --guidance {recipe.guidance:g} -o picture.png"
    print(f"The model is in {summary.directory}: {command}")

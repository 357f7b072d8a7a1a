"""DALL-E 1 (Ramesh et al., 2021): autoregressive text-to-image: caption and picture are one sequence of tokens.

Paper: "Zero-Shot Text-to-Image Generation"; a discrete autoencoder (8,192 entries, 32 x 32 of them for 256 x 256
pixels, 3 million steps), then a decoder of 12 B parameters over 256 text and 1,024 picture tokens with row, column and
window attention; losses weighted 1/8 and 7/8, AdamW at 4.5e-4 with betas 0.9 and 0.96, weight decay 0.045, gradients
clipped at 4, 430,000 steps of 1,024 pairs, a moving average with 0.99 every 25 steps; of 512 pictures the one with the
highest CLIP score is shown. Here one command trains several models: the autoencoder (512 entries, 16 x 16 for 64 x 64),
a CLIP of the same captions (or --clip RUN), whose tokenizer is used and which ranks pictures, and a small decoder. BPE
dropout is not implemented.
Command: keifu train dalle --data emoji
Cost: 9 minutes of training by default, with an option for each model, and some for samples; good drawings need 85
(--clip-minutes 18 --vae-minutes 22 --minutes 45). The steps of a model are fixed before it starts.
--resume continues a stopped run.
Expected: see docs/results.md, "Emoji from text".
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from keifu.data.images import augmentation, batches, io, splits
from keifu.devices import choose
from keifu.errors import UserError, shell
from keifu.inference.images.autoregressive import AutoregressivePipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.layers.attention.masks import real_tokens
from keifu.layers.meta import on_meta
from keifu.models.dalle import dalle, discrete_vae
from keifu.ranges import Count, NotNegative, Positive, Share
from keifu.recipes.images import clip, image_runs
from keifu.training.job import Budget, Job, Jobs, JobsReturning, PlannedSettings
from keifu.training.objectives import autoencoders as losses

TEMPERATURES = 1.0, 1 / 16


@dataclass(frozen=True, kw_only=True)
class Recipe(image_runs.TextToImageOptions):
    """Options of the run."""

    codebook_size: Count = 512
    """Entries of the codebook."""
    vae_widths: tuple[Count, ...] = (64, 128, 256)
    """Channels of the autoencoder's levels, the finest first; each but the last halves the sides."""
    code_dim: Count = 64
    """Dimension of a codebook entry."""
    kl_weight: NotNegative = 0.3
    """β of the autoencoder's bound at its highest (the paper: 6.6)."""
    anneal: Share = 0.5
    """Share of the autoencoder's steps in which the Gumbel-softmax temperature falls from 1 to 1/16 (the paper: a
    twentieth of 3 million)."""
    flip: bool = True
    """Mirror every second picture for the autoencoder; the decoder sees none mirrored, as captions say left and right.
    """
    vae_minutes: Positive = 2.5
    """Time limit of the autoencoder's training."""
    vae_steps: Count | None = None
    """Updates of the autoencoder's weights, instead of its minutes."""
    vae_batch: Count = 16
    """Pictures in a step of the autoencoder."""
    vae_rate: NotNegative = 4e-3
    """AdamW's highest rate for the autoencoder."""
    dim: Count = 256
    """Width of the decoder."""
    hidden_dim: Count = 1024
    """Width of its feed-forward layers."""
    n_layers: Count = 6
    """Its blocks."""
    n_heads: Count = 4
    """Heads of each attention."""
    kernel: Count = 11
    """The side of the local window of the last block's attention."""
    sparse: bool = True
    """Sparse attention by row, column or window; --no-sparse: full causal attention."""
    text_weight: Share = losses.TEXT_WEIGHT
    """Weight of the text's loss; the image's has the rest."""

    def vae(self, channels: int) -> discrete_vae.Config:
        """Return the autoencoder's Config for pictures with this number of channels."""
        return discrete_vae.Config(
            size=self.size, channels=channels, codebook_size=self.codebook_size, widths=self.vae_widths,
            n_residual_blocks=1, code_dim=self.code_dim,
        )  # fmt: skip

    def ramps(self, steps: int) -> dict[str, losses.Ramp]:
        """Return the schedules of the loss: β rises over a tenth of the steps."""
        temperature = losses.Ramp(*TEMPERATURES, round(self.anneal * steps))
        return {losses.TEMPERATURE: temperature, losses.KL_WEIGHT: losses.Ramp(0.0, self.kl_weight, steps // 10)}


def prepare(recipe: Recipe) -> JobsReturning[image_runs.TextToImageTask]:
    """Yield the training of CLIP, unless it is given, and of the autoencoder; build the decoder and return its task.
    Invalid options are reported before anything is trained."""
    parts = image_runs.read_captioned(recipe)
    vae = recipe.vae(parts.train.shape[0])
    with on_meta():
        planned = dalle.build(model_config(recipe, recipe.codebook_size, 1, vae))
        planned.vae.check_size(*parts.train.shape[1:])
    towers, tokenizer, tokens = yield from clip.two_towers_of(recipe, parts)
    coder = yield from discrete_vae_of(recipe, parts)
    torch.manual_seed(recipe.seed)
    model = dalle.build(model_config(recipe, tokenizer.vocab_size, towers.config.context_length, vae))
    model.vae.load_state_dict(coder.state_dict())
    model.vae.requires_grad_(False)
    model.to(choose())
    pictures: Any = batches.ImageBatches(parts.train, parts.validation, recipe.batch_size, recipe.seed, None, *tokens)
    encode = partial(image_runs.encode_pictures, model.vae, lambda pixels: model.vae.encode(io.to_signed(pixels)))
    codes = image_runs.of_both(parts, encode)  # the likeliest entries
    data = losses.use_image_tokens(pictures, *codes, lambda ids: real_tokens(ids, tokenizer.eos_id))
    painter, objective = AutoregressivePipeline(model, tokenizer), losses.TextImageLoss(recipe.text_weight)
    return image_runs.TextToImageTask(model, parts, data, objective, painter)


def model_config(recipe: Recipe, vocab_size: int, context_length: int, vae: discrete_vae.Config) -> dalle.Config:
    """Return the Config of the whole model."""
    if recipe.dim % recipe.n_heads:
        raise UserError(f"dim {recipe.dim} does not part into {recipe.n_heads} heads: change one of the two.")
    return dalle.Config(
        vocab_size, context_length, recipe.dim, recipe.hidden_dim, recipe.n_layers, recipe.n_heads,
        kernel=recipe.kernel, sparse=recipe.sparse, vae=vae,
    )  # fmt: skip


def discrete_vae_of(recipe: Recipe, parts: splits.ImageSplit) -> JobsReturning[discrete_vae.DiscreteVAE]:
    """Yield the training of the autoencoder, whose rate decreases to 1/80 (appendix A.2), and return it frozen."""
    torch.manual_seed(recipe.seed)
    model = discrete_vae.build(recipe.vae(parts.train.shape[0])).to(choose())
    model.check_size(*parts.train.shape[1:])
    flipped = augmentation.Augmentation(flip=recipe.flip)
    data = image_runs.drawn_batches(parts, recipe.vae_batch, recipe.seed, flipped)
    settings = partial(
        image_runs.part_settings, recipe, batch_size=recipe.vae_batch, learning_rate=recipe.vae_rate,
        final_ratio=1 / 80, weight_decay=1e-4, betas=(0.9, 0.999), ema=0.999,
    )  # fmt: skip
    facts = image_runs.part_facts(
        parts, model, {"flip": recipe.flip, "kl_weight": recipe.kl_weight, "anneal": recipe.anneal},
        title="A discrete autoencoder learns a codebook for pictures",
        paper="Ramesh et al., Zero-Shot Text-to-Image Generation (2021), section 2.1",
    )  # fmt: skip
    summary = yield Job(
        model=model, objective=losses.discrete_vae_loss, data=data, stage=image_runs.DISCRETE, facts=facts,
        settings=PlannedSettings(Budget(recipe.vae_steps, recipe.vae_minutes), settings),
        data_of_steps=lambda steps: losses.add_ramps(data, recipe.ramps(steps)),
        sample=image_runs.before_and_after(model, parts),
    )  # fmt: skip
    return image_runs.load_frozen(summary.directory)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training of all parts, whose result keifu draw reads. Weight decay and clipping are those of the
    paper."""
    task = yield from prepare(recipe)
    decoder = nn.ModuleList(part for name, part in task.model.named_children() if name != "vae")
    summary = yield task.job(
        recipe, ImageRequest(seed=recipe.seed, text=recipe.prompts[0]), title="DALL-E",
        paper="Ramesh et al., Zero-Shot Text-to-Image Generation (2021)", option_names=("text_weight",),
        parts={"autoencoder": task.model.vae, "decoder": decoder}, weight_decay=0.045, betas=(0.9, 0.96), clip=4.0,
    )  # fmt: skip
    out = summary.directory
    ranked = recipe.clip or out / image_runs.CLIP.folder
    command = f"keifu draw {shell(out, recipe.prompts[0])} --best-of 16 --clip {shell(ranked)} -o picture.png"
    print(f"The model is in {out}: {command}")

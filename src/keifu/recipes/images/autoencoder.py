"""The KL autoencoder of latent diffusion as a part of a run: trained, measured, and pictures encoded with it once.

It knows no diffusion.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from keifu import checkpoints
from keifu.checkpoints.loading import load_model
from keifu.data.images.dataset import ImageDataset, ImageSplit
from keifu.data.images.io import to_signed
from keifu.devices import choose
from keifu.models.diffusion import autoencoder_kl
from keifu.recipes.images import common
from keifu.recipes.images.common import TextToImageOptions
from keifu.training.loop import train
from keifu.training.objectives.autoencoders import AutoencoderKLLoss
from keifu.training.objectives.diffusion import EncodedImages
from keifu.training.settings import Settings

FOLDER = "autoencoder"  # inside the run's
BATCH, MEASURED = 64, 500  # pictures encoded at a time, and those whose latents are measured, at most


@dataclass(frozen=True, kw_only=True)
class AutoencoderOptions(TextToImageOptions):
    """Options of a recipe that trains an autoencoder first."""

    autoencoder_widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the autoencoder's levels, the finest first; each but the last halves the sides."""
    latent_channels: int = 4
    """Channels of the latents."""
    kl_weight: float = 1e-3
    """Weight of the KL divergence of the latents from the normal distribution in the autoencoder's loss."""
    edges: float = 1.0
    """Weight of the gradient difference (edges) in the autoencoder's loss."""
    flip: bool = True
    """Mirror every second picture for the autoencoder; the U-Net sees none mirrored, as captions say left and right."""
    autoencoder_minutes: float = 22.0
    """Time limit of the autoencoder's training."""
    autoencoder_steps: int | None = None
    """Updates of the autoencoder's weights, in place of its minutes."""
    autoencoder_batch: int = 16
    """Pictures in a step of the autoencoder."""
    autoencoder_rate: float = 1e-3
    """AdamW's highest rate for the autoencoder."""

    def autoencoder(self, channels: int) -> autoencoder_kl.Config:
        """The autoencoder's Config for pictures of so many channels."""
        widths = self.autoencoder_widths
        return autoencoder_kl.Config(
            size=self.size, channels=channels, latent_channels=self.latent_channels, widths=widths,
            n_residual_blocks=1, norm_groups=math.gcd(32, max(1, widths[0] // 2), *widths), scale=1.0,
        )  # fmt: skip


def autoencoder_of(
    recipe: AutoencoderOptions, parts: ImageSplit, out: Path, resume: bool
) -> autoencoder_kl.AutoencoderKL:
    """The autoencoder, trained into a folder of the run, with the scale that gives its latents a variance of 1."""
    place = out / FOLDER
    torch.manual_seed(recipe.seed)
    model = autoencoder_kl.build(recipe.autoencoder(parts.train.shape[0])).to(choose())
    model.check_size(*parts.train.shape[1:])
    data = common.pictures_of(parts, recipe.autoencoder_batch, recipe.seed, recipe.flip)
    loss, resume = AutoencoderKLLoss(recipe.kl_weight, recipe.edges), common.is_resuming(place, resume)
    budget = recipe.autoencoder_steps, recipe.autoencoder_minutes
    steps = common.steps_for(budget, place, resume, model, loss, data, settings(recipe, 1000))
    run = common.of_a_part(
        place, resume, model, parts, "An autoencoder learns to make pictures small",
        "Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (2022), section 3.1",
        {"loss": vars(loss), "flip": recipe.flip},
    )  # fmt: skip
    train(
        model, loss, data, settings(recipe, steps), run, sample=common.before_and_after(model, parts),
        save=lambda directory: checkpoints.save(model, None, directory),
    )  # fmt: skip
    return measure_scale(place, parts.train)


def settings(recipe: AutoencoderOptions, steps: int) -> Settings:
    """The training loop's settings for so many steps."""
    often = max(1, steps // 10)
    return Settings(
        steps=steps, minutes=common.minutes_of((recipe.autoencoder_steps, recipe.autoencoder_minutes)),
        batch_size=recipe.autoencoder_batch, learning_rate=recipe.autoencoder_rate, warmup=steps // 20,
        final_ratio=0.0, weight_decay=0.0, betas=(0.9, 0.99), precision=recipe.precision, evaluate_every=often,
        sample_every=often, save_every=often, seed=recipe.seed,
    )  # fmt: skip


def measure_scale(place: Path, pictures: ImageDataset) -> autoencoder_kl.AutoencoderKL:
    """A trained autoencoder, frozen, whose `scale` is one over the standard deviation of the latents of these pictures,
    or of some spread over them (Rombach et al., 2022, appendix G)."""
    found: Any = load_model(place, torch.float32).requires_grad_(False).eval()
    one = replace(found.config, scale=1.0)
    seen = encode_dataset(found, one.scale, pictures.chosen(range(0, len(pictures), 1 + len(pictures) // MEASURED)))
    variance = seen.mean.var() + seen.deviation.square().mean()
    found.config = replace(one, scale=round(float(variance.rsqrt()), 6))
    return found


@torch.no_grad()
def encode_dataset(model: autoencoder_kl.AutoencoderKL, scale: float, pictures: ImageDataset) -> EncodedImages:
    """The latents of pictures as diffusion sees them, computed once."""
    groups = [_moments(model, pictures.take(slice(n, n + BATCH))) for n in range(0, len(pictures), BATCH)]
    mean, deviation = (scale * torch.cat(part) for part in zip(*groups, strict=True))
    return EncodedImages(mean, deviation)


def _moments(model: autoencoder_kl.AutoencoderKL, pictures: UInt8[Tensor, "batch colours rows columns"]) -> Any:
    found = model.encode(to_signed(pictures.to(next(model.parameters()).device)))
    return found.mean.contiguous().cpu(), torch.exp(0.5 * found.log_variance).contiguous().cpu()

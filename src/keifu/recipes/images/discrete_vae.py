"""The discrete autoencoder of DALL-E as a part of a run: trained, and pictures turned into entries with it once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from keifu import checkpoints
from keifu.checkpoints.loading import load_model
from keifu.data.images.dataset import ImageDataset, ImageSplit
from keifu.data.images.io import to_signed
from keifu.devices import choose
from keifu.models.dalle import discrete_vae
from keifu.recipes.images import common
from keifu.recipes.images.common import TextToImageOptions
from keifu.training.loop import train
from keifu.training.objectives.autoencoders import KL_WEIGHT, TEMPERATURE, Ramp, RampedBatches, discrete_vae_loss
from keifu.training.settings import Settings

FOLDER = "dvae"  # inside the run's
BATCH = 64  # pictures encoded at a time
TEMPERATURES = 1.0, 1 / 16


@dataclass(frozen=True, kw_only=True)
class DiscreteVAEOptions(TextToImageOptions):
    """Options of a recipe that trains a discrete autoencoder first."""

    codebook_size: int = 512
    """Entries of the codebook."""
    vae_widths: tuple[int, ...] = (64, 128, 256)
    """Channels of the autoencoder's levels, the finest first; each but the last halves the sides."""
    code_dim: int = 64
    """Dimension of a codebook entry."""
    kl_weight: float = 0.3
    """β of the autoencoder's bound at its highest (the paper: 6.6)."""
    anneal: float = 0.5
    """Share of the autoencoder's steps in which the Gumbel-softmax temperature falls from 1 to 1/16 (the paper: a
    twentieth of 3 million)."""
    flip: bool = True
    """Mirror every second picture for the autoencoder; the decoder sees none mirrored, as captions say left and right.
    """
    vae_minutes: float = 22.0
    """Time limit of the autoencoder's training."""
    vae_steps: int | None = None
    """Updates of the autoencoder's weights, in place of its minutes."""
    vae_batch: int = 16
    """Pictures in a step of the autoencoder."""
    vae_rate: float = 4e-3
    """AdamW's highest rate for the autoencoder."""

    def vae(self, channels: int) -> discrete_vae.Config:
        """The autoencoder's Config for pictures of so many channels."""
        return discrete_vae.Config(
            size=self.size, channels=channels, codebook_size=self.codebook_size, widths=self.vae_widths,
            n_residual_blocks=1, code_dim=self.code_dim,
        )  # fmt: skip

    def ramps(self, steps: int) -> dict[str, Ramp]:
        """What changes from step to step: β rises in a tenth of them."""
        return {
            TEMPERATURE: Ramp(*TEMPERATURES, round(self.anneal * steps)),
            KL_WEIGHT: Ramp(0.0, self.kl_weight, steps // 10),
        }


def discrete_vae_of(recipe: DiscreteVAEOptions, parts: ImageSplit, out: Path, resume: bool) -> discrete_vae.DiscreteVAE:
    """The autoencoder, trained into a folder of the run, frozen."""
    place = out / FOLDER
    torch.manual_seed(recipe.seed)
    model = discrete_vae.build(recipe.vae(parts.train.shape[0])).to(choose())
    model.check_size(*parts.train.shape[1:])
    data = common.pictures_of(parts, recipe.vae_batch, recipe.seed, recipe.flip)
    budget, resume = (recipe.vae_steps, recipe.vae_minutes), common.is_resuming(place, resume)
    trial = RampedBatches(data, recipe.ramps(1000))
    steps = common.steps_for(budget, place, resume, model, discrete_vae_loss, trial, settings(recipe, 1000))
    run = common.of_a_part(
        place, resume, model, parts, "A discrete autoencoder learns a codebook for pictures",
        "Ramesh et al., Zero-Shot Text-to-Image Generation (2021), section 2.1",
        {"flip": recipe.flip, "kl_weight": recipe.kl_weight, "anneal": recipe.anneal},
    )  # fmt: skip
    train(
        model, discrete_vae_loss, RampedBatches(data, recipe.ramps(steps)), settings(recipe, steps), run,
        sample=common.before_and_after(model, parts), save=lambda directory: checkpoints.save(model, None, directory),
    )  # fmt: skip
    found: Any = load_model(place, torch.float32).requires_grad_(False).eval()
    return found


def settings(recipe: DiscreteVAEOptions, steps: int) -> Settings:
    """The training loop's settings for so many steps; the rate falls to an eightieth, as in appendix A.2."""
    often = max(1, steps // 10)
    return Settings(
        steps=steps, batch_size=recipe.vae_batch, learning_rate=recipe.vae_rate, warmup=steps // 20,
        final_ratio=1 / 80, weight_decay=1e-4, betas=(0.9, 0.999), ema=0.999, precision=recipe.precision,
        evaluate_every=often, sample_every=often, save_every=often, seed=recipe.seed,
    )  # fmt: skip


@torch.no_grad()
def encode_dataset(model: discrete_vae.DiscreteVAE, pictures: ImageDataset) -> Int[Tensor, "picture rows columns"]:
    """The likeliest entries of pictures, computed once."""
    device, groups = next(model.parameters()).device, range(0, len(pictures), BATCH)
    return torch.cat([model.encode(to_signed(pictures.take(slice(n, n + BATCH)).to(device))).cpu() for n in groups])

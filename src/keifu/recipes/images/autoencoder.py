"""The KL autoencoder of latent diffusion as a part of a run: trained, measured, and pictures encoded with it once.

It knows no diffusion.
"""

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
from keifu.recipes.images.common import before_and_after, is_resuming, minutes_of, of_a_part, pictures_of, steps_for
from keifu.training.loop import train
from keifu.training.objectives.autoencoders import AutoencoderKLLoss
from keifu.training.objectives.diffusion import EncodedImages
from keifu.training.settings import Precision, Settings

FOLDER = "autoencoder"  # inside the run's
BATCH, MEASURED = 64, 500  # pictures encoded at a time, and those whose latents are measured, at most


@dataclass(frozen=True)
class AutoencoderOptions:
    """Options of the autoencoder: its sizes, its loss and its training; `budget` as `steps_for` has it."""

    config: autoencoder_kl.Config
    loss: AutoencoderKLLoss
    flip: bool
    budget: tuple[int | None, float]
    batch_size: int
    learning_rate: float
    precision: Precision
    seed: int


def autoencoder_of(
    wanted: AutoencoderOptions, parts: ImageSplit, out: Path, resume: bool
) -> autoencoder_kl.AutoencoderKL:
    """The autoencoder, trained into a folder of the run, with the scale that gives its latents a variance of 1."""
    place = out / FOLDER
    torch.manual_seed(wanted.seed)
    model = autoencoder_kl.build(wanted.config).to(choose())
    model.check_size(*parts.train.shape[1:])
    data = pictures_of(parts, wanted.batch_size, wanted.seed, wanted.flip)
    resume = is_resuming(place, resume)
    steps = steps_for(wanted.budget, place, resume, model, wanted.loss, data, settings(wanted, 1000))
    run = of_a_part(
        place, resume, model, parts, "An autoencoder learns to make pictures small",
        "Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (2022), section 3.1",
        {"loss": vars(wanted.loss), "flip": wanted.flip},
    )  # fmt: skip
    train(
        model, wanted.loss, data, settings(wanted, steps), run, sample=before_and_after(model, parts),
        save=lambda directory: checkpoints.save(model, None, directory),
    )  # fmt: skip
    return measure_scale(place, parts.train)


def settings(wanted: AutoencoderOptions, steps: int) -> Settings:
    """The training loop's settings for so many steps."""
    often = max(1, steps // 10)
    return Settings(
        steps=steps, minutes=minutes_of(wanted.budget),
        batch_size=wanted.batch_size, learning_rate=wanted.learning_rate, warmup=steps // 20,
        final_ratio=0.0, weight_decay=0.0, betas=(0.9, 0.99), precision=wanted.precision, evaluate_every=often,
        sample_every=often, save_every=often, seed=wanted.seed,
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

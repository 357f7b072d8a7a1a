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
from keifu.recipes.images.common import before_and_after, is_resuming, of_a_part, pictures_of, steps_for
from keifu.training.loop import train
from keifu.training.objectives.autoencoders import KL_WEIGHT, TEMPERATURE, Ramp, RampedBatches, discrete_vae_loss
from keifu.training.settings import Precision, Settings

FOLDER = "dvae"  # inside the run's
BATCH = 64  # pictures encoded at a time
TEMPERATURES = 1.0, 1 / 16


@dataclass(frozen=True)
class DiscreteVAEOptions:
    """Options of the discrete autoencoder: its sizes, its loss and its training; `budget` as `steps_for` has it.

    kl_weight: β, at its highest. anneal: the share of the steps in which the temperature falls; β rises in a tenth.
    """

    config: discrete_vae.Config
    kl_weight: float
    anneal: float
    flip: bool
    budget: tuple[int | None, float]
    batch_size: int
    learning_rate: float
    precision: Precision
    seed: int

    def ramps(self, steps: int) -> dict[str, Ramp]:
        """What changes from step to step."""
        return {
            TEMPERATURE: Ramp(*TEMPERATURES, round(self.anneal * steps)),
            KL_WEIGHT: Ramp(0.0, self.kl_weight, steps // 10),
        }


def discrete_vae_of(wanted: DiscreteVAEOptions, parts: ImageSplit, out: Path, resume: bool) -> discrete_vae.DiscreteVAE:
    """The autoencoder, trained into a folder of the run, frozen."""
    place = out / FOLDER
    torch.manual_seed(wanted.seed)
    model = discrete_vae.build(wanted.config).to(choose())
    model.check_size(*parts.train.shape[1:])
    data = pictures_of(parts, wanted.batch_size, wanted.seed, wanted.flip)
    resume = is_resuming(place, resume)
    trial = RampedBatches(data, wanted.ramps(1000))
    steps = steps_for(wanted.budget, place, resume, model, discrete_vae_loss, trial, settings(wanted, 1000))
    run = of_a_part(
        place, resume, model, parts, "A discrete autoencoder learns a codebook for pictures",
        "Ramesh et al., Zero-Shot Text-to-Image Generation (2021), section 2.1",
        {"flip": wanted.flip, "kl_weight": wanted.kl_weight, "anneal": wanted.anneal},
    )  # fmt: skip
    train(
        model, discrete_vae_loss, RampedBatches(data, wanted.ramps(steps)), settings(wanted, steps), run,
        sample=before_and_after(model, parts), save=lambda directory: checkpoints.save(model, None, directory),
    )  # fmt: skip
    found: Any = load_model(place, torch.float32).requires_grad_(False).eval()
    return found


def settings(wanted: DiscreteVAEOptions, steps: int) -> Settings:
    """The training loop's settings for so many steps; the rate falls to an eightieth, as in appendix A.2."""
    often = max(1, steps // 10)
    return Settings(
        steps=steps, batch_size=wanted.batch_size, learning_rate=wanted.learning_rate, warmup=steps // 20,
        final_ratio=1 / 80, weight_decay=1e-4, betas=(0.9, 0.999), ema=0.999, precision=wanted.precision,
        evaluate_every=often, sample_every=often, save_every=often, seed=wanted.seed,
    )  # fmt: skip


@torch.no_grad()
def encode_dataset(model: discrete_vae.DiscreteVAE, pictures: ImageDataset) -> Int[Tensor, "picture rows columns"]:
    """The likeliest entries of pictures, computed once."""
    device, groups = next(model.parameters()).device, range(0, len(pictures), BATCH)
    return torch.cat([model.encode(to_signed(pictures.take(slice(n, n + BATCH)).to(device))).cpu() for n in groups])

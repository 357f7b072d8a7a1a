"""Denoising score matching (Vincent, 2011) over many levels of noise (Song and Ermon, 2019)."""

from dataclasses import dataclass
from typing import Any

import torch

from keifu.layers.counter_rng import normal, uniform
from keifu.training.objectives.diffusion import DROPPED, TIMESTEP
from keifu.training.protocols import Batch, LossOutput


@dataclass(frozen=True)
class ScoreMatching:
    """Objective of a score network.

    The score of x = point + sigma · noise given the point is -noise / sigma. The network's squared error from it, times
    sigma² (equation 6 of 2019), is smallest at the score of x without the point. sigma is uniform in its logarithm.

    A batch has "inputs" (batch, dim), "targets", their classes, and "draws" (see `diffusion.add_draws`). label_dropout:
    the share of points whose class is hidden, for classifier-free guidance.
    """

    sigma_min: float
    sigma_max: float
    label_dropout: float = 0.1

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """Return the loss: the mean squared error over a point's numbers, summed over points."""
        points, draws = batch["inputs"], batch["draws"]
        share = uniform(draws, torch.full_like(draws, TIMESTEP)).to(points)
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** share
        noise = normal(draws, points.shape[1:]).to(points)
        hidden = uniform(draws, torch.full_like(draws, DROPPED)) < self.label_dropout
        label = batch["targets"].masked_fill(hidden, model.config.n_classes)
        score = model(points + sigma[:, None] * noise, sigma, label)
        error = (sigma[:, None] * score + noise).square().mean(1)
        return LossOutput(error.sum(), len(points))

"""Shared by benchmarks of drawing: loading a run, and the features of its training pictures."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keifu.checkpoints.loading import load_model
from keifu.data.images.dataset import read_images
from keifu.data.images.splits import split
from keifu.evaluation.images.distances import kernel_distance
from keifu.evaluation.images.features import Extractor, extractor
from keifu.inference.images.pixel_diffusion import require_diffusion_model


class Beside(NamedTuple):
    """Model that draws, the features of its training pictures, and the kernel distance of held-out pictures to them."""

    model: Any
    extract: Extractor
    real: Tensor
    floor: float


def beside(run: Path, data: str, distinct: bool) -> Beside:
    """Return a run's model, the features of its training pictures, and the distance of the held-out pictures to
    them."""
    model = require_diffusion_model(load_model(run))
    size = model.config.size
    pictures = read_images(data, size if isinstance(size, int) else None, 1 if model.config.channels == 1 else 3)
    parts = split(pictures.distinct() if distinct else pictures)
    extract = extractor()
    real, *held = (extract(part.take(slice(None))) for part in (parts.train, parts.validation, parts.test))
    return Beside(model, extract, real, kernel_distance(real, torch.cat(held)).mean)

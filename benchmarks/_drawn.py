"""What benchmarks of drawing have in common: a run, and the features of the pictures that it learned from."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from keifu.checkpoints.opening import load_model
from keifu.data.pictures import read_pictures, split
from keifu.evaluation.picture_distances import kernel_distance
from keifu.evaluation.picture_features import Extractor, extractor
from keifu.generation.pictures import denoising


class Beside(NamedTuple):
    """A model that draws, the features of what it learned from, and the kernel distance of held-out pictures to it."""

    model: Any
    extract: Extractor
    real: Tensor
    floor: float


def beside(run: Path, data: str, distinct: bool) -> Beside:
    """The model of a run beside the pictures of its data, split as it had them."""
    model = denoising(load_model(run))
    size = model.config.size
    pictures = read_pictures(data, size if isinstance(size, int) else None, 1 if model.config.channels == 1 else 3)
    parts = split(pictures.distinct() if distinct else pictures)
    extract = extractor()
    real, *held = (extract(part.take(slice(None))) for part in (parts.train, parts.validation, parts.test))
    return Beside(model, extract, real, kernel_distance(real, torch.cat(held)).mean)

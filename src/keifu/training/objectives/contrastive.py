"""CLIP's contrastive loss: match each picture with its caption among all captions of the batch.

Axes: images and texts = the rows of the batch, embedding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from keifu.layers.losses.cross_entropy import cross_entropy
from keifu.training.grad_cache import Rows, WholeBatchObjective
from keifu.training.protocols import Batch, LossOutput

LARGEST = math.log(100)  # limit of logit_scale: similarities are multiplied by at most 100 (CLIP, section 2.5)


def contrastive_loss(prepare: Callable[[Tensor], Tensor]) -> WholeBatchObjective:
    """Return CLIP's symmetric loss (Radford et al., 2021, figure 3): the mean of two cross-entropies, for each
    picture's caption among all captions and for each caption's picture among all pictures.

    A batch has "pictures", bytes that `prepare` converts to the model's input, and "tokens" (batch, length). Figures:
    the accuracy of finding each picture's caption, and each caption's picture. The model has `encode_image`,
    `encode_text`, `logits` and `logit_scale`, which is limited to ln 100, as in the released code.
    """
    return WholeBatchObjective(partial(_rows, prepare), _loss)


def taught_loss(prepare: Callable[[Tensor], Tensor]) -> WholeBatchObjective:
    """Return a loss that trains both towers with a frozen teacher of texts: the contrastive loss between pictures and
    the teacher's embeddings of their captions, plus the squared distances of all embeddings to the teacher's.

    A batch also has "points", the teacher's embeddings of the captions, and may have "words" (batch, words, length) and
    "word_points". Figures: as `contrastive_loss`, with the teacher's embeddings as captions.
    """
    return WholeBatchObjective(partial(_taught_rows, prepare), _taught_loss)


def _taught_rows(prepare: Callable[[Tensor], Tensor], model: Any, batch: Batch) -> Rows:
    images, texts = _rows(prepare, model, batch)
    distances = _distances(images, batch["points"]) + _distances(texts, batch["points"])
    if "words" in batch:
        words = model.encode_text(batch["words"].flatten(0, 1)).unflatten(0, batch["words"].shape[:2])
        distances = distances + _distances(words, batch["word_points"]).sum(1)
    return images, batch["points"], distances


def _distances(x: Tensor, points: Tensor) -> Tensor:
    """Return the squared distances of embeddings, scaled to length 1, to points of length 1."""
    return 2 - 2 * cosine_similarity(x.float(), points, dim=-1)


def _taught_loss(model: Any, rows: Rows) -> LossOutput:
    *embeddings, distances = rows
    output = _loss(model, tuple(embeddings))
    return output._replace(total=output.total + distances.sum())


def _rows(prepare: Callable[[Tensor], Tensor], model: Any, batch: Batch) -> Rows:
    return model.encode_image(prepare(batch["pictures"])), model.encode_text(batch["tokens"])


def _loss(model: Any, rows: Rows) -> LossOutput:
    images, texts = rows
    with torch.no_grad():
        model.logit_scale.clamp_(max=LARGEST)
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 is too coarse for logits up to 100
        logits = model.logits(images.float(), texts.float())
    right = torch.arange(len(logits), device=logits.device)
    total = (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2
    correct = {"captions_found": logits.argmax(1) == right, "pictures_found": logits.argmax(0) == right}
    return LossOutput(total, len(logits), {name: hits.sum() for name, hits in correct.items()})

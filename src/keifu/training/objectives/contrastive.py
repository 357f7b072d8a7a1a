"""What CLIP learns: a picture and its own caption fit better than any others of the batch; knows no particular model.

Axes: images and texts = the rows of the batch, embedding.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from keifu.layers.losses import cross_entropy
from keifu.training.grad_cache import Rows, WholeBatchObjective
from keifu.training.protocols import Batch, LossOutput

LARGEST = math.log(100)  # of logit_scale: no similarity counts more than a hundredfold (CLIP, section 2.5)


def contrastive_loss(prepare: Callable[[Tensor], Tensor]) -> WholeBatchObjective:
    """The symmetric loss of CLIP (Radford et al., 2021, figure 3): the mean of two cross-entropies, of each picture's
    caption among all captions and of each caption's picture among all pictures.

    A batch has "pictures", bytes that `prepare` turns into what the model sees, and "tokens" [batch, length]. Figures
    are the shares of captions and of pictures that are found. The model offers `encode_image`, `encode_text`, `logits`
    and `logit_scale`, which is held at ln 100, as the released code holds it after each update.
    """
    return WholeBatchObjective(partial(_rows, prepare), _loss)


def _rows(prepare: Callable[[Tensor], Tensor], model: Any, batch: Batch) -> Rows:
    return model.encode_image(prepare(batch["pictures"])), model.encode_text(batch["tokens"])


def _loss(model: Any, rows: Rows) -> LossOutput:
    images, texts = rows
    with torch.no_grad():
        model.logit_scale.clamp_(max=LARGEST)
    with torch.autocast(images.device.type, enabled=False):  # a hundredfold of eight bits is no logit
        logits = model.logits(images.float(), texts.float())
    right = torch.arange(len(logits), device=logits.device)
    total = (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2
    found = {"captions_found": logits.argmax(1) == right, "pictures_found": logits.argmax(0) == right}
    return LossOutput(total, len(logits), {name: hits.sum() for name, hits in found.items()})

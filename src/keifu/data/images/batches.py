"""Batches of images with labels and tokenized captions; each batch depends only on the seed and the step.

Axes: row (of a batch), channels, height, width, length (of a caption in tokens), language.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from keifu.data.batching import Epochs
from keifu.data.images.augmentation import Augmentation, uniform
from keifu.data.images.dataset import ImageDataset
from keifu.errors import UserError

Tokens = Int64[Tensor, "language picture length"]
HeldTokens = Int64[Tensor, "language held_picture held_length"]


class ImageBatches:
    """The training loop's data, for pictures alone, with classes or with captions.

    A batch has "pictures" uint8 [row, channels, height, width] (see `to_signed` for -1 to 1), "indices" [row], their
    places in the set, "labels" [row] where the set has classes, and "tokens" [row, length] where captions were given as
    tokens, in one of the languages, sampled at each step; "languages" [row] says which.

    An epoch takes every picture once, in an order of its own. What a picture looks like by the augmentation, and the
    language of its caption, only the seed, the step and its index decide. Held-out pictures come as they are, and their
    languages take turns.

    training_tokens, held_tokens: [language, picture, length], for the pictures of the two sets.
    """

    def __init__(
        self,
        training: ImageDataset,
        held: ImageDataset,
        batch_size: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        training_tokens: Tokens | None = None,
        held_tokens: HeldTokens | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, but it must be at least 1.")
        if not len(training):
            raise UserError(f"No picture of {training.source} is for training: all of them are held out.")
        self.training, self.held, self.batch_size, self.seed = training, held, batch_size, seed
        self.augmentation = augmentation or Augmentation()
        self.training_tokens, self.held_tokens = training_tokens, held_tokens
        self._epochs = Epochs(len(training), batch_size, seed)
        self.steps_per_epoch = self._epochs.steps

    @cached_property
    def fingerprint(self) -> str:
        """A hash of both sets and of all that the batches depend on."""
        facts = [self.training.fingerprint, self.held.fingerprint, self.batch_size, self.seed, self.augmentation]
        digest = hashlib.sha256(repr(facts).encode())
        for tokens in (self.training_tokens, self.held_tokens):
            digest.update(b"|" if tokens is None else tokens.numpy().tobytes())
        return digest.hexdigest()

    def batch(self, step: int) -> dict[str, Tensor]:
        """The batch of a step, counted from 0: the same in every process, whatever came before."""
        indices = self._epochs.batch(step)
        batch = _make_batch(self.training, indices)
        batch["pictures"] = self.augmentation(batch["pictures"], self.seed, step, indices)
        if self.training_tokens is not None:
            drawn = uniform(self.seed + 1, step, indices, 1)[:, 0]
            languages = (drawn * len(self.training_tokens)).astype(np.int64)
            batch |= _caption_tokens(self.training_tokens, indices, languages)
        return batch

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """The held-out pictures in batches, always the same; the last may be smaller."""
        for first in range(0, len(self.held), self.batch_size):
            indices = np.arange(first, min(first + self.batch_size, len(self.held)))
            batch = _make_batch(self.held, indices)
            if self.held_tokens is not None:
                batch |= _caption_tokens(self.held_tokens, indices, indices % len(self.held_tokens))
            yield batch


def _make_batch(pictures: ImageDataset, indices: np.ndarray) -> dict[str, Tensor]:
    batch = {"pictures": pictures.take(indices), "indices": torch.from_numpy(indices)}
    return batch | ({"labels": torch.from_numpy(pictures.labels[indices])} if pictures.classes else {})


def _caption_tokens(tokens: Tokens, indices: np.ndarray, languages: np.ndarray) -> dict[str, Tensor]:
    which = torch.from_numpy(languages)
    return {"tokens": tokens[which, torch.from_numpy(indices)], "languages": which}

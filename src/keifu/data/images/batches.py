"""Batches of pictures for training, alone or with classes or captions.

Axes: row (of a batch), channels, height, width; length (of a caption in tokens), language.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from keifu.data.epochs import EpochBatches
from keifu.data.images.augmentation import Augmentation, uniform
from keifu.data.images.dataset import ImageDataset
from keifu.errors import UserError
from keifu.files import hash_of

Tokens = Int64[Tensor, "language picture length"]
HeldTokens = Int64[Tensor, "language held_picture held_length"]


class ImageBatches(EpochBatches):
    """Training batches of pictures alone, with classes, or with captions.

    A batch has "pictures" uint8 [row, channels, height, width] (`to_signed` maps them to -1 to 1), "indices" [row]
    (positions in the set), and "labels" [row] if the set has classes. If captions were given as tokens, it also has
    "tokens" [row, length] in a language sampled at each step, and "languages" [row], the index of that language.

    An epoch takes every picture once, in a new order. With `evenly`, it takes one picture of each group, so that an
    emoji with many skin tones is not seen more often. With `hard_negatives`, pictures of a group follow one another,
    for a loss that compares the pictures of a batch. The seed, the step and the index decide the picture of a group,
    its augmentation and the language. Held-out pictures are not augmented, and their languages alternate.

    training_tokens, held_tokens: [language, picture, length], for the pictures of the two sets.
    """

    def __init__(
        self, training: ImageDataset, validation: ImageDataset, batch_size: int, seed: int = 0,
        augmentation: Augmentation | None = None, training_tokens: Tokens | None = None,
        held_tokens: HeldTokens | None = None, *, evenly: bool = False, hard_negatives: bool = False,
    ):  # fmt: skip
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, but it must be at least 1.")
        if not len(training):
            raise UserError(f"No picture of {training.source} is for training: all of them are held out.")
        self.training, self.held_out = training, validation
        self.evenly, self.hard_negatives = evenly, hard_negatives
        self.augmentation = augmentation or Augmentation()
        self.training_tokens, self.held_tokens = training_tokens, held_tokens
        groups = training.groups if evenly else np.arange(len(training))
        self._members = np.argsort(groups, kind="stable")
        _, self._first, self._sizes = np.unique(groups[self._members], return_index=True, return_counts=True)
        order = partial(_group_order, training.groups, seed) if hard_negatives else None
        super().__init__(len(self._first), len(validation), batch_size, seed, order)
        facts = [training.fingerprint, validation.fingerprint, batch_size, seed, self.augmentation]
        facts += ["evenly"] * evenly + ["hard negatives"] * hard_negatives
        captions = ("|" if tokens is None else tokens.numpy().tobytes() for tokens in (training_tokens, held_tokens))
        self.fingerprint = hash_of([repr(facts), *captions])

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch of a step, counted from 0. It is the same in every process and does not depend on earlier
        calls."""
        return self.part(step, lambda rows: (0, rows))[0]

    def part(self, step: int, bounds: Callable[[int], tuple[int, int]]) -> tuple[dict[str, Tensor], int, int]:
        """Return a slice of that batch, the index of its first row, and the number of rows of the whole batch.

        bounds: function from the number of rows to start and end (exclusive) of the slice.
        """
        first, end = bounds(self.batch_size)
        groups = self._epochs.batch(step)[first:end]
        turns = uniform(self.seed + 2, step, groups, 1)[:, 0] * self._sizes[groups]
        indices = self._members[self._first[groups] + turns.astype(np.int64)]
        batch = self.make_batch(False, indices)
        batch["pictures"] = self.augmentation(batch["pictures"], self.seed, step, indices)
        if self.training_tokens is not None:
            draws = uniform(self.seed + 1, step, indices, 1)[:, 0]
            languages = (draws * len(self.training_tokens)).astype(np.int64)
            batch |= _caption_tokens(self.training_tokens, indices, languages)
        return batch, first, self.batch_size

    def make_batch(self, validating: bool, items: np.ndarray) -> dict[str, Tensor]:
        """Return these pictures without augmentation; held-out ones with their captions."""
        pictures = self.held_out if validating else self.training
        batch = {"pictures": pictures.take(items), "indices": torch.from_numpy(items)}
        if pictures.classes:
            batch["labels"] = torch.from_numpy(pictures.labels[items])
        if validating and self.held_tokens is not None:
            batch |= _caption_tokens(self.held_tokens, items, items % len(self.held_tokens))
        return batch


def _group_order(groups: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return a random order for an epoch in which the pictures of each group follow one another."""
    random = np.random.default_rng([seed, epoch])
    ranks = random.permutation(1 + groups.max())[groups]
    return np.lexsort((random.random(len(groups)), ranks))


def _caption_tokens(tokens: Tokens, indices: np.ndarray, languages: np.ndarray) -> dict[str, Tensor]:
    which = torch.from_numpy(languages)
    return {"tokens": tokens[which, torch.from_numpy(indices)], "languages": which}

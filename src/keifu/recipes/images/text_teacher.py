"""Frozen teacher of both towers of a CLIP: an encoder of English texts that was trained on far more than the captions.

Pictures learn the teacher's embedding of their English caption (LiT, Zhai et al., 2021). The text tower learns the same
embedding from the caption in each language. From words of a dictionary it learns the teacher's embedding of their
English meaning (Reimers and Gurevych, 2020, "Making Monolingual Sentence Embeddings Multilingual"). So a name without a
picture is near the names of similar things. The mean of the captions is subtracted from all embeddings.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from keifu import checkpoints
from keifu.data.images import augmentation, batches, splits
from keifu.data.padding import pad
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.translation.pairs import read_pairs
from keifu.files import hash_of
from keifu.inference.embeddings.clip import padding
from keifu.inference.embeddings.encoders import embed, encode_texts, encoder

WORDS = 2  # dictionary words for each picture of a batch
ENGLISH = "en"


@dataclass(frozen=True, eq=False)
class Lessons:
    """Teacher's embeddings of the training and validation captions, and of a dictionary's texts."""

    training: Float[Tensor, "pictures embedding"]
    held_out: Float[Tensor, "held_out_pictures embedding"]
    words: list[str]
    meanings: Float[Tensor, "words embedding"]


def ask(teacher: str, dictionary: str | None, parts: splits.ImageSplit) -> Lessons:
    """Embed the English captions and meanings by the teacher."""
    model, tokenizer = checkpoints.load(teacher, torch.float32)
    encoder(model)
    pairs = dict.fromkeys(read_pairs(dictionary).rows) if dictionary else {}
    meanings = [*dict.fromkeys(meaning for _, meaning in pairs)]
    captions = [[*part.texts(ENGLISH)] for part in (parts.train, parts.validation)]
    print(f"{teacher} reads {len(captions[0]):,} captions and {len(meanings):,} meanings ...", flush=True)
    sizes = [len(captions[0]), len(captions[1]), len(meanings)]
    points = embed(model, tokenizer, [*captions[0], *captions[1], *meanings], cut=True)
    points = F.normalize(points - points[: sizes[0]].mean(0), dim=-1)
    training, validation, meant = points.split(sizes)
    number = {meaning: index for index, meaning in enumerate(meanings)}
    which = [*range(len(meanings)), *(number[meaning] for _, meaning in pairs)]
    return Lessons(training, validation, [*meanings, *(word for word, _ in pairs)], meant[which])


class Words(NamedTuple):
    """Texts of a dictionary as tokens, and the teacher's embedding of each."""

    tokens: Int64[Tensor, "words length"]
    points: Float[Tensor, "words embedding"]


class TaughtBatches(batches.ImageBatches):
    """Batches of captioned pictures with "points", the teacher's embeddings of the captions [row, embedding].

    With a dictionary a batch also has "words" [row, words, length] and "word_points" [row, words, embedding], drawn by
    the seed and the step.
    """

    def __init__(self, lessons: Lessons, words: Words | None, *arguments: Any, **keywords: Any):
        self.lessons, self.words = lessons, words
        super().__init__(*arguments, **keywords)
        taught = (lessons.training, lessons.held_out, lessons.meanings)
        self.fingerprint = hash_of([self.fingerprint, *(points.numpy().tobytes() for points in taught)])

    def part(self, step: int, bounds: Callable[[int], tuple[int, int]]) -> tuple[dict[str, Tensor], int, int]:
        """Return a slice of the batch of a step (see `ImageBatches.part`)."""
        batch, first, total = super().part(step, bounds)
        if self.words is not None:
            draws = augmentation.uniform(self.seed + 3, step, batch["indices"].numpy(), WORDS)
            word_indices = torch.from_numpy((draws * len(self.words.tokens)).astype(np.int64))
            batch |= {"words": self.words.tokens[word_indices], "word_points": self.words.points[word_indices]}
        return batch, first, total

    def make_batch(self, validating: bool, items: np.ndarray) -> dict[str, Tensor]:
        """Return these pictures without augmentation, with the teacher's embeddings of their captions."""
        points = self.lessons.held_out if validating else self.lessons.training
        return super().make_batch(validating, items) | {"points": points[torch.from_numpy(items)]}


def encode_words(lessons: Lessons, tokenizer: Tokenizer, limit: int) -> Words | None:
    """Encode the texts of a dictionary; None without a dictionary."""
    if not lessons.words:
        return None
    rows, _ = encode_texts(tokenizer, lessons.words, limit, cut=True)
    return Words(pad(rows, padding(tokenizer))[0], lessons.meanings)

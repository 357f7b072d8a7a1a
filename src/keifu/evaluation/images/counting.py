"""Baseline of retrieval that counts colours and words and learns nothing.

A picture is its histogram of 64 colours; a name is its bag of words. The words of a picture are the mean of the names
of the training pictures with the nearest colours. The colours of a name are the mean of the training pictures with the
nearest names. Axes: pictures, texts, colours, words.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from keifu.data.images.dataset import ImageDataset

Points = tuple[Tensor, Tensor]  # of pictures and of names
NEIGHBOURS = 5
WITHOUT_SPACES = ("ja", "zh", "th")
CHUNK = 512  # pictures that are counted at once


def color_histograms(pictures: ImageDataset) -> Float[Tensor, "pictures colours"]:
    """Count 4 x 4 x 4 colours. Return the square roots of their shares: their dot product is Bhattacharyya's
    coefficient."""
    parts = []
    for start in range(0, len(pictures), CHUNK):
        pixels = pictures.take(slice(start, start + CHUNK)).long() // 64
        numbers = (pixels * torch.tensor([16, 4, 1])[:, None, None]).sum(1).flatten(1)
        counts = torch.zeros(len(numbers), 64).scatter_add_(1, numbers, torch.ones(numbers.shape))
        parts.append((counts / numbers.shape[1]).sqrt())
    return torch.cat(parts)


class WordCounter:
    """Counter of words (in a language without spaces, of runs of 1 to 3 characters), weighted by rarity (TF-IDF)."""

    def __init__(self, texts: Sequence[str], language: str):
        self.language = language
        documents = Counter(word for text in texts for word in {*self.words(text)})
        self.index = {word: number for number, word in enumerate(documents)}
        self.rarity = torch.tensor([math.log((1 + len(texts)) / (1 + count)) + 1 for count in documents.values()])

    def words(self, text: str) -> list[str]:
        """Return the words of a text, with repetitions."""
        text = text.lower()
        if self.language not in WITHOUT_SPACES:
            return re.findall(r"\b\w\w+\b", text)
        return [text[i : i + size] for size in (1, 2, 3) for i in range(len(text) - size + 1)]

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "texts words"]:
        """Return a vector of length 1 for each text. Words that the counter was not built with count 0."""
        counts = torch.zeros(len(texts), len(self.index))
        for row, text in enumerate(texts):
            for word in filter(self.index.__contains__, self.words(text)):
                counts[row, self.index[word]] += 1
        return F.normalize(counts * self.rarity, dim=-1)


def nearest_mean(queries: Tensor, references: Tensor, values: Tensor) -> Tensor:
    """Return for each query the mean value of its nearest neighbours, scaled to length 1."""
    nearest = (queries @ references.T).topk(min(NEIGHBOURS, len(references))).indices
    return F.normalize(values[nearest].mean(1), dim=-1)


def counted_points(train: ImageDataset, searched: ImageDataset, language: str) -> tuple[Points, Points]:
    """Return (pictures, names) as vectors of words, and (pictures, names) as vectors of colours."""
    counter = WordCounter(train.texts(language), language)
    known_words, words = (counter(part.texts(language)) for part in (train, searched))
    known_colors, colors = color_histograms(train), color_histograms(searched)
    of_words = nearest_mean(colors, known_colors, known_words), words
    return of_words, (colors, nearest_mean(words, known_words, known_colors))

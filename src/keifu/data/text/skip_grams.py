"""Words of a text, and pairs of neighbours among them, for word vectors.

Axes: batch = pairs, negatives = words that are drawn from noise for a pair.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers
from torch import Tensor

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.files import hash_of

WORD = re.compile(r"\w+")
UNKNOWN = "<unk>"
VALIDATION_BATCHES = 8
POWER = 0.75  # of the frequencies of noise words (Mikolov et al., 2013, section 2.2)


def count_words(texts: Iterable[str], vocab_size: int, min_count: int) -> tuple[list[str], list[int]]:
    """Return the most frequent words of lower-case text and their counts; the first entry is for all other words."""
    counts = Counter[str]()
    for text in texts:
        counts.update(WORD.findall(text.lower()))
    common = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[: vocab_size - 1]
    frequent_words = [(word, count) for word, count in common if count >= min_count]
    if len(frequent_words) < 2:
        raise UserError(f"Only {len(frequent_words)} words occur {min_count} times in the text: give more text.")
    return [UNKNOWN, *(word for word, _ in frequent_words)], [0, *(count for _, count in frequent_words)]


def word_tokenizer(words: list[str]) -> Tokenizer:
    """Return a tokenizer of lower-case words."""
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend, {"unk_token": UNKNOWN})


def word_ids(texts: Iterable[str], words: list[str]) -> np.ndarray:
    """Return the numbers of the known words of a text, in one row. Others are left out."""
    numbers = {word: index for index, word in enumerate(words)}

    def known_ids() -> Iterator[int]:
        for text in texts:
            for word in WORD.findall(text.lower()):
                if word in numbers:
                    yield numbers[word]

    return np.fromiter(known_ids(), dtype=np.int32)


class SkipGrams:
    """Pairs of a word and one of its neighbours, with words drawn from noise.

    A batch is a function of the seed and the step: words at random places, each with a neighbour. The distance to it is
    at most a number that is drawn from 1 to `window`, so that near words are drawn more often. Frequent words are
    thinned: a word of frequency f stays with the probability √(sample / f).

    ids: the words of the text. counts: occurrences of each word in the vocabulary. held_out: share at the end of the
    text that is kept for validation.
    """

    def __init__(
        self, ids: np.ndarray, counts: list[int], *, window: int, negatives: int, sample: float, batch_size: int,
        seed: int, held_out: float,
    ):  # fmt: skip
        frequencies = np.array(counts) / sum(counts)
        stays = np.sqrt(sample / np.maximum(frequencies, 1e-12))
        thinned = ids[np.random.default_rng([seed, 0]).random(len(ids)) < stays[ids]]
        cut = len(thinned) - round(held_out * len(thinned))
        self.training, self.held_out = thinned[:cut], thinned[cut:]
        if len(self.training) <= window:
            raise UserError(f"{len(self.training)} words of the text are left, too few for a window of {window}.")
        self.window, self.negatives, self.batch_size, self.seed = window, negatives, batch_size, seed
        self._noise = np.cumsum(np.array(counts, dtype=np.float64) ** POWER)
        settings = f"{window}-{negatives}-{sample}-{batch_size}-{seed}-{held_out}-{counts}"
        self.fingerprint = hash_of([settings.encode(), ids.tobytes()])

    def batch(self, step: int) -> dict[str, Tensor]:
        """Return {"centers": [batch], "words": [batch, 1 + negatives]}: the neighbour first, then the noise."""
        return self._pairs(self.training, np.random.default_rng([self.seed, 1, step]))

    def validation(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches of held-out pairs, the same ones at each call."""
        if len(self.held_out) > self.window:
            for index in range(VALIDATION_BATCHES):
                yield self._pairs(self.held_out, np.random.default_rng([0, 2, index]))

    def _pairs(self, ids: np.ndarray, random: np.random.Generator) -> dict[str, Tensor]:
        rows = self.batch_size
        places = random.integers(len(ids), size=rows)
        distances = random.integers(1, random.integers(1, self.window, size=rows, endpoint=True), endpoint=True)
        neighbours = ids[(places + distances * random.choice((-1, 1), rows)) % len(ids)]
        noise = np.searchsorted(self._noise, random.random((rows, self.negatives)) * self._noise[-1], side="right")
        words = np.concatenate([neighbours[:, None], noise], 1)
        return {"centers": torch.from_numpy(ids[places].astype(np.int64)), "words": torch.from_numpy(words).long()}

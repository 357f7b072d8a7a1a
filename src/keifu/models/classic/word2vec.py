"""Word2vec (Mikolov et al., 2013, "Distributed Representations of Words and Phrases and their Compositionality"): the
skip-gram model with negative sampling.

New was how much of a language model can be left out: it has no hidden layer, no order of words, and no softmax over the
vocabulary. The vector of a word predicts the words near it, by products with a second table of vectors. It only has to
tell a true neighbour from a few words that are drawn at random. So the program reads billions of words in a day, and
differences of vectors have a meaning: king - man + woman is near queen.

Axes: batch = pairs, words = candidates of a pair, dim; vocab = all words, count = results.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from keifu.ranges import Count


@dataclass(frozen=True)
class Config:
    """Sizes of a model. The defaults are those of the vectors that the authors published."""

    vocab_size: Count = 3_000_000  # words in the vocabulary
    dim: Count = 300  # width of a vector


SIZES = {"word2vec-google-news": Config()}


class Word2Vec(nn.Module):
    """Two vectors for each word: `embedding` as the word in the middle, `context` as a neighbour."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.context = nn.Embedding(config.vocab_size, config.dim)

    def forward(
        self, centers: Int[Tensor, " batch"], words: Int[Tensor, "batch words"]
    ) -> Float[Tensor, "batch words"]:
        """Return the logit of each candidate to be a neighbour of the center."""
        return (self.context(words) @ self.embedding(centers)[..., None])[..., 0]

    @property
    def blocks(self) -> nn.ModuleList:
        """Return the tables of vectors."""
        return nn.ModuleList([self.embedding, self.context])

    @torch.no_grad()
    def directions(self) -> Float[Tensor, "vocab dim"]:
        """Return the vector of every word, scaled to length 1."""
        return normalize(self.embedding.weight, dim=-1)

    @torch.no_grad()
    def nearest(
        self, vector: Float[Tensor, " dim"], count: int, without: tuple[int, ...] = ()
    ) -> tuple[Int[Tensor, " count"], Float[Tensor, " count"]]:
        """Return the words with the nearest vectors, and their cosines. without: words that are left out."""
        cosines = self.directions() @ normalize(vector, dim=0)
        cosines[list(without)] = -1.0
        nearest = cosines.topk(min(count, len(cosines)))
        return nearest.indices, nearest.values


def build(config: Config) -> Word2Vec:
    """Build a model with the initialisation of the authors' program: small vectors, and contexts of zeros."""
    model = Word2Vec(config)
    nn.init.uniform_(model.embedding.weight, -0.5 / config.dim, 0.5 / config.dim)
    nn.init.zeros_(model.context.weight)
    return model


WEIGHT_NAMES = {"embedding": "embedding", "context": "context"}  # the authors' file has only the first

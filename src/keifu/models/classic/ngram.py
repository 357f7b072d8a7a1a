"""The n-gram model (Shannon, 1948, "A Mathematical Theory of Communication"): the next token's probabilities, counted
after the last n - 1 tokens; smoothed as Kneser and Ney (1995) and Chen and Goodman (1998) do.

New was to treat text as a random process whose uncertainty is a number: Shannon estimated from counts how many bits a
letter has, and wrote text by drawing from them. Most long n-grams never occur, so a count of 0 must not become a
probability of 0. Kneser and Ney subtract a discount D from each count and give its share to the model of n - 1 tokens:

    p(w | u) = max(c(u w) - D, 0) / c(u) + λ(u) · p(w | u without its first token).

For shorter n-grams, c is the number of different tokens that come before: "Francisco" is frequent, but only after
"San", so it is unlikely anywhere else. Chen and Goodman have one D for counts of 1, one for 2, and one for 3 or more.

Axes: batch, length = tokens, vocab; rows = contexts; grams = different n-grams of one length, in ascending order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.layers.attention.attention import Cache, CacheShape
from keifu.layers.attention.masks import CausalMask, DocumentMask, segments_of
from keifu.layers.transformer.decoder import DecoderLM
from keifu.ranges import Count

NONE = -1  # a token before the beginning
USUAL = 0.5, 1.0, 1.5


@dataclass(frozen=True)
class Config:
    """Sizes of a model. n_grams: number of different n-grams of each length, from 1 to `order`, once counted."""

    vocab_size: Count = 256  # tokens in the vocabulary
    context_length: Count = 1024  # longest sequence in tokens
    order: Count = 5  # tokens of an n-gram: the last one is predicted from the others
    n_grams: tuple[int, ...] = ()


class OneHot(nn.Embedding):
    """A 1 at the number of each token instead of an embedding."""

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch vocab"]:  # noqa: A002
        return nn.functional.one_hot(input, self.num_embeddings).float()


class KneserNey(nn.Module):
    """Log-probabilities of the next token after each token. Its state is the last `order` - 1 tokens.

    The n-grams of each length are a level of a tree: an n-gram's key is (index of its first n - 1 tokens in the level
    above) · vocab_size + its last token. shares: max(c - D, 0) / c(u) of each. weights: λ of each as a context.
    """

    uniform: Tensor
    window = None

    def __init__(self, config: Config):
        super().__init__()
        self.vocab_size, self.order = config.vocab_size, config.order
        sizes = config.n_grams or (0,) * config.order
        for length, size in enumerate(sizes, 1):
            self.register_buffer(f"keys_{length}", torch.zeros(size, dtype=torch.int64))
            self.register_buffer(f"shares_{length}", torch.zeros(size))
            self.register_buffer(f"weights_{length}", torch.ones(size))
        self.register_buffer("uniform", torch.ones(1))  # λ of no context

    def level(self, name: str, length: int) -> Tensor:
        """Return the keys, shares or weights of the n-grams of this length."""
        return self.get_buffer(f"{name}_{length}")

    @property
    def cache_shape(self) -> CacheShape:
        """The shape of the cache: the last tokens of a sequence."""
        return CacheShape(fixed=self.order - 1)

    def forward(
        self, x: Float[Tensor, "batch length vocab"], mask: CausalMask | DocumentMask | None = None,
        positions: object = None, cache: Cache | None = None,
    ) -> Float[Tensor, "batch length vocab"]:  # fmt: skip
        """Return log-probabilities. With a cache, `x` are new tokens, which follow the earlier ones."""
        if cache is not None:
            return cache.recur(self._recur, x)
        return self._recur(x, x.new_zeros(len(x), self.order - 1), segments_of(mask, x.shape[1]))[0]

    def _recur(
        self, x: Float[Tensor, "batch length vocab"], state: Float[Tensor, "batch numbers"],
        segments: Int[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length vocab"], Float[Tensor, "batch numbers"]]:  # fmt: skip
        """Return the output of each new token, and the last tokens, of which each is stored as its number plus 1."""
        before = self.order - 1
        history = torch.cat([state.long() + NONE, x.argmax(-1)], 1)
        contexts = history.unfold(1, max(before, 1), 1)[:, -x.shape[1] :, :before]
        if segments is not None:
            padded = nn.functional.pad(segments, (before, 0), value=NONE)
            same = padded.unfold(1, max(before, 1), 1)[:, -x.shape[1] :, :before] == segments[..., None]
            contexts = contexts.where(same, NONE)
        log_probabilities = self.probabilities(contexts.flatten(0, 1)).log().unflatten(0, x.shape[:2])
        return log_probabilities, (history[:, history.shape[1] - before :] - NONE).to(state.dtype)

    def probabilities(self, contexts: Int[Tensor, "rows before"]) -> Float[Tensor, "rows vocab"]:
        """Return the probabilities of the next token after each context. NONE stands before the beginning."""
        root = torch.zeros(len(contexts), dtype=torch.int64, device=contexts.device)
        shares = (self.uniform / self.vocab_size).expand(len(contexts), self.vocab_size).clone()
        shares = self._add(shares, root, 1)
        for length in range(2, self.order + 1):
            node, is_seen = self._find(contexts[:, contexts.shape[1] - length + 1 :])
            rows = is_seen.nonzero()[:, 0]
            weights = self.level("weights", length - 1)[node[rows], None]
            shares[rows] = self._add(weights * shares[rows], node[rows], length)
        return shares

    def _find(self, grams: Int[Tensor, "rows n"]) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
        """Return the index of each n-gram among those of its length, and whether it has been counted."""
        node, is_seen = torch.zeros_like(grams[:, 0]), (grams != NONE).all(-1)
        for length, token in enumerate(grams.unbind(1), 1):
            keys, key = self.level("keys", length), node * self.vocab_size + token
            node = torch.searchsorted(keys, key).clamp(max=max(len(keys) - 1, 0))
            is_seen = is_seen & (keys[node] == key) if len(keys) else torch.zeros_like(is_seen)
            node = node.where(is_seen, 0)
        return node, is_seen

    def _add(
        self, shares: Float[Tensor, "rows vocab"], node: Int[Tensor, " rows"], length: int
    ) -> Float[Tensor, "rows vocab"]:
        """Add the shares of the n-grams that continue a context, the node of each row."""
        keys = self.level("keys", length)
        first, end = (torch.searchsorted(keys, (node + after) * self.vocab_size) for after in (0, 1))
        counts = end - first
        rows = torch.repeat_interleave(torch.arange(len(node), device=node.device), counts)
        offsets = torch.arange(len(rows), device=node.device) - (counts.cumsum(0) - counts)[rows]
        grams = first[rows] + offsets
        return shares.index_put((rows, keys[grams] % self.vocab_size), self.level("shares", length)[grams], True)


class NGramBlock(nn.Module):
    """The only block of an n-gram model."""

    def __init__(self, layer: KneserNey):
        super().__init__()
        self.attention = layer

    def forward(
        self, x: Float[Tensor, "batch length vocab"], mask: CausalMask | DocumentMask | None = None,
        positions: object = None, cache: Cache | None = None,
    ) -> Float[Tensor, "batch length vocab"]:  # fmt: skip
        return self.attention(x, mask, positions, cache)


class NGramLM(DecoderLM):
    """Language model whose hidden states are already log-probabilities."""

    def logits(self, hidden: Float[Tensor, "*batch vocab"]) -> Float[Tensor, "*batch vocab"]:
        """Return the log-probabilities."""
        return hidden

    @property
    def head_weight(self) -> Float[Tensor, "vocab vocab"]:
        """A matrix that changes nothing."""
        return torch.eye(self.config.vocab_size, device=self.embedding.weight.device)


def build(config: Config) -> NGramLM:
    """Build a model without counts, in which all tokens are equally likely."""
    embedding = OneHot(config.vocab_size, 1)
    nn.init.zeros_(embedding.weight)
    return NGramLM(embedding, [NGramBlock(KneserNey(config))], nn.Identity(), config=config)


def count(tokens: np.ndarray, config: Config) -> NGramLM:
    """Build a model of the n-grams in a long row of tokens."""
    keys, counts = grams_of(np.asarray(tokens, dtype=np.int64), config)
    model = build(replace(config, n_grams=tuple(map(len, keys))))
    blocks: list[Any] = list(model.blocks)
    layer: KneserNey = blocks[0].attention
    contexts = 1
    for length, (level, number) in enumerate(zip(keys, counts, strict=True), 1):
        discount = np.concatenate([[0.0], discounts(number)])[np.minimum(number, 3)]
        parent = level // config.vocab_size
        total, discounted = (np.bincount(parent, each, contexts) for each in (number, discount))
        weights = np.where(total > 0, discounted / np.maximum(total, 1), 1.0)
        layer.level("keys", length).copy_(torch.from_numpy(level))
        layer.level("shares", length).copy_(torch.from_numpy((number - discount) / np.maximum(total[parent], 1)))
        before = layer.uniform if length == 1 else layer.level("weights", length - 1)
        before.copy_(torch.from_numpy(weights))
        contexts = len(level)
    return model


def grams_of(tokens: np.ndarray, config: Config) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the keys of the n-grams of each length, and their numbers: occurrences for the longest, and otherwise the
    number of different tokens before them."""
    keys, counts = list[np.ndarray](), list[np.ndarray]()
    node = np.zeros(len(tokens), dtype=np.int64)  # index of the n-gram that begins at each token
    for length in range(1, config.order + 1):
        longer = node[: len(tokens) - length + 1] * config.vocab_size + tokens[length - 1 :]
        level, first, indices, number = np.unique(longer, return_index=True, return_inverse=True, return_counts=True)
        if length > 1:  # the n-gram without its first token begins at the next token
            counts[-1] = np.bincount(node[first + 1], minlength=len(keys[-1]))
        node = indices
        keys.append(level)
        counts.append(number)
    return keys, counts


def discounts(counts: Sequence[int] | np.ndarray) -> tuple[float, float, float]:
    """Return D of counts of 1, 2, and 3 or more (Chen and Goodman, 1998, equation 26). If too few n-grams have such
    counts to give numbers above 0, return 0.5, 1 and 1.5."""
    n1, n2, n3, n4 = (int((np.asarray(counts) == number).sum()) for number in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return USUAL
    share = n1 / (n1 + 2 * n2)
    values = 1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3
    return values if min(values) > 0 else USUAL


# No other program has such a file: the tensors keep their names.
_LEVELS = [f"blocks.*.attention.{name}_{length}" for name in ("keys", "shares", "weights") for length in range(1, 33)]
WEIGHT_NAMES = {name: name for name in (*_LEVELS, "blocks.*.attention.uniform", "embedding")}

"""Cross-encoders: encoders that read a query and a document together and give one score (Nogueira and Cho, 2019,
"Passage Re-ranking with BERT").

The scores are those of sentence-transformers' CrossEncoder. A bi-encoder compares two embeddings instead (see
`encoders`). Axes: documents, batch = pairs in one pass, length = tokens; ids and segments of a pair are rows of 2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.data.padding import pad
from keifu.data.tokenizers.pairs import IdPair, encode_pairs
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.embeddings.encoders import Advance, in_batches
from keifu.inference.text.model import Encoder

Stacked = tuple[Int[Tensor, "2 batch length"], Bool[Tensor, "batch length"] | None]


class PairScores(NamedTuple):
    """Score of each document, the number of tokens read, and the number of pairs that were cut."""

    scores: Float[Tensor, " documents"]
    tokens: int
    shortened: int


def is_reranker(model: nn.Module) -> bool:
    """Return whether the model is a cross-encoder: an encoder with a head for a single label."""
    return isinstance(model, Encoder) and len(model.config.labels) == 1


def reranker(model: nn.Module, name: str = "") -> Encoder:
    """Return the model. Raises `UserError` if it is not a cross-encoder. name: for errors."""
    if not isinstance(model, Encoder) or not is_reranker(model):
        raise UserError(
            f"{name or 'This model'} gives no score for a query and a document: choose a cross-encoder, a BERT with "
            "one label such as cross-encoder/ms-marco-MiniLM-L6-v2."
        )
    return model


def rank(
    model: nn.Module,
    tokenizer: Tokenizer,
    query: str,
    documents: Sequence[str],
    cut: bool = False,
    advance: Advance | None = None,
) -> PairScores:
    """Return the score of each document for a query, on the CPU and in the documents' order.

    cut: remove tokens from the ends of the longer text of a pair that is longer than the context. Otherwise such a pair
    raises `UserError` with both lengths. So does an empty text. advance: called with the number of finished documents.
    """
    reader = reranker(model)
    for name, text in (("The query", query), *((f"Document {n}", text) for n, text in enumerate(documents, 1))):
        if not text.strip():
            raise UserError(f"{name} is empty: give it words, or leave it out.")
    limit = min(reader.config.context_length, tokenizer.max_length or reader.config.context_length)
    pairs, shortened = encode_pairs(tokenizer, query, documents, limit)
    if shortened and not cut:
        at = shortened[0]
        raise UserError(
            f"Document {at.index + 1} of {len(documents)} has {at.length} tokens together with the query; the model "
            f"takes {limit}: shorten it, or keep its beginning with --cut."
        )

    def work(tokens: Int[Tensor, "2 batch length"], mask: Bool[Tensor, "batch length"] | None) -> Tensor:
        scores = reader.classify(tokens[0], tokens[1], mask).float()
        return scores.sigmoid() if reader.config.score_activation == "sigmoid" else scores

    scores = in_batches(model, work, pairs, tokenizer.pad_id or 0, advance=advance, pack=_stack, size=_size)
    return PairScores(scores.squeeze(1).cpu(), sum(map(_size, pairs)), len(shortened))


def _size(pair: IdPair) -> int:
    return len(pair.ids)


def _stack(pairs: Sequence[IdPair], pad_id: int) -> Stacked:
    """Stack ids and segments of pairs as one tensor, padded on the right, with a mask of real tokens or None."""
    tokens, mask = pad([pair.ids for pair in pairs], pad_id)
    segments, _ = pad([pair.segments for pair in pairs], 0)
    return torch.stack([tokens, segments]), mask

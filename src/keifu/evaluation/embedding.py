"""Sentence embeddings: a text as a point on the unit sphere, and the points nearest to it; knows no model.

The embedding is the mean of the last hidden states over a text's tokens, made as long as 1 (Reimers and Gurevych, 2019,
"Sentence-BERT"). Axes: texts, queries, among = the texts that are searched, dim.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.data.lengths import Rows
from keifu.data.tokenizers import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.encoding import Advance, Mask, Tokens, encoded, encoder, in_passes

BATCH = 256  # texts in a pass, at most
SEARCHED = 2**24  # similarities that exist at a time


def embed(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = BATCH, cut: bool = False
) -> Float[Tensor, "texts dim"]:
    """The embedding of each text, float32, computed in the type of the model's weights.

    Texts of similar length go through the model together; neither that nor their order changes an embedding beyond
    rounding. batch_size: the most in a pass. A model that is no encoder, an empty text, and a text longer than the
    model takes are `UserError`s, the last one with both lengths; `cut=True` keeps the beginning of such a text.
    """
    limit = encoder(model).config.context_length
    return embed_rows(model, encoded(tokenizer, texts, limit, cut).rows, tokenizer.pad_id or 0, batch_size)


def embed_rows(
    model: nn.Module, rows: Rows, pad_id: int, batch_size: int = BATCH, advance: Advance | None = None
) -> Float[Tensor, "texts dim"]:
    """The embeddings of texts whose ids, special tokens among them, are `rows`; `advance` is told how many are done."""
    reader = encoder(model)

    def work(tokens: Tokens, mask: Mask) -> Float[Tensor, "batch dim"]:
        return F.normalize(mean(reader.encode(tokens, None, mask), mask), dim=-1)

    return in_passes(model, work, rows, pad_id, batch_size, advance)


def mean(
    hidden: Float[Tensor, "batch length dim"], mask: Bool[Tensor, "batch length"] | None
) -> Float[Tensor, "batch dim"]:
    """The mean over the tokens that are real, in float32."""
    if mask is None:
        return hidden.mean(1, dtype=torch.float32)
    total = hidden.masked_fill(~mask[..., None], 0.0).sum(1, dtype=torch.float32)
    return total / mask.sum(1, keepdim=True)


def nearest(
    queries: Float[Tensor, "queries dim"],
    among: Float[Tensor, "among dim"],
    count: int,
    themselves: bool = False,
) -> tuple[Float[Tensor, "queries count"], Int[Tensor, "queries count"]]:
    """The cosine similarity and the place of the `count` nearest points to each query, the nearest first.

    All points lie on the unit sphere. themselves: queries and `among` are the same points, and none is its own
    neighbour. Fewer points than `count` are a `UserError`.
    """
    others = len(among) - themselves
    if not 1 <= count <= others:
        raise UserError(f"{count} nearest texts were asked for, and there are {others} to choose from.")
    found = []
    rows = max(1, SEARCHED // len(among))
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ among.T
        if themselves:
            own = torch.arange(len(similarity), device=similarity.device)
            similarity[own, start + own] = -torch.inf
        found.append(similarity.topk(count))
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])

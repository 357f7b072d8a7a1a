"""Sentence embeddings from an encoder such as BERT, and nearest neighbours among them.

Texts of similar length are encoded together. The embedding is the mean of the last hidden states over a text's tokens,
scaled to length 1 (Reimers and Gurevych, 2019, "Sentence-BERT"), or what the config's `pooling` names.

Axes: texts, batch = texts in one pass, length = tokens, dim; queries, among = the texts that are searched.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.data.classification.batches import Encoded
from keifu.data.padding import Rows, length_buckets, pad
from keifu.data.progress import Advance
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.text.model import Encoder, Mask, Tokens, TwoTowers, evaluation_mode
from keifu.layers.pooling import pool

PASS_TOKENS = 4096  # tokens in one pass: enough to use matrix multiplication well, few enough for a cache
BATCH = 256  # maximal number of texts in a pass
Work = Callable[[Any, Any], Float[Tensor, "batch dim"]]  # arguments: tokens and mask
Pack = Callable[[Any, int], tuple[Tensor, Tensor | None]]


def encoder(model: nn.Module) -> Encoder:
    """Return the model. Raises `UserError` if it is not an encoder."""
    if not isinstance(model, Encoder):
        raise UserError(f"A {type(model).__name__} gives no vectors for texts: choose an encoder, such as minilm.")
    return model


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], limit: int, cut: bool = False) -> Encoded:
    """Encode texts with special tokens around them, at most `limit` tokens each.

    cut: keep the first `limit` tokens of a longer text; the last of them is still the closing token. Otherwise a longer
    text raises `UserError` with both lengths. So does an empty text.
    """
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise UserError(
            f"The texts are {texts!r:.60}, which must be a list of texts: put one text in brackets, [text]."
        )
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(f"Text {at + 1} of {len(texts)} is {text!r:.60}, which must be a str.")
        if not text.strip():
            raise UserError(f"Text {at + 1} of {len(texts)} is empty: give it words, or leave it out.")
    rows = tokenizer.encode_batch(texts, special=True)
    longer = [index for index, row in enumerate(rows) if len(row) > limit]
    if longer and not cut:
        at = longer[0]
        other_texts = f", and {len(longer) - 1} others are too long" if len(longer) > 1 else ""
        raise UserError(
            f"Text {at + 1} of {len(texts)} has {len(rows[at])} tokens{other_texts}; the model takes {limit}: "
            "shorten it, or keep its beginning with --cut."
        )
    for at in longer:
        closing = rows[at][-1:] if rows[at][-1] in tokenizer.special_ids else []
        rows[at] = rows[at][: limit - len(closing)] + closing
    return Encoded(rows, len(longer))


def in_batches(
    model: nn.Module,
    work: Work,
    rows: Sequence[Any],
    pad_id: int,
    batch_size: int = BATCH,
    advance: Advance | None = None,
    pack: Pack = pad,
    size: Callable[[Any], int] = len,
) -> Float[Tensor, "texts dim"]:
    """Return the results of `work` for all rows, in their order, with the model in evaluation mode.

    batch_size: maximal rows in a pass. advance: called with the number of finished rows. pack: converts rows to tokens
    and mask. size: returns the number of tokens of a row.
    """
    if not rows:
        raise UserError("There is no text: give at least one.")
    device, parts, order = next(model.parameters()).device, list[Tensor](), list[int]()
    with evaluation_mode(model), torch.inference_mode():
        for length_bucket in length_buckets([size(row) for row in rows], PASS_TOKENS, batch_size):
            tokens, mask = pack([rows[index] for index in length_bucket], pad_id)
            parts.append(work(tokens.to(device), None if mask is None else mask.to(device)).float())
            order += length_bucket
            if advance:
                advance(len(order))
    embeddings = require_finite(torch.cat(parts), "texts")
    return embeddings[torch.tensor(order, device=device).argsort()]  # of no inference mode, for training


def require_finite(results: Tensor, what: str) -> Tensor:
    """Return the results of a model. Raises `UserError` for NaN or infinity, for example from damaged weights."""
    if not bool(results.isfinite().all()):
        raise UserError(f"The model's numbers for the {what} are not finite: its weights are damaged, or need float32.")
    return results


SEARCHED = 2**24  # similarities that are computed at once


def embed(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = BATCH, cut: bool = False
) -> Float[Tensor, "texts dim"]:
    """Return the embedding of each text as float32. It is computed in the dtype of the model's weights.

    Texts of similar length are computed together; this and the order change embeddings only by rounding. batch_size:
    maximal texts in a pass. Raises `UserError` for a model that is not an encoder, an empty text, or a text longer than
    the context. cut: keep the beginning of such a text instead.
    """
    limit = encoder(model).config.context_length
    return embed_rows(model, encode_texts(tokenizer, texts, limit, cut).rows, tokenizer.pad_id or 0, batch_size)


def embed_rows(
    model: nn.Module, rows: Rows, pad_id: int, batch_size: int = BATCH, advance: Advance | None = None
) -> Float[Tensor, "texts dim"]:
    """Return the embeddings of texts by an encoder or a CLIP. rows: ids with special tokens. advance: called with the
    number of finished texts."""
    reader = model if isinstance(model, TwoTowers) else encoder(model)

    def work(tokens: Tokens, mask: Mask) -> Float[Tensor, "batch dim"]:
        if isinstance(reader, TwoTowers):
            return F.normalize(reader.encode_text(tokens).float(), dim=-1)
        return F.normalize(pool(reader.encode(tokens, None, mask), mask, reader.config.pooling), dim=-1)

    return in_batches(model, work, rows, pad_id, batch_size, advance)


def nearest(
    queries: Float[Tensor, "queries dim"], among: Float[Tensor, "among dim"], count: int, themselves: bool = False
) -> tuple[Float[Tensor, "queries count"], Int[Tensor, "queries count"]]:
    """Return the cosine similarities and the indices of the `count` points nearest to each query, the nearest first.

    All points have length 1. themselves: queries and `among` are the same points, and a point is not its own neighbour.
    Raises `UserError` for fewer points than `count`.
    """
    n_others = len(among) - themselves
    if not 1 <= count <= n_others:
        raise UserError(f"{count} nearest texts were requested, but there are only {n_others} to choose from.")
    best = []
    rows = max(1, SEARCHED // len(among))
    for start in range(0, len(queries), rows):
        similarity = queries[start : start + rows] @ among.T
        if themselves:
            diagonal = torch.arange(len(similarity), device=similarity.device)
            similarity[diagonal, start + diagonal] = -torch.inf
        best.append(similarity.topk(count))
    return torch.cat([part.values for part in best]), torch.cat([part.indices for part in best])

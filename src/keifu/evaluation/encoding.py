"""Texts through an encoder such as BERT, neighbours in length together; knows no model and not what comes of them.

Axes: texts, batch = texts in one pass, length = tokens, dim = numbers for each text.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.data.lengths import Rows, padded, passes
from keifu.data.tokenizers import Tokenizer
from keifu.errors import UserError

PASS_TOKENS = 4096  # in one pass: enough to fill a matrix product, few enough for a cache
Tokens = Int[Tensor, "batch length"]
Mask = Bool[Tensor, "batch length"] | None
Work = Callable[[Any, Any], Float[Tensor, "batch dim"]]  # of tokens and mask
Pack = Callable[[Any, int], tuple[Tensor, Tensor | None]]
Advance = Callable[[int], object]


@runtime_checkable
class Encoder(Protocol):
    """What a model that reads in both directions offers; its `config` has `context_length` and `labels`."""

    config: Any

    def encode(self, tokens: Tokens, segments: Tokens | None, mask: Mask) -> Tensor: ...

    def classify(self, tokens: Tokens, segments: Tokens | None, mask: Mask) -> Tensor: ...


def encoder(model: nn.Module) -> Encoder:
    """The same model, known to be one that encodes; any other is a `UserError`."""
    if not isinstance(model, Encoder):
        raise UserError(f"A {type(model).__name__} gives no vectors for texts: choose an encoder, such as minilm.")
    return model


class Encoded(NamedTuple):
    """The ids of each text, and how many texts were cut to the model's length."""

    rows: Rows
    cut: int


def encoded(tokenizer: Tokenizer, texts: Sequence[str], limit: int, cut: bool = False) -> Encoded:
    """The ids of texts with the special tokens around them, as many as the model takes.

    cut: keep the first `limit` tokens of a longer text, of which the closing one is still the last. Without it a longer
    text is a `UserError` with both lengths; so is an empty one.
    """
    rows = tokenizer.encode_batch(texts, special=True)
    for place, text in enumerate(texts):
        if not text.strip():
            raise UserError(f"Text {place + 1} of {len(texts)} is empty: give it words, or leave it out.")
    longer = [place for place, row in enumerate(rows) if len(row) > limit]
    if longer and not cut:
        place = longer[0]
        others = f", and {len(longer) - 1} others are too long" if len(longer) > 1 else ""
        raise UserError(
            f"Text {place + 1} of {len(texts)} has {len(rows[place])} tokens{others}; the model takes {limit}: "
            "shorten it, or keep its beginning with --cut."
        )
    for place in longer:
        rows[place] = _cut(rows[place], limit, tokenizer)
    return Encoded(rows, len(longer))


def _cut(row: list[int], limit: int, tokenizer: Tokenizer) -> list[int]:
    closing = row[-1:] if row[-1] in tokenizer.special_ids else []
    return row[: limit - len(closing)] + closing


def in_passes(
    model: nn.Module,
    work: Work,
    rows: Sequence[Any],
    pad_id: int,
    batch_size: int,
    advance: Advance | None = None,
    pack: Pack = padded,
    size: Callable[[Any], int] = len,
) -> Float[Tensor, "texts dim"]:
    """What `work` gives for each row, in the order of the rows, the model in evaluation mode.

    batch_size: the most rows in a pass. `advance` is told how many rows are done. `pack` makes tokens and mask of some
    rows, and `size` tells how many tokens a row has.
    """
    if not rows:
        raise UserError("There is no text: give at least one.")
    device, training, done = next(model.parameters()).device, model.training, 0
    results: Tensor | None = None
    model.eval()
    try:
        with torch.inference_mode():
            for places in passes([size(row) for row in rows], PASS_TOKENS, batch_size):
                tokens, mask = pack([rows[place] for place in places], pad_id)
                part = work(tokens.to(device), None if mask is None else mask.to(device)).float()
                with torch.inference_mode(False):  # a tensor that also training can use
                    results = part.new_empty(len(rows), part.shape[1]) if results is None else results
                results[torch.tensor(places, device=device)] = part
                done += len(places)
                if advance:
                    advance(done)
    finally:
        model.train(training)
    assert results is not None
    return results

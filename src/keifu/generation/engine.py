"""Several requests written at once, piece by piece, until the last has ended; knows no model and no settings."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from keifu.generation.decoding import Batch, causal, evaluating, left_padded
from keifu.generation.requests import Piece, Request
from keifu.layers.cache import Cache


def capacity(requests: Sequence[Request]) -> int:
    """How many tokens the caches must hold for these requests; the last token of a text is never fed back."""
    return max(len(request.prompt) for request in requests) + max(request.limit for request in requests) - 1


@torch.inference_mode()
def write(model: nn.Module, requests: Sequence[Request], caches: list[Cache]) -> Iterator[Piece]:
    """Writes the texts to their ends: a piece for every token of every text, in turn.

    caches: room for `capacity(requests)`. They may hold the beginning of all prompts already, and in the end, if there
    is one request, hold all its tokens but the last. Texts that end leave the batch: the others go on faster.
    """
    tokens, padding = left_padded([request.prompt for request in requests], caches[0].keys.device)
    with evaluating(model):
        batch = Batch(causal(model), tokens, padding, [request.sampling for request in requests], caches)
        going = list(requests)
        while going:
            rows = batch.advance().figures.tolist()  # the one time in a step that the host waits for the device
            pieces = [request.take(*row) for request, row in zip(going, rows, strict=True)]
            yield from pieces
            kept = [row for row, piece in enumerate(pieces) if piece.finish_reason is None]
            going = [going[row] for row in kept]
            if going and len(going) < len(pieces):
                batch.keep(kept)

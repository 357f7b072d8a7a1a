"""Several documents in one row: who sees whom, and where each begins; knows no attention.

Axes: batch, length. `documents` [batch, length] numbers the document of each token; equal neighbours belong together.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class DocumentMask:
    """Each token sees itself and those before it in its own document; one object serves all layers of a pass."""

    def __init__(self, documents: Int[Tensor, "batch length"]):
        places = torch.arange(documents.shape[1], device=documents.device)
        self.apart = places[:, None] - places
        self.same = (documents[:, :, None] == documents[:, None]) & (self.apart >= 0)

    def visible(self, seen: int, window: int | None) -> Bool[Tensor, "batch 1 length seen"]:
        near = self.same if window is None else self.same & (self.apart < window)
        return near[:, None]


def positions_in(documents: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """How far each token is from the beginning of its document."""
    places = torch.arange(documents.shape[1], device=documents.device)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(begins, places, 0).cummax(1).values

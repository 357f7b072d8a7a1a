"""Batches of texts and pictures that were turned into entries of a codebook before; knows no model and no tokenizer.

Axes: picture, rows, columns = of the grid; batch, text = tokens of every text.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from keifu.training.protocols import Batch, Data

Codes = Int[Tensor, "picture rows columns"]


class InCodes:
    """Data with "indices" and "tokens" whose pictures were encoded before, once: "codes" stand in their place.

    real: where the tokens of texts are no padding. "text_share" is a batch's rows over its real tokens, the same for
    each row.
    """

    def __init__(self, data: Data, training: Codes, held: Tensor | None, real: Callable[[Tensor], Tensor]):
        self.data, self.training, self.held, self.real = data, training, held, real
        digest = hashlib.sha256(data.fingerprint.encode())
        for part in (training, held):
            digest.update(b"|" if part is None else part.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        return self._in_codes(self.data.batch(step), self.training)

    def validation(self) -> Iterator[Batch]:
        """The held-out batches."""
        for batch in self.data.validation():
            assert self.held is not None
            yield self._in_codes(batch, self.held)

    def _in_codes(self, batch: Batch, codes: Codes) -> Batch:
        tokens = batch["tokens"]
        real = self.real(tokens)
        share = torch.full((len(tokens),), len(tokens) / float(real.sum()))
        return {"tokens": tokens, "real": real, "codes": codes[batch["indices"]], "text_share": share}

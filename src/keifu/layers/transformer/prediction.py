"""Multi-token prediction: blocks after a language model that predict tokens beyond the next one (Gloeckle et al., 2024;
in sequence: DeepSeek-V3, 2024, section 2.2).

Block k (from 1) combines the state of a token with the embedding of the token k places later, and predicts the token
k + 1 places later. Embedding and head are the model's. Axes: batch, length = tokens, dim.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keifu.layers.attention.masks import CausalMask, DocumentMask, positions_in
from keifu.layers.attention.positions import Positions
from keifu.layers.linear import Linear
from keifu.layers.transformer.decoder import DecoderLM, Hidden, Tokens

Further = Float[Tensor, "batch _ dim"]  # states of the tokens that have a token to combine with


class PredictionBlock(nn.Module):
    """Projection of a normalised embedding and a normalised state, joined in this order, then a decoder block and a
    norm. norms: those of the embedding, of the state and of the output."""

    def __init__(self, dim: int, block: nn.Module, norms: tuple[nn.Module, nn.Module, nn.Module]):
        super().__init__()
        self.embedding_norm, self.hidden_norm, self.norm = norms
        self.projection = Linear(2 * dim, dim, bias=False)
        self.block = block

    def forward(self, hidden: Hidden, embeddings: Hidden, **context: Any) -> Hidden:
        """Return the states for the head and for the next block. context: the arguments of the decoder block."""
        joined = torch.cat([self.embedding_norm(embeddings), self.hidden_norm(hidden)], -1)
        return self.norm(self.block(self.projection(joined), **context))


class PredictingLM(DecoderLM):
    """`DecoderLM` with prediction blocks. Its logits are those of the decoder; see `further_hidden` for the blocks."""

    def __init__(self, decoder: DecoderLM, predictions: Sequence[PredictionBlock]):
        config = decoder.config
        super().__init__(
            decoder.embedding, [*decoder.blocks], decoder.norm, decoder.positions, decoder.head, config.dropout, config
        )
        self.predictions = nn.ModuleList(predictions)

    def further_hidden(self, tokens: Tokens, hidden: Hidden, documents: Tokens | None = None) -> list[Further]:
        """Return the states of each prediction block, from which `logits` computes those of further tokens.

        State i of block k (from 1) sees tokens 0 to i + k and predicts token i + k + 1, so it has k states fewer than
        `tokens`. hidden: the states of `tokens` from `DecoderLM.hidden`. documents: see there.
        """
        states: list[Further] = []
        for shift, block in enumerate(self.predictions, 1):
            hidden = hidden[:, :-1]
            hidden = block(hidden, self.embedding(tokens[:, shift:]), **_context(hidden, documents))
            states.append(hidden)
        return states


def _context(hidden: Hidden, documents: Tensor | None) -> dict[str, Any]:
    """Return the mask and the positions of a pass without earlier tokens."""
    length, device = hidden.shape[1], hidden.device
    if documents is None:
        mask, positions = CausalMask(0, length, None, device), torch.arange(length, device=device)
    else:
        shown = documents[:, :length]
        mask, positions = DocumentMask(shown), positions_in(shown)
    return {"mask": mask, "positions": Positions(positions), "cache": None}

"""Language model of recurrent layers: long short-term memory (Hochreiter and Schmidhuber, 1997, "Long Short-Term
Memory").

New was the cell, a second state that the network only adds to, so that a gradient passes through many steps without
vanishing (`keifu.layers.recurrent.cells`). The state has a fixed size: a new token costs the same after 10 tokens as
after 10,000, and no earlier token can be read again. This is the language model of Zaremba et al. (2014), with dropout
only between layers, never from step to step. `cell` replaces the layer by its predecessor or by its successor.
"""

from dataclasses import dataclass

from torch import nn

from keifu.errors import require_known
from keifu.layers.recurrent.cells import LSTM, RNN, RecurrentBlock, ResetAfterGRU
from keifu.layers.transformer.decoder import DecoderLM
from keifu.ranges import BelowOne, Count

CELLS: dict[str, type[RNN]] = {"lstm": LSTM, "gru": ResetAfterGRU, "rnn": RNN}


@dataclass(frozen=True)
class Config:
    """Sizes and settings of a model. The defaults are the medium model of Zaremba et al. (2014)."""

    vocab_size: Count = 10_000  # tokens in the vocabulary
    context_length: Count = 4096  # longest sequence in tokens; the layers have no limit of their own
    dim: Count = 650  # width of the states and of the embeddings
    n_layers: Count = 2  # recurrent layers
    cell: str = "lstm"  # kind of the layers: lstm, gru or rnn (the plain network)
    dropout: BelowOne = 0.5  # share of dropped activations before and after each layer
    tied: bool = False  # whether the head is the token embedding

    def __post_init__(self) -> None:
        require_known("cell", self.cell, CELLS)


SIZES = {
    "lstm-ptb-medium": Config(),
    "lstm-ptb-large": Config(dim=1500, dropout=0.65),
}


def build(config: Config) -> DecoderLM:
    """Build a model with torch's initialisation. The forget gates begin open (Gers et al., 2000)."""
    layers = [CELLS[config.cell](config.dim) for _ in range(config.n_layers)]
    for layer in layers:
        if isinstance(layer, LSTM):
            layer.remember()
    blocks = [RecurrentBlock(layer, config.dropout) for layer in layers]
    return DecoderLM.of(config, blocks, nn.Identity())


# The names of the tensors are those of the language model in PyTorch's examples, whose head has a bias.
_PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
WEIGHT_NAMES = {
    "embedding": "encoder",
    **{f"blocks.*.attention.network.{part}_l0": f"rnn.{part}_l*" for part in _PARTS},
    "head": "decoder",
}
REFUSED = {
    "gguf": "llama.cpp has no code for this model",
    "native": "RecurrentBlock",
    "tensor": "no Transformer block to split",
    "plan": "no Transformer of tokens alone",
    "adapters": "has no linear layers",
}

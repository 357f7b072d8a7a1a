"""DALL-E (Ramesh et al., 2021, "Zero-Shot Text-to-Image Generation"): a decoder-only Transformer over text tokens
followed by image tokens of a discrete autoencoder. It generates an image by predicting its tokens one by one.

Axes: batch, text = tokens of a text, including padding; rows, columns of an image's grid; cells = rows · columns;
length = text + cells and a start token before each.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from keifu.errors import UserError
from keifu.layers.activations import activation
from keifu.layers.attention.axial import Grid, GridAttention, Pattern
from keifu.layers.attention.kv_cache import KVState
from keifu.layers.attention.positions import LearnedPositions
from keifu.layers.diffusion.image_model import ImageModel
from keifu.layers.feedforward import FeedForward
from keifu.layers.initialisation import normal_, scale_residual_
from keifu.layers.linear import Linear
from keifu.layers.transformer.blocks import PreNorm
from keifu.models.dalle import discrete_vae

Tokens = Int[Tensor, "batch text"]
RealTokens = Bool[Tensor, "batch text"]

STARTS = 2  # start tokens: before the text, and before the image


@dataclass(frozen=True)
class Config:
    """The defaults are the paper's.

    Attributes:
        vocab_size, context_length: size of the text vocabulary, and tokens of a text; shorter texts are padded.
        vae: the autoencoder, whose codebook is the vocabulary of image tokens and whose grid gives their number.
        kernel: the side of the last layer's window (convolutional attention).
        sparse: whether image tokens have sparse attention (see `pattern`), or full causal attention.
    """

    vocab_size: int = 16_384
    context_length: int = 256
    dim: int = 3968
    hidden_dim: int = 15_872
    n_layers: int = 64
    n_heads: int = 62
    norm_eps: float = 1e-5
    kernel: int = 11
    sparse: bool = True
    vae: discrete_vae.Config = field(default_factory=discrete_vae.Config)

    @property
    def grid(self) -> Grid:
        """The layout of text and image tokens, from which attention masks are made."""
        return Grid(self.context_length + STARTS, self.vae.grid, self.vae.grid, self.kernel)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.vae.size, self.vae.size

    @property
    def colours(self) -> int:
        """Channels of the images."""
        return self.vae.channels

    def pattern(self, layer: int) -> Pattern:
        """Return the sparse attention pattern of image tokens in a layer, counted from 1: column attention in the
        second and every fourth after it, row attention in the others, convolutional attention in the last (appendix
        B.1).
        """
        if not self.sparse:
            return "full"
        if layer == self.n_layers:
            return "convolution"
        return "column" if (layer - 2) % 4 == 0 else "row"


SIZES = {"dall-e": Config()}


class Logits(NamedTuple):
    """Logits of each text token and of each image token, predicted from the tokens before it."""

    text: Float[Tensor, "batch text vocab"]
    picture: Float[Tensor, "batch cells codebook"]


class Dalle(ImageModel):
    """The decoder over text and image tokens, and the autoencoder that makes the image tokens.

    Padding has a separate learned embedding at each position (section 2.2). The embedding of an image token is the sum
    of its code's, its row's and its column's.
    """

    draws = "tokens"

    def __init__(self, config: Config, vae: discrete_vae.DiscreteVAE):
        super().__init__()
        self.config, self.vae = config, vae
        dim, grid = config.dim, config.grid
        self.starts = nn.Embedding(STARTS, dim)
        self.embedding = nn.Embedding(config.vocab_size, dim)
        self.positions, self.padding = (LearnedPositions(config.context_length, dim) for _ in range(2))
        self.entries = nn.Embedding(config.vae.codebook_size, dim)
        self.rows, self.columns = LearnedPositions(grid.height, dim), LearnedPositions(grid.width, dim)
        self.blocks = nn.ModuleList(_block(config, layer + 1) for layer in range(config.n_layers))
        self.norm = nn.LayerNorm(dim, config.norm_eps)
        self.text_head = Linear(dim, config.vocab_size)
        self.picture_head = Linear(dim, config.vae.codebook_size)

    def forward(self, tokens: Tokens, real: RealTokens, codes: Int[Tensor, "batch rows columns"]) -> Logits:
        """Return the logits of every token. real: True on text tokens that are not padding."""
        x = torch.cat([self.embed_text(tokens, real), self.embed_codes(codes.flatten(1))], 1)
        for block in self.blocks:
            x = block(x)
        x, length = self.norm(x), tokens.shape[1]
        return Logits(self.text_head(x[:, :length]), self.picture_head(x[:, length + 1 : -1]))

    def embed_text(self, tokens: Tokens, real: RealTokens) -> Float[Tensor, "batch prefix dim"]:
        """Return the embeddings of a text between the two start tokens."""
        length = self.config.context_length
        if tokens.shape[1] != length:
            raise UserError(f"Texts have {tokens.shape[1]} tokens, and the model reads {length}: pad them.")
        words = torch.where(real[..., None], self.embedding(tokens), self.padding.weight)
        before, after = (start.expand(len(tokens), 1, -1) for start in self.starts.weight)
        return torch.cat([before, words + self.positions.weight, after], 1)

    def embed_codes(self, codes: Int[Tensor, "batch some"], first: int = 0) -> Float[Tensor, "batch some dim"]:
        """Return the embeddings of image tokens at the grid positions from `first` on, in raster order."""
        positions, width = torch.arange(first, first + codes.shape[1], device=codes.device), self.config.grid.width
        return self.entries(codes) + self.rows(positions // width) + self.columns(positions % width)

    def prefill(self, tokens: Tokens, real: RealTokens) -> tuple[Float[Tensor, "batch codebook"], KVState]:
        """Return the logits of the first image token, and the key-value cache of the text with space for the image."""
        x, config = self.embed_text(tokens, real), self.config
        layers = [(config.n_heads, config.dim // config.n_heads)] * config.n_layers
        state = KVState(layers, len(tokens), config.grid.prefix + config.grid.cells, x)
        return self._after(x, state), state

    def decode(self, codes: Int[Tensor, " batch"], position: int, state: KVState) -> Float[Tensor, "batch codebook"]:
        """Return the logits of the image token after the one at this grid position."""
        return self._after(self.embed_codes(codes[:, None], position), state)

    def _after(self, x: Float[Tensor, "batch some dim"], state: KVState) -> Float[Tensor, "batch codebook"]:
        state.positions(x.shape[1])
        for i, block in enumerate(self.blocks):
            x = block(x, cache=state.layer(i))
        state.advance()
        return self.picture_head(self.norm(x[:, -1]))

    def to_pictures(self, codes: Int[Tensor, "batch rows columns"]) -> Float[Tensor, "batch channels height width"]:
        """Return the images of image tokens, from -1 to 1."""
        return self.vae.decode(codes)


def _block(config: Config, layer: int) -> PreNorm:
    attention = GridAttention(config.dim, config.n_heads, config.grid, config.pattern(layer))
    feedforward = FeedForward(config.dim, config.hidden_dim, activation("gelu"))
    norms = (nn.LayerNorm(config.dim, config.norm_eps), nn.LayerNorm(config.dim, config.norm_eps))
    return PreNorm(attention, feedforward, norms)


def build(config: Config) -> Dalle:
    """Build a model with GPT-2's initialisation, since the paper gives none."""
    model = Dalle(config, discrete_vae.build(config.vae))
    for part in model.children():
        if part is not model.vae:
            normal_(part, std=0.02)
    scale_residual_(model.blocks)
    return model

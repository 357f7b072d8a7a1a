"""The Transformer (Vaswani et al., 2017, "Attention Is All You Need"): an encoder-decoder for translation. New: only
attention and feed-forward layers, without recurrence, so that all positions of a text are computed in parallel.
Marian's models have its layers.

The norms are after each sublayer, as in the paper; the released tensor2tensor code has them before. Sines and cosines
of the positions are in two halves, as in that code and in Marian; the paper interleaves them. The two orders are
equivalent: they only number the dimensions differently.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from keifu.errors import UserError
from keifu.layers.activations import activation
from keifu.layers.attention.attention import Attention, CrossAttention
from keifu.layers.attention.positions import SinusoidalPositions
from keifu.layers.feedforward import FeedForward
from keifu.layers.initialisation import xavier_
from keifu.layers.linear import Linear
from keifu.layers.transformer.blocks import CrossPostNorm, PostNorm
from keifu.layers.transformer.encoder_decoder import EncoderDecoder
from keifu.models.hf import config as hf
from keifu.ranges import BelowOne, Count, Natural, NotNegative


@dataclass(frozen=True)
class Config:
    """The defaults are the paper's base model for English-German. A decoder field that is None has the
    encoder's value."""

    vocab_size: Count = 37_000  # tokens in the vocabulary
    target_vocab_size: Count | None = None  # tokens in the target's vocabulary; None: as vocab_size
    context_length: Count = 512  # longest sequence in tokens; the paper sets no limit, Marian's models have this one
    dim: Count = 512  # share of dropped attention weights (tensor2tensor, Marian)
    hidden_dim: Count = 2048  # width inside the feed-forward layers
    decoder_hidden_dim: Count | None = None  # width inside the decoder's feed-forward layers; None: as hidden_dim
    n_layers: Count = 6  # encoder blocks
    n_decoder_layers: Count | None = None  # decoder blocks; None: as many as n_layers
    n_heads: Count = 8  # attention heads
    n_decoder_heads: Count | None = None  # attention heads of the decoder; None: as many as n_heads
    norm_eps: NotNegative = 1e-5  # number ε in the normalisation
    activation: str = "relu"  # activation of the feed-forward layers
    dropout: BelowOne = 0.1  # share of dropped activations
    attention_dropout: BelowOne = 0.0  # share of dropped attention weights (tensor2tensor, Marian)
    # share of activations dropped inside the feed-forward layers (tensor2tensor, Marian)
    activation_dropout: BelowOne = 0.0
    shared: bool = True  # whether one matrix embeds both languages
    tied: bool = True  # whether the head is the target's embedding
    scaled: bool = True  # whether embeddings are multiplied by √dim
    interleaved: bool = False  # whether sines and cosines alternate, as in the paper; only keifu loads such a model
    start_id: Natural = 1  # token that begins a target
    end_id: Natural = 2  # token that ends either side
    pad_id: Natural = 3  # token that pads shorter sequences


# Table 3 gives the numbers of parameters, with "about 37000 tokens".
SIZES = {
    "transformer-base": Config(),
    "transformer-big": Config(dim=1024, hidden_dim=4096, n_heads=16, dropout=0.3),  # 0.1 for English-French
}


def build(config: Config) -> EncoderDecoder:
    """Build the model with Xavier's initialisation, as in tensor2tensor, since the paper gives none. Scaled embeddings
    have variance 1."""
    sizes = config.vocab_size, config.target_vocab_size or config.vocab_size
    if config.shared and sizes[0] != sizes[1]:
        raise UserError(f"A shared embedding needs one vocabulary, not {sizes[0]} and {sizes[1]} tokens.")
    model = EncoderDecoder(
        [nn.Embedding(size, config.dim) for size in (sizes[:1] if config.shared else sizes)],
        [_encoder_block(config) for _ in range(config.n_layers)],
        [_decoder_block(config) for _ in range(config.n_decoder_layers or config.n_layers)],
        SinusoidalPositions(config.context_length, config.dim, config.interleaved),
        head=None if config.tied else Linear(config.dim, sizes[1], bias=False),
        scale=config.dim**0.5 if config.scaled else 1.0,
        dropout=config.dropout,
        config=config,
    )
    xavier_(model, embedding_std=config.dim**-0.5)
    return model


def _encoder_block(config: Config) -> PostNorm:
    attention = Attention(config.dim, config.n_heads, dropout=config.attention_dropout)
    norms = nn.LayerNorm(config.dim, config.norm_eps), nn.LayerNorm(config.dim, config.norm_eps)
    return PostNorm(attention, _feedforward(config, config.hidden_dim), norms, config.dropout)


def _decoder_block(config: Config) -> CrossPostNorm:
    heads, dropout = config.n_decoder_heads or config.n_heads, config.attention_dropout
    norm = partial(nn.LayerNorm, config.dim, config.norm_eps)
    return CrossPostNorm(
        Attention(config.dim, heads, dropout=dropout),
        CrossAttention(config.dim, heads, dropout=dropout),
        _feedforward(config, config.decoder_hidden_dim or config.hidden_dim),
        (norm(), norm(), norm()),
        config.dropout,
    )


def _feedforward(config: Config, hidden_dim: int) -> FeedForward:
    return FeedForward(config.dim, hidden_dim, activation(config.activation), dropout=config.activation_dropout)


BLOCK = {
    "attention.qkv": "self_attn.[q,k,v]_proj",
    "attention.out": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "feedforward.up": "fc1",
    "feedforward.down": "fc2",
    "feedforward_norm": "final_layer_norm",
}
CROSS = {
    "cross_attention.q": "encoder_attn.q_proj",
    "cross_attention.kv": "encoder_attn.[k,v]_proj",
    "cross_attention.out": "encoder_attn.out_proj",
    "cross_attention_norm": "encoder_attn_layer_norm",
}
WEIGHT_NAMES = {
    "embedding": "model.shared",
    "source_embedding": "model.encoder.embed_tokens",
    "target_embedding": "model.decoder.embed_tokens",
    **{f"encoder.*.{ours}": f"model.encoder.layers.*.{theirs}" for ours, theirs in BLOCK.items()},
    **{f"decoder.*.{ours}": f"model.decoder.layers.*.{theirs}" for ours, theirs in (BLOCK | CROSS).items()},
    "head": "lm_head",
    "logits_bias": "final_logits_bias",
}
NOT_WEIGHTS = (  # the sinusoids, and a shared embedding in addition to two that replace it
    "model.encoder.embed_positions.weight",
    "model.decoder.embed_positions.weight",
    "model.shared.weight",
)
MODEL_TYPES = {"marian": "MarianMTModel"}
UNSUPPORTED: dict[str, Any] = {
    "normalize_before": False,
    "normalize_embedding": False,
    "add_final_layer_norm": False,
    "static_position_embeddings": True,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}


def aliases(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the other names of shared matrices in files, the likeliest first."""
    heads = ("lm_head",) if config.tied else ()
    if config.shared:
        return {"embedding": ("model.encoder.embed_tokens", "model.decoder.embed_tokens", *heads)}
    return {"source_embedding": ("model.shared",), "target_embedding": (*heads, "model.shared")}


FIELDS: hf.Fields = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "dim": "d_model",
    "hidden_dim": "encoder_ffn_dim",
    "decoder_hidden_dim": hf.Field("decoder_ffn_dim", if_none=lambda config: config.hidden_dim),
    "n_layers": "encoder_layers",
    "n_decoder_layers": hf.Field("decoder_layers", if_none=lambda config: config.n_layers),
    "n_heads": "encoder_attention_heads",
    "n_decoder_heads": hf.Field("decoder_attention_heads", if_none=lambda config: config.n_heads),
    "activation": hf.activation_field("activation_function", "gelu"),
    "dropout": hf.Field("dropout", 0.1, float),
    "attention_dropout": hf.Field("attention_dropout", 0.0, float),
    "activation_dropout": hf.Field("activation_dropout", 0.0, float),
    "scaled": hf.Field("scale_embedding", False),
    "start_id": "decoder_start_token_id",
    "end_id": hf.Field("eos_token_id", also=("forced_eos_token_id",)),
    "pad_id": "pad_token_id",
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a Hugging Face config.json of model_type marian."""
    tied = json.get("tie_word_embeddings", True)
    shared = json.get("share_encoder_decoder_embeddings", True) and tied  # if untied, transformers shares nothing
    target = json.get("decoder_vocab_size") or json["vocab_size"]
    return Config(
        **hf.read_fields(json, FIELDS),
        target_vocab_size=target if not shared and target != json["vocab_size"] else None,
        shared=shared,
        tied=tied,
    )


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers reads."""
    return {
        "is_encoder_decoder": True,
        "decoder_vocab_size": config.target_vocab_size or config.vocab_size,
        **hf.write(config, MODEL_TYPES, FIELDS),
        "share_encoder_decoder_embeddings": config.shared,
        "tie_word_embeddings": config.tied,
        "static_position_embeddings": True,
        "bos_token_id": None,
        "bad_words_ids": [[token] for token in sorted({config.start_id, config.pad_id} - {config.end_id})],
    }

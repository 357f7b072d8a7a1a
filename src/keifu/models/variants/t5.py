"""T5 (Raffel et al., 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"). New:
every task is text to text, with the task named at the start of the source; and pretraining by span corruption, in which
the target is the removed spans.

The network is an encoder-decoder with a norm before each sublayer (RMS, without bias) and no biases in its matrices. A
learned number for each distance is added to the scores, which have no scale. T5 1.1, Flan-T5 and mT5 have a gated
feed-forward network and a head of their own.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from keifu.errors import UserError
from keifu.layers.activations import activation
from keifu.layers.attention.attention import CrossAttention
from keifu.layers.feedforward import FeedForward
from keifu.layers.linear import Linear
from keifu.layers.normalisation import RMSNorm
from keifu.layers.transformer.blocks import CrossPreNorm, PreNorm
from keifu.layers.transformer.relative import (
    DroppedGatedFeedForward,
    RelativeAttention,
    RelativeBias,
    RelativeEncoderDecoder,
)
from keifu.models.hf import config as hf
from keifu.ranges import BelowOne, Count, Natural, NotNegative


@dataclass(frozen=True)
class Config:
    """The defaults are T5-Small."""

    vocab_size: Count = 32_128  # tokens in the vocabulary
    context_length: Count = 512  # longest training sequence in tokens; relative positions have no limit of their own
    dim: Count = 512  # width of the hidden states
    hidden_dim: Count = 2048  # width inside the feed-forward layers
    n_layers: Count = 6  # encoder blocks
    n_decoder_layers: Count | None = None  # decoder blocks; None: as many as n_layers
    n_heads: Count = 8  # attention heads
    head_dim: Count = 64  # size of a head
    n_buckets: Count = 32  # buckets of relative positions
    max_distance: Count = 128  # distance from which all keys share the last bucket
    activation: str = "relu"  # activation of the feed-forward layers
    gated: bool = False  # whether the feed-forward layers are gated
    norm_eps: NotNegative = 1e-6  # number ε in the normalisation
    dropout: BelowOne = 0.1  # share of dropped activations
    tied: bool = True  # whether the head is the embedding
    scaled: bool = True  # whether hidden states are divided by √dim before the head
    start_id: Natural = 0  # token that begins a target
    end_id: Natural = 1  # token that ends either side
    pad_id: Natural = 0  # token that pads shorter sequences
    prefix: str | None = None  # name of the task, put before each source; None: sources have it, as in the release

    def __post_init__(self) -> None:
        if self.n_buckets < 4:
            raise UserError(f"n_buckets is {self.n_buckets}; relative positions in both directions need at least 4.")
        if self.max_distance in (self.n_buckets // 2, self.n_buckets // 4):
            raise UserError(
                f"max_distance {self.max_distance} leaves no distances for half of the {self.n_buckets} buckets: "
                "choose a larger one."
            )


_V11: dict[str, Any] = {"activation": "gelu_tanh", "gated": True, "tied": False, "scaled": False}
# Section 3.1.1 and the released checkpoints; the second group is T5 1.1, whose sizes Flan-T5 shares.
SIZES = {
    "t5-small": Config(),
    "t5-base": Config(dim=768, hidden_dim=3072, n_layers=12, n_heads=12),
    "t5-large": Config(dim=1024, hidden_dim=4096, n_layers=24, n_heads=16),
    "flan-t5-small": Config(hidden_dim=1024, n_layers=8, n_heads=6, **_V11),
    "flan-t5-base": Config(dim=768, hidden_dim=2048, n_layers=12, n_heads=12, **_V11),
}


def build(config: Config) -> RelativeEncoderDecoder:
    """Build the model with the released code's initialisation: matrices from N(0, 1 / inputs), queries smaller by
    √head_dim, since the scores have no scale."""
    depth, norm = config.n_decoder_layers or config.n_layers, partial(RMSNorm, config.dim, config.norm_eps)
    bias = partial(RelativeBias, config.n_buckets, config.n_heads, config.max_distance)
    model = RelativeEncoderDecoder(
        nn.Embedding(config.vocab_size, config.dim),
        ([_encoder_block(config) for _ in range(config.n_layers)], [_decoder_block(config) for _ in range(depth)]),
        (bias(both_sides=True), bias(both_sides=False)), (norm(), norm()),
        None if config.tied else Linear(config.dim, config.vocab_size, bias=False),
        config.dim**-0.5 if config.scaled else 1.0, config.dropout, config,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, RelativeBias):
            nn.init.normal_(module.weight, std=config.dim**-0.5)
        elif isinstance(module, RelativeAttention):
            module.get_parameter("qkv.weight").data[: config.n_heads * config.head_dim] *= config.head_dim**-0.5
        elif isinstance(module, CrossAttention):
            module.q.weight.data *= config.head_dim**-0.5
    return model


def _attention(config: Config) -> RelativeAttention:
    return RelativeAttention(config.dim, config.n_heads, config.head_dim, config.dropout)


def _feedforward(config: Config) -> FeedForward | DroppedGatedFeedForward:
    if config.gated:
        return DroppedGatedFeedForward(config.dim, config.hidden_dim, activation(config.activation), config.dropout)
    return FeedForward(config.dim, config.hidden_dim, activation(config.activation), False, config.dropout)


def _encoder_block(config: Config) -> PreNorm:
    norms = RMSNorm(config.dim, config.norm_eps), RMSNorm(config.dim, config.norm_eps)
    return PreNorm(_attention(config), _feedforward(config), norms, config.dropout)


def _decoder_block(config: Config) -> CrossPreNorm:
    norm = partial(RMSNorm, config.dim, config.norm_eps)
    cross = CrossAttention(
        config.dim, config.n_heads, bias=False, dropout=config.dropout, head_dim=config.head_dim, scale=1.0
    )
    return CrossPreNorm(_attention(config), cross, _feedforward(config), (norm(), norm(), norm()), config.dropout)


def _block(stack: str, last: int) -> dict[str, str]:
    """Return the names of a stack's blocks. last: the number of the feed-forward layer."""
    block = f"{stack}.block.*.layer"
    names = {
        "attention.qkv": f"{block}.0.SelfAttention.[q,k,v]",
        "attention.out": f"{block}.0.SelfAttention.o",
        "attention_norm": f"{block}.0.layer_norm",
        "feedforward.up": f"{block}.{last}.DenseReluDense.wi",
        "feedforward.gate_up": f"{block}.{last}.DenseReluDense.[wi_0,wi_1]",
        "feedforward.down": f"{block}.{last}.DenseReluDense.wo",
        "feedforward_norm": f"{block}.{last}.layer_norm",
    }
    return {f"{stack}.*.{ours}": theirs for ours, theirs in names.items()}


_BIAS = "block.0.layer.0.SelfAttention.relative_attention_bias"
WEIGHT_NAMES = {
    "embedding": "shared",
    "encoder_bias": f"encoder.{_BIAS}",
    "decoder_bias": f"decoder.{_BIAS}",
    **_block("encoder", 1),
    **_block("decoder", 2),
    "decoder.*.cross_attention.q": "decoder.block.*.layer.1.EncDecAttention.q",
    "decoder.*.cross_attention.kv": "decoder.block.*.layer.1.EncDecAttention.[k,v]",
    "decoder.*.cross_attention.out": "decoder.block.*.layer.1.EncDecAttention.o",
    "decoder.*.cross_attention_norm": "decoder.block.*.layer.1.layer_norm",
    "encoder_norm": "encoder.final_layer_norm",
    "norm": "decoder.final_layer_norm",
    "head": "lm_head",
}
NOT_WEIGHTS = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)  # the first release had it
MODEL_TYPES = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}
UNSUPPORTED: dict[str, Any] = {"is_encoder_decoder": True, "is_decoder": False}


def aliases(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the other names of the embedding in files."""
    heads = ("lm_head",) if config.tied else ()
    return {"embedding": ("encoder.embed_tokens", "decoder.embed_tokens", *heads)}


def _read_head(json: Any) -> dict[str, Any]:
    """Read `tied` and `scaled`. T5 1.1 says by an untied head that hidden states have no scale; transformers 5 has a
    field for the scale, and ties the head unless the file has another. mT5 never has the scale."""
    tied = json.get("tie_word_embeddings") is not False
    scaled = json["model_type"] == "t5" and json.get("scale_decoder_outputs", tied)
    return {"tied": tied, "scaled": bool(scaled)}


def _read_feedforward(json: Any) -> dict[str, Any]:
    """Read `gated` and `activation` from feed_forward_proj, such as relu or gated-gelu, which fields of their own
    overrule. "gated-gelu" is GELU by tanh."""
    name = json.get("feed_forward_proj") or ("relu" if json["model_type"] == "t5" else "gated-gelu")
    kind, _, inner = name.rpartition("-")
    if kind not in ("", "gated"):
        raise UserError(f"feed_forward_proj is {name!r}: only an activation, or gated- and an activation, is known.")
    act = json.get("dense_act_fn") or ("gelu_new" if name == "gated-gelu" else inner)
    gated = json.get("is_gated_act")
    return {"gated": kind == "gated" if gated is None else bool(gated), "activation": hf.activation_name(act)}


def _write_feedforward(config: Config) -> dict[str, Any]:
    published = {"gelu_tanh": "gelu_new", "identity": "linear"}
    act = published.get(config.activation, config.activation)
    proj = "gelu" if config.gated and act == "gelu_new" else act
    return {
        "feed_forward_proj": f"gated-{proj}" if config.gated else proj,
        "dense_act_fn": act, "is_gated_act": config.gated,
    }  # fmt: skip


def _one_token(value: Any) -> Any:
    """Return the only end token. Raises UserError for several."""
    if isinstance(value, list):
        if len(value) != 1:
            raise UserError(f"eos_token_id has {len(value)} tokens; a T5 of keifu ends with one.")
        return value[0]
    return value


FIELDS: hf.Fields = {
    "vocab_size": "vocab_size",
    "context_length": hf.Field("n_positions", 512),
    "dim": "d_model",
    "hidden_dim": "d_ff",
    "n_layers": "num_layers",
    "n_decoder_layers": hf.Field("num_decoder_layers", None, if_none=lambda config: config.n_layers),
    "n_heads": "num_heads",
    "head_dim": "d_kv",
    "n_buckets": hf.Field("relative_attention_num_buckets", 32),
    "max_distance": hf.Field("relative_attention_max_distance", 128),
    "feedforward": hf.FieldGroup(_read_feedforward, _write_feedforward),
    "norm_eps": hf.Field("layer_norm_epsilon", 1e-6, float),
    "dropout": hf.Field("dropout_rate", 0.1, float),
    "head": hf.FieldGroup(
        _read_head,
        lambda config: {"tie_word_embeddings": config.tied, "scale_decoder_outputs": config.scaled},
    ),
    "start_id": hf.Field("decoder_start_token_id", lambda json: json.get("pad_token_id") or 0),
    "end_id": hf.Field("eos_token_id", 1, _one_token),
    "pad_id": hf.Field("pad_token_id", lambda json: 0),
    "prefix": hf.Field("prefix", None),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a Hugging Face config.json of model_type t5 or mt5."""
    return Config(**hf.read_fields(json, FIELDS))


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers reads."""
    return {"is_encoder_decoder": True, **hf.write(config, MODEL_TYPES, FIELDS)}

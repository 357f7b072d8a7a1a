"""Whisper (Radford et al., 2022, "Robust Speech Recognition via Large-Scale Weak Supervision"). New: one Transformer
that learns speech recognition from captions of the web, in many languages and tasks; special tokens select the language
and task.

Its layers are GPT-2's, with cross-attention to the sound; keys have no bias. A window of sound has 30 seconds.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from keifu.errors import UserError
from keifu.layers.activations import activation
from keifu.layers.attention.attention import KeysUnbiased, KeysUnbiasedCross
from keifu.layers.feedforward import FeedForward
from keifu.layers.initialisation import normal_
from keifu.layers.transformer.blocks import CrossPreNorm, PreNorm
from keifu.layers.transformer.speech import ConvStem, SpeechRecognizer
from keifu.models import transformer
from keifu.models.hf import config as hf
from keifu.ranges import BelowOne, Count, Natural


@dataclass(frozen=True)
class Config:
    """The defaults are the tiny multilingual model."""

    vocab_size: Count = 51_865  # tokens in the vocabulary
    context_length: Count = 448  # longest transcript in tokens, with its start tokens
    audio_length: Count = 1500  # frames of a window after the convolutions, 50 per second
    n_mels: Count = 80  # frequency bands
    dim: Count = 384  # width of the hidden states
    hidden_dim: Count = 1536  # width inside the feed-forward layers
    n_layers: Count = 4  # encoder blocks
    n_decoder_layers: Count | None = None  # decoder blocks; None: as many as n_layers
    n_heads: Count = 6  # attention heads
    activation: str = "gelu"  # activation of the feed-forward layers
    dropout: BelowOne = 0.0  # share of dropped activations
    start_id: Natural = 50_258  # token that begins a target
    end_id: Natural = 50_257  # token that ends a target
    pad_id: Natural = 50_257  # token that pads shorter targets


def _size(dim: int, layers: int, **changes: Any) -> Config:
    return Config(dim=dim, hidden_dim=4 * dim, n_layers=layers, n_heads=dim // 64, **changes)


_ENGLISH = {"vocab_size": 51_864, "start_id": 50_257, "end_id": 50_256, "pad_id": 50_256}
_BOTH = {"tiny": (384, 4), "base": (512, 6), "small": (768, 12), "medium": (1024, 24)}
# Table 1 gives the numbers of parameters.
SIZES = {
    **{f"whisper-{name}": _size(*sizes) for name, sizes in _BOTH.items()},
    **{f"whisper-{name}.en": _size(*sizes, **_ENGLISH) for name, sizes in _BOTH.items()},
    "whisper-large": _size(1280, 32),
    "whisper-large-v3": _size(1280, 32, vocab_size=51_866, n_mels=128),
    "whisper-large-v3-turbo": _size(1280, 32, vocab_size=51_866, n_mels=128, n_decoder_layers=4),
}


def build(config: Config) -> SpeechRecognizer:
    """Build the model with random weights: matrices and embeddings from N(0, 0.02²), as in GPT-2."""
    if config.dim % 2 or config.dim < 4:
        raise UserError(f"dim is {config.dim}; sines and cosines need an even dim of at least 4.")
    norm = partial(nn.LayerNorm, config.dim)
    encoder = [PreNorm(*_sublayers(config), (norm(), norm()), config.dropout) for _ in range(config.n_layers)]
    depth = config.n_decoder_layers or config.n_layers
    decoder = [_decoder_block(config, (norm(), norm(), norm())) for _ in range(depth)]
    model = SpeechRecognizer(
        ConvStem(config.n_mels, config.dim), nn.Embedding(config.vocab_size, config.dim), (encoder, decoder),
        (norm(), norm()), (config.audio_length, config.context_length), config.dropout, config,
    )  # fmt: skip
    normal_(model)
    return model


def _sublayers(config: Config) -> tuple[KeysUnbiased, FeedForward]:
    feedforward = FeedForward(config.dim, config.hidden_dim, activation(config.activation))
    return KeysUnbiased(config.dim, config.n_heads), feedforward


def _decoder_block(config: Config, norms: tuple[nn.Module, nn.Module, nn.Module]) -> CrossPreNorm:
    attention, feedforward = _sublayers(config)
    return CrossPreNorm(attention, KeysUnbiasedCross(config.dim, config.n_heads), feedforward, norms, config.dropout)


_BLOCK = {ours: theirs for ours, theirs in transformer.BLOCK.items() if ours != "attention.qkv"} | {
    "attention.qkv.matrix": "self_attn.[q,k,v]_proj",
    "attention.qkv.biases.q": "self_attn.q_proj.bias",
    "attention.qkv.biases.v": "self_attn.v_proj.bias",
}
_CROSS = {ours: theirs for ours, theirs in transformer.CROSS.items() if ours != "cross_attention.kv"} | {
    "cross_attention.kv.matrix": "encoder_attn.[k,v]_proj",
    "cross_attention.kv.biases.v": "encoder_attn.v_proj.bias",
}
WEIGHT_NAMES = {
    "stem.conv1": "model.encoder.conv1",
    "stem.conv2": "model.encoder.conv2",
    "source_positions": "model.encoder.embed_positions.weight",
    "encoder_norm": "model.encoder.layer_norm",
    "embedding": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "norm": "model.decoder.layer_norm",
    **{f"encoder.*.{ours}": f"model.encoder.layers.*.{theirs}" for ours, theirs in _BLOCK.items()},
    **{f"decoder.*.{ours}": f"model.decoder.layers.*.{theirs}" for ours, theirs in (_BLOCK | _CROSS).items()},
}
COPIES = {"proj_out.weight": "model.decoder.embed_tokens.weight"}
MODEL_TYPES = {"whisper": "WhisperForConditionalGeneration"}
_ZERO = ("encoder_layerdrop", "decoder_layerdrop", "attention_dropout", "activation_dropout")
UNSUPPORTED: dict[str, Any] = dict.fromkeys(_ZERO, 0.0) | {"tie_word_embeddings": True}
_SOUND = {"n_fft": 400, "hop_length": 160, "sampling_rate": 16_000, "dither": 0.0}  # the preprocessing in data/audio
_AS_TRANSFORMER = ("vocab_size", "dim", "n_layers", "n_decoder_layers", "activation", "start_id", "end_id", "pad_id")
FIELDS: hf.Fields = {name: transformer.FIELDS[name] for name in _AS_TRANSFORMER} | {
    "context_length": "max_target_positions",
    "audio_length": "max_source_positions",
    "n_mels": hf.Field("num_mel_bins", 80),
    "hidden_dim": hf.Field("encoder_ffn_dim", also=("decoder_ffn_dim",)),
    "n_heads": hf.Field("encoder_attention_heads", also=("decoder_attention_heads",)),
    "dropout": hf.Field("dropout", 0.0, float),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a Hugging Face config.json of model_type whisper."""
    for name, only in _SOUND.items():
        if (value := (json.get("preprocessor_config") or {}).get(name, only)) != only:
            raise UserError(f"preprocessor_config.json sets {name} to {value!r}, and only {only!r} is implemented.")
    for size in ("ffn_dim", "attention_heads"):
        if json[f"encoder_{size}"] != json[f"decoder_{size}"]:
            raise UserError(f"encoder_{size} and decoder_{size} differ, which keifu does not implement.")
    return Config(**hf.read_fields(json, FIELDS))


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers reads."""
    sound = {"feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "WhisperProcessor", **_SOUND}
    seconds = config.audio_length / 50 if config.audio_length % 50 else config.audio_length // 50
    sound |= {"feature_size": config.n_mels, "chunk_length": seconds, "padding_value": 0.0}
    return {
        "is_encoder_decoder": True,
        **hf.write(config, MODEL_TYPES, FIELDS),
        "bos_token_id": config.end_id, "preprocessor_config": sound,
    }  # fmt: skip

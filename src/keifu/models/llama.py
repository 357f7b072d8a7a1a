"""LLaMA (Touvron et al., 2023) and later models with the same layers: LLaMA 2 and 3, SmolLM2, TinyLlama, Mistral
(sliding window), Qwen2 (biased q, k, v). Compared with GPT-2: RMSNorm, SwiGLU, rotary positions, no biases."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from keifu.layers.activations import activation
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import RopeScaling, Rotary
from keifu.layers.feedforward import GatedFeedForward
from keifu.layers.initialisation import normal_, scale_residual_
from keifu.layers.normalisation import RMSNorm
from keifu.layers.transformer.blocks import PreNorm
from keifu.layers.transformer.decoder import DecoderLM
from keifu.layers.transformer.prediction import PredictingLM, PredictionBlock
from keifu.models.hf import config as hf
from keifu.models.registration import gguf
from keifu.ranges import BelowOne, Count, Natural, NotNegative, Positive


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Settings that LLaMA and later models share. A model's Config repeats a field only if its default differs."""

    norm_eps: NotNegative = 1e-6  # number ε in the normalisation
    rope_theta: Positive = 10_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None
    activation: str = "silu"  # activation of the feed-forward layers
    tied: bool = False  # whether the head is the token embedding
    dropout: BelowOne = 0.0  # share of dropped activations


@dataclass(frozen=True, kw_only=True)
class BiasConfig(DecoderConfig):
    """The same settings, for models whose attention may have biases."""

    attention_bias: bool = False  # whether the attention has biases


@dataclass(frozen=True)
class Config(DecoderConfig):
    """The defaults are LLaMA-7B. No paper gives `hidden_dim`: it is 256 · ceil(8/3 · dim / 256) in LLaMA 1."""

    vocab_size: Count = 32_000  # tokens in the vocabulary
    context_length: Count = 2048  # longest sequence in tokens
    dim: Count = 4096  # width of the hidden states
    hidden_dim: Count = 11_008  # width inside the feed-forward layers
    n_layers: Count = 32  # Transformer blocks
    n_heads: Count = 32  # attention heads
    n_kv_heads: Count | None = None  # key and value heads; None: as many as n_heads
    head_dim: Count | None = None  # width of a head; None: dim / n_heads
    sliding_window: Count | None = None  # tokens that a token attends to, including itself (Mistral); None: all
    first_window_layer: Natural = 0  # first layer with a window; earlier layers have full attention (Qwen2)
    qkv_bias: bool = False  # whether queries, keys and values have a bias
    out_bias: bool = False  # whether the attention's output has a bias
    feedforward_bias: bool = False  # whether the feed-forward layers have a bias


_llama2 = partial(Config, context_length=4096, norm_eps=1e-5)
_llama3 = partial(Config, vocab_size=128_256, context_length=8192, n_kv_heads=8, norm_eps=1e-5, rope_theta=500_000.0)
_llama31 = partial(_llama3, context_length=131_072, rope_scaling=RopeScaling("llama3", 8.0, 8192))
_llama32 = partial(_llama31, hidden_dim=8192, rope_scaling=RopeScaling("llama3", 32.0, 8192), tied=True)
_qwen2 = partial(Config, vocab_size=151_936, context_length=32_768, rope_theta=1e6, qkv_bias=True)
_smollm2 = partial(Config, vocab_size=49_152, context_length=8192, norm_eps=1e-5, tied=True)

SIZES = {
    "llama-7b": Config(),
    "llama-13b": Config(dim=5120, hidden_dim=13_824, n_layers=40, n_heads=40),
    "llama-33b": Config(dim=6656, hidden_dim=17_920, n_layers=60, n_heads=52),
    "llama-65b": Config(dim=8192, hidden_dim=22_016, n_layers=80, n_heads=64),
    "llama2-7b": _llama2(),
    "llama2-13b": _llama2(dim=5120, hidden_dim=13_824, n_layers=40, n_heads=40),
    "llama2-70b": _llama2(dim=8192, hidden_dim=28_672, n_layers=80, n_heads=64, n_kv_heads=8),
    "llama3-8b": _llama3(hidden_dim=14_336),
    "llama3-70b": _llama3(dim=8192, hidden_dim=28_672, n_layers=80, n_heads=64),
    "llama3.1-8b": _llama31(hidden_dim=14_336),
    "llama3.1-70b": _llama31(dim=8192, hidden_dim=28_672, n_layers=80, n_heads=64),
    "llama3.1-405b": _llama31(dim=16_384, hidden_dim=53_248, n_layers=126, n_heads=128),
    "llama3.2-1b": _llama32(dim=2048, n_layers=16, head_dim=64),
    "llama3.2-3b": _llama32(dim=3072, n_layers=28, n_heads=24),
    "tinyllama-1.1b": Config(dim=2048, hidden_dim=5632, n_layers=22, n_kv_heads=4, norm_eps=1e-5),
    "smollm2-135m": _smollm2(dim=576, hidden_dim=1536, n_layers=30, n_heads=9, n_kv_heads=3, rope_theta=100_000.0),
    "smollm2-360m": _smollm2(dim=960, hidden_dim=2560, n_layers=32, n_heads=15, n_kv_heads=5, rope_theta=100_000.0),
    "smollm2-1.7b": _smollm2(dim=2048, hidden_dim=8192, n_layers=24, n_heads=32, n_kv_heads=32, rope_theta=130_000.0),
    "mistral-7b": Config(context_length=32_768, hidden_dim=14_336, n_kv_heads=8, norm_eps=1e-5, sliding_window=4096),
    "qwen2-0.5b": _qwen2(dim=896, hidden_dim=4864, n_layers=24, n_heads=14, n_kv_heads=2, tied=True),
    "qwen2-1.5b": _qwen2(dim=1536, hidden_dim=8960, n_layers=28, n_heads=12, n_kv_heads=2, tied=True),
    "qwen2-7b": _qwen2(dim=3584, hidden_dim=18_944, n_layers=28, n_heads=28, n_kv_heads=4, vocab_size=152_064),
    "qwen2-72b": _qwen2(dim=8192, hidden_dim=29_568, n_layers=80, n_heads=64, n_kv_heads=8, vocab_size=152_064),
}


def build(config: Config) -> DecoderLM:
    """Build a model with GPT-2's initialisation, N(0, 0.02²) with scaled residual projections.

    The LLaMA papers do not give their initialisation.
    """
    return assemble(config, partial(_attention, config), partial(gated, config, bias=config.feedforward_bias))


def assemble(
    config: Any, attention: Callable[[int], nn.Module], feedforward: Callable[[int], nn.Module] | None = None,
    block: Callable[..., nn.Module] = PreNorm, norm: Callable[[int, float], nn.Module] = RMSNorm, n_norms: int = 2,
    last_norm: nn.Module | None = None, embedding: nn.Embedding | None = None, model: type[DecoderLM] = DecoderLM,
) -> DecoderLM:  # fmt: skip
    """Build LLaMA with the given layers.

    attention, feedforward: build the sublayers of a block from its number, from 0 on; the default feedforward is
    SwiGLU. block: builds a block from both sublayers and their `n_norms` norms. norm: builds a norm from a width and an
    ε. last_norm: the norm before the head, by default like the others.
    """
    new_norm = partial(norm, config.dim, config.norm_eps)
    feedforward = feedforward or partial(gated, config)
    blocks = [
        block(attention(layer), feedforward(layer), tuple(new_norm() for _ in range(n_norms)), config.dropout)
        for layer in range(config.n_layers)
    ]
    decoder = model.of(config, blocks, last_norm or new_norm(), embedding=embedding)
    normal_(decoder, std=0.02)
    scale_residual_(blocks)
    return decoder


def with_predictions(
    decoder: DecoderLM, attention: Callable[[int], nn.Module], feedforward: Callable[[int], nn.Module],
    norm: Callable[[int, float], nn.Module] = RMSNorm,
) -> DecoderLM:  # fmt: skip
    """Return the decoder with the `n_predictions` blocks of its Config that predict further tokens, or unchanged.

    The layers of these blocks are numbered after the decoder's. The decoder's initial weights are the same without
    them. For the other arguments, see `assemble`.
    """
    config = decoder.config
    new_norm = partial(norm, config.dim, config.norm_eps)
    layers = range(config.n_layers, config.n_layers + config.n_predictions)
    blocks = [
        PreNorm(attention(layer), feedforward(layer), (new_norm(), new_norm()), config.dropout) for layer in layers
    ]
    predictions = [PredictionBlock(config.dim, block, (new_norm(), new_norm(), new_norm())) for block in blocks]
    for prediction in predictions:
        normal_(prediction, std=0.02)
    scale_residual_(blocks)
    return PredictingLM(decoder, predictions) if predictions else decoder


def gated(config: Any, layer: int, bias: bool = False) -> GatedFeedForward:
    """Build the gated feed-forward network of a Config, the same in every layer."""
    return gated_network(config, config.hidden_dim, bias)


def gated_network(config: Any, hidden_dim: int, bias: bool = False) -> GatedFeedForward:
    """Build a gated feed-forward network of another inner width, such as an expert."""
    return GatedFeedForward(config.dim, hidden_dim, activation(config.activation), bias)


def global_layers(config: Any, every: int) -> tuple[int, ...]:
    """Return the layers with full attention that a Config lists; by default the last of each `every` layers."""
    listed: tuple[int, ...] | None = config.global_layers
    return tuple(range(every - 1, config.n_layers, every)) if listed is None else listed


def published_layers(every: int, other: str = "sliding_attention") -> hf.FieldGroup:
    """Return the group of a Config's `global_layers`, by default the last of each `every` layers. other: the published
    name of the other layers."""
    return hf.FieldGroup(
        lambda json: {"global_layers": hf.read_global_layers(json, every, other)},
        lambda config: {"layer_types": hf.layer_types(config.n_layers, global_layers(config, every), other)},
    )


def attention(
    config: Any, bias: bool = False, layer: Callable[..., Attention] = Attention, **settings: Any
) -> Attention:
    """Build rotary attention with a Config's sizes. layer: the attention class. settings: further arguments of this
    class."""
    head_dim = vars(config).get("head_dim")
    if "rotary" not in settings:
        settings["rotary"] = Rotary(head_dim or config.dim // config.n_heads, config.rope_theta, config.rope_scaling)
    return layer(config.dim, config.n_heads, config.n_kv_heads, head_dim, bias, dropout=config.dropout, **settings)


def _attention(config: Config, layer: int) -> Attention:
    window = config.sliding_window if layer >= config.first_window_layer else None
    return attention(config, config.qkv_bias, out_bias=config.out_bias, window=window)


WEIGHT_NAMES = {
    "embedding": "model.embed_tokens",
    "blocks.*.attention_norm": "model.layers.*.input_layernorm",
    "blocks.*.attention.qkv": "model.layers.*.self_attn.[q,k,v]_proj",
    "blocks.*.attention.out": "model.layers.*.self_attn.o_proj",
    "blocks.*.feedforward_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.feedforward.gate_up": "model.layers.*.mlp.[gate,up]_proj",
    "blocks.*.feedforward.down": "model.layers.*.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
NOT_WEIGHTS = ("model.layers.*.self_attn.rotary_emb.inv_freq",)  # old files have the rotary frequencies
MODEL_TYPES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}

DECODER_FIELDS: hf.Fields = hf.SIZE_FIELDS | {  # of LLaMA and later models
    "n_kv_heads": hf.Field("num_key_value_heads", lambda json: json["num_attention_heads"]),
    "norm_eps": hf.Field("rms_norm_eps", 1e-6, float),
    "activation": hf.activation_field("hidden_act", "silu"),
    "tied": hf.Field("tie_word_embeddings", False),
    "dropout": hf.Field("attention_dropout", 0.0, hf.rate),
    "rope": hf.rope(),
}
BIAS_FIELDS = DECODER_FIELDS | {"attention_bias": hf.Field("attention_bias", False)}
ALL_HEADS = hf.Field("num_key_value_heads", None, if_none=lambda config: config.n_heads)
FIELDS: hf.Fields = DECODER_FIELDS | {"n_kv_heads": ALL_HEADS, "head_dim": hf.Field("head_dim", None)}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a Hugging Face config.json of model_type llama, mistral or qwen2."""
    heads = {"n_kv_heads": hf.Field("num_key_value_heads", 8)} if json["model_type"] == "mistral" else {}
    biased = json.get("attention_bias", False)
    return Config(
        **hf.read_fields(json, FIELDS | heads),
        **hf.read_window(json),
        qkv_bias=biased or json["model_type"] == "qwen2",
        out_bias=biased,
        feedforward_bias=json.get("mlp_bias", False),
    )


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers, vLLM and llama.cpp's converter read."""
    model_type = "llama"
    further_fields: dict[str, Any] = {"attention_bias": config.out_bias, "mlp_bias": config.feedforward_bias}
    if config.sliding_window:
        model_type = "mistral"
        further_fields = {"sliding_window": config.sliding_window}
    if config.qkv_bias and not config.out_bias:
        model_type = "qwen2"
        further_fields = hf.write_window(config.sliding_window, config.first_window_layer)
    return hf.write(config, {model_type: MODEL_TYPES[model_type]}, FIELDS) | further_fields


GGUF = {
    "qwen2": gguf.GgufArchitecture(
        names=gguf.LLAMA, fields=gguf.WINDOW_FIELDS,
        fixed=gguf.PLAIN | {"qkv_bias": True, "out_bias": False, "feedforward_bias": False},
    ),
    "llama": gguf.GgufArchitecture(
        names=gguf.LLAMA, fields=gguf.WINDOW_FIELDS, fixed=gguf.PLAIN, interleaved=True, divisors="llama3",
        optional={
            "qkv_bias": "blk.0.attn_q.bias", "out_bias": "blk.0.attn_output.bias",
            "feedforward_bias": "blk.0.ffn_down.bias",
        },
    ),
}  # fmt: skip

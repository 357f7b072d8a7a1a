"""SmolLM3 (Hugging Face, 2025): LLaMA's layers, of which every fourth has no positions.

Layers without positions (NoPE) let attention work beyond the trained length (Yang et al., 2025: RoPE to NoPE).
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keifu.errors import UserError
from keifu.layers.attention.attention import Attention
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama
from keifu.models.hf import config as hf
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """Sizes and settings of a model. The defaults are SmolLM3 3B."""

    vocab_size: int = 128_256
    context_length: int = 65_536
    dim: int = 2048
    hidden_dim: int = 11_008
    n_layers: int = 36
    n_heads: int = 16
    n_kv_heads: int = 4
    rope_theta: float = field(default=5e6, kw_only=True)
    position_free: tuple[int, ...] | None = None  # layers without positions; None: every fourth, from layer 3 on
    sliding_window: int | None = None  # tokens that the layers in `window_layers` attend to
    window_layers: tuple[int, ...] = ()
    feedforward_bias: bool = False
    tied: bool = field(default=True, kw_only=True)


SIZES = {"smollm3-3b": Config()}


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    return llama.assemble(
        config, partial(_attention, config), partial(llama.gated, config, bias=config.feedforward_bias)
    )


def position_free(config: Config) -> tuple[int, ...]:
    """Return the layers without positions."""
    return tuple(range(3, config.n_layers, 4)) if config.position_free is None else config.position_free


def _attention(config: Config, layer: int) -> Attention:
    without: dict[str, Any] = {"rotary": None} if layer in position_free(config) else {}
    window = config.sliding_window if layer in config.window_layers else None
    return llama.attention(config, config.attention_bias, window=window, **without)


WEIGHT_NAMES = llama.WEIGHT_NAMES
MODEL_TYPES = {"smollm3": "SmolLM3ForCausalLM"}
FIELDS: hf.Fields = llama.BIAS_FIELDS | {
    "n_kv_heads": hf.Field("num_key_value_heads", 4),
    "feedforward_bias": hf.Field("mlp_bias", False),
    "tied": hf.Field("tie_word_embeddings", True),
    "rope": hf.rope(2e6),
}


def from_published(json: dict[str, Any]) -> Config:
    """Read the Config of a Hugging Face config.json of model_type smollm3."""
    n_layers, interval = hf.check_layers(json, "num_hidden_layers"), json.get("no_rope_layer_interval", 4)
    free = tuple(range(interval - 1, n_layers, interval))
    if (uses := json.get("no_rope_layers")) is not None:  # 1: the layer has positions
        free = tuple(layer for layer, has_positions in enumerate(uses[:n_layers]) if not has_positions)
    is_common = free == tuple(range(3, n_layers, 4))
    window, types = json.get("sliding_window"), hf.read_layer_types(json)
    layers = free if json.get("use_sliding_window", False) and window else ()
    if types is not None:  # transformers masks by the listed types, whatever use_sliding_window says
        layers = tuple(layer for layer, name in enumerate(types) if name == "sliding_attention")
    if layers and not window:
        raise UserError("its layer_types have sliding_attention, and its sliding_window is not set.")
    window_fields = {"sliding_window": window, "window_layers": layers} if layers else {}
    return Config(**hf.read_fields(json, FIELDS), position_free=None if is_common else free, **window_fields)


def to_published(config: Config) -> dict[str, Any]:
    """Return the config.json that transformers, vLLM and llama.cpp's converter read."""
    free = position_free(config)
    return {
        **hf.write(config, MODEL_TYPES, FIELDS),
        "no_rope_layers": [int(layer not in free) for layer in range(config.n_layers)],
        "use_sliding_window": bool(config.window_layers),
        "sliding_window": config.sliding_window,
        "layer_types": hf.layer_types(config.n_layers, {*range(config.n_layers)} - {*config.window_layers}),
    }


GGUF = {
    "smollm3": gguf.GgufArchitecture(  # llama.cpp gives every fourth layer no positions
        names=gguf.LLAMA, fields=gguf.ROTARY_FIELDS, interleaved=True,
        fixed=gguf.SILU | {
            "feedforward_bias": False, "position_free": None, "sliding_window": None, "window_layers": ()
        },
    ),
}  # fmt: skip

"""EXAONE 4.0 (LG AI Research, 2025): OLMo 2's norms after the sublayers, and a norm of each head's queries and keys.

In the 32B model three of four layers have a sliding window, and the fourth attends to all tokens without positions. The
1.2B model has full attention with positions in every layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import RopeScaling
from keifu.layers.normalisation import RMSNorm
from keifu.layers.transformer.blocks import ReorderedNorm
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models import llama, olmo2, qwen3
from keifu.models.hf import config as hf
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.DecoderConfig):
    """Sizes and settings of a model. The defaults are EXAONE 4.0 32B."""

    vocab_size: int = 102_400
    context_length: int = 131_072
    dim: int = 5120
    hidden_dim: int = 27_392
    n_layers: int = 64
    n_heads: int = 40
    n_kv_heads: int = 8
    head_dim: int = 128
    norm_eps: float = field(default=1e-5, kw_only=True)
    rope_theta: float = field(default=1e6, kw_only=True)
    rope_scaling: RopeScaling | None = field(default=RopeScaling("llama3", 16.0, 8192), kw_only=True)
    sliding_window: int | None = 4096  # tokens that a local layer attends to; None: all layers are global
    global_layers: tuple[int, ...] | None = None  # have no positions next to local ones; None: every fourth


SIZES = {
    "exaone4-1.2b": Config(
        context_length=65_536, dim=2048, hidden_dim=4096, n_layers=30, n_heads=32, head_dim=64, sliding_window=None,
        tied=True,
    ),
    "exaone4-32b": Config(),
}  # fmt: skip


def build(config: Config) -> DecoderLM:
    """Build a model with the initialisation of keifu's LLaMA."""
    return llama.assemble(config, partial(_attention, config), block=ReorderedNorm)


def _attention(config: Config, layer: int) -> Attention:
    norm = partial(RMSNorm, config.head_dim, config.norm_eps)
    if config.sliding_window and layer in llama.global_layers(config, 4):
        return llama.attention(config, qk_norm=(norm(), norm()), rotary=None)
    return llama.attention(config, qk_norm=(norm(), norm()), window=config.sliding_window)


WEIGHT_NAMES = olmo2.WEIGHT_NAMES
MODEL_TYPES = {"exaone4": "Exaone4ForCausalLM"}


def _read_layers(json: Mapping[str, Any]) -> dict[str, Any]:
    window = json.get("sliding_window", 4096)
    if window is None:
        return {"sliding_window": None}
    letters = json.get("sliding_window_pattern") or 4  # the files of the 32B model have "LLLG" and list their layers
    every = len(letters) if isinstance(letters, str) else letters
    listed = hf.read_global_layers({**json, "sliding_window_pattern": every}, 4)
    return {"sliding_window": window, "global_layers": listed}


def _write_layers(config: Config) -> dict[str, Any]:
    full = llama.global_layers(config, 4) if config.sliding_window else range(config.n_layers)
    return {"sliding_window": config.sliding_window, "layer_types": hf.layer_types(config.n_layers, full)}


FIELDS: hf.Fields = llama.DECODER_FIELDS | {
    "n_kv_heads": hf.Field("num_key_value_heads", 32),
    "head_dim": qwen3.ATTENTION_FIELDS["head_dim"],
    "norm_eps": hf.Field("rms_norm_eps", 1e-5, float),
    "layers": hf.FieldGroup(_read_layers, _write_layers),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)


def _required(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of llama.cpp's code, which gives windows and layers without positions to models of 64 layers
    alone, and has matrices as wide as all heads."""
    shape = {"head_dim": values["dim"] // values["n_heads"]}
    if values["n_layers"] != 64:
        return shape | {"sliding_window": None}
    return shape | {"global_layers": None} | ({} if values.get("sliding_window") else {"sliding_window": 4096})


GGUF = {
    "exaone4": gguf.GgufArchitecture(
        names=gguf.LLAMA | gguf.QK_NORM | gguf.REORDERED_NORMS, fields=gguf.WINDOW_FIELDS,
        fixed={"activation": "silu", "dropout": 0.0}, windows=True, divisors="llama3", derive=_required,
    ),
}  # fmt: skip

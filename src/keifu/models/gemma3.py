"""The text model of Gemma 3 (Gemma Team, 2025): five layers of sliding-window attention for each layer of full
attention, so that the key-value cache of a long text stays small; norms before and after each sublayer, QK-norm, and
embeddings times √dim.

The rotary base is 10,000 in local layers (sliding window) and 1,000,000 in global ones. Norms multiply by 1 + weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from keifu.errors import UserError
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.positions import RopeScaling, Rotary
from keifu.layers.normalisation import UnitOffsetRMSNorm
from keifu.layers.transformer.blocks import SandwichNorm
from keifu.layers.transformer.decoder import DecoderLM, ScaledEmbedding
from keifu.models import llama, qwen3
from keifu.models.hf import config as hf
from keifu.models.registration import gguf


@dataclass(frozen=True)
class Config(llama.BiasConfig):
    """The defaults are Gemma 3 1B. The attention is n_heads · head_dim wide, which need not be `dim`."""

    vocab_size: int = 262_144
    context_length: int = 32_768
    dim: int = 1152
    hidden_dim: int = 6912
    n_layers: int = 26
    n_heads: int = 4
    n_kv_heads: int = 1
    head_dim: int = 256
    rope_theta: float = field(default=1e6, kw_only=True)
    local_rope_theta: float = 10_000.0
    local_rope_scaling: RopeScaling | None = None
    activation: str = field(default="gelu_tanh", kw_only=True)
    sliding_window: int = 512  # tokens that a local layer attends to, including the token itself
    global_layers: tuple[int, ...] | None = None  # None: every sixth, from layer 5 on
    attention_scale: float | None = None  # None: 1 / √head_dim
    tied: bool = field(default=True, kw_only=True)


_SCALING = RopeScaling("linear", 8.0, 131_072)
_wide = partial(Config, vocab_size=262_208, context_length=131_072, sliding_window=1024, rope_scaling=_SCALING)

# The paper's numbers of parameters (table 1: embedding and the rest) are without the vision encoder; 270M's is from
# the model card.
SIZES = {
    "gemma3-270m": Config(dim=640, hidden_dim=2048, n_layers=18),
    "gemma3-1b": Config(),
    "gemma3-4b": _wide(dim=2560, hidden_dim=10_240, n_layers=34, n_heads=8, n_kv_heads=4),
    "gemma3-12b": _wide(dim=3840, hidden_dim=15_360, n_layers=48, n_heads=16, n_kv_heads=8),
    "gemma3-27b": _wide(
        dim=5376, hidden_dim=21_504, n_layers=62, n_heads=32, n_kv_heads=16, head_dim=128, attention_scale=168**-0.5
    ),
}


def build(config: Config) -> DecoderLM:
    """Build a model with GPT-2's initialisation: N(0, 0.02²), scaled residual projections. The report gives none."""
    embedding = ScaledEmbedding(config.vocab_size, config.dim, config.dim**0.5)
    return llama.assemble(
        config, partial(_attention, config), block=SandwichNorm, norm=UnitOffsetRMSNorm, n_norms=4, embedding=embedding
    )


def _attention(config: Config, layer: int) -> Attention:
    rotary, window = Rotary(config.head_dim, config.local_rope_theta, config.local_rope_scaling), config.sliding_window
    if layer in llama.global_layers(config, 6):
        rotary, window = Rotary(config.head_dim, config.rope_theta, config.rope_scaling), None
    norm = partial(UnitOffsetRMSNorm, config.head_dim, config.norm_eps)
    settings = {"scale": config.attention_scale, "qk_norm": (norm(), norm())}
    return llama.attention(config, config.attention_bias, rotary=rotary, window=window, **settings)


WEIGHT_NAMES = qwen3.WEIGHT_NAMES | {
    "blocks.*.post_attention_norm": "model.layers.*.post_attention_layernorm",
    "blocks.*.feedforward_norm": "model.layers.*.pre_feedforward_layernorm",
    "blocks.*.post_feedforward_norm": "model.layers.*.post_feedforward_layernorm",
}
MODEL_TYPES = {"gemma3_text": "Gemma3ForCausalLM"}
UNSUPPORTED: dict[str, Any] = {
    "final_logit_softcapping": None, "attn_logit_softcapping": None, "use_bidirectional_attention": False,
}  # fmt: skip


def _read_ropes(json: Mapping[str, Any]) -> dict[str, Any]:
    """Read base and scaling of the global and of the local layers. transformers 5 writes both in `rope_parameters`."""
    context = {"max_position_embeddings": json.get("max_position_embeddings", 131_072)}
    both = json.get("rope_parameters") or {}
    old = {"rope_theta": json.get("rope_theta", 1e6), **(json.get("rope_scaling") or {})}
    everywhere = {"rope_theta": 1e6} | both["full_attention"] if both.get("full_attention") else old
    local = {"rope_theta": json.get("rope_local_base_freq", 10_000.0)} | (both.get("sliding_attention") or {})
    return hf.read_rope(context | {"rope_parameters": everywhere}) | {
        f"local_{name}": value for name, value in hf.read_rope(context | {"rope_parameters": local}).items()
    }


def _write_ropes(config: Config) -> dict[str, Any]:
    everywhere = hf.write_rope(config.rope_theta, config.rope_scaling)
    local = hf.write_rope(config.local_rope_theta, config.local_rope_scaling)
    both = {"full_attention": everywhere["rope_parameters"], "sliding_attention": local["rope_parameters"]}
    return {**everywhere, "rope_local_base_freq": config.local_rope_theta, "rope_parameters": both}


def _read_scale(json: Mapping[str, Any]) -> dict[str, Any]:
    scalar = json.get("query_pre_attn_scalar", 256)
    return {"attention_scale": None if scalar == json.get("head_dim", 256) else scalar**-0.5}


def _write_scale(config: Any) -> dict[str, Any]:
    """Return query_pre_attn_scalar, the inverse square of the factor of the scores: a whole number in every published
    config."""
    if (scale := config.attention_scale) is None:
        return {"query_pre_attn_scalar": config.head_dim}
    if not scale > 0:
        raise UserError(f"attention_scale is {scale}, and config.json holds 1 / its square: it must be above 0.")
    scalar, whole_number = scale**-2, max(1, round(scale**-2))
    return {"query_pre_attn_scalar": whole_number if abs(whole_number**-0.5 - scale) < 1e-12 else scalar}


GEMMA_FIELDS: hf.Fields = llama.BIAS_FIELDS | {  # of Gemma 2 and 3
    "n_kv_heads": "num_key_value_heads",
    "head_dim": hf.Field("head_dim", 256),
    "activation": hf.activation_field("hidden_activation", "gelu_pytorch_tanh"),
    "attention_scale": hf.FieldGroup(_read_scale, _write_scale),
    "sliding_window": hf.Field("sliding_window", 4096),
    "tied": hf.Field("tie_word_embeddings", True),
}
FIELDS: hf.Fields = GEMMA_FIELDS | {
    "vocab_size": hf.Field("vocab_size", 262_208),
    "context_length": hf.Field("max_position_embeddings", 131_072),
    "global_layers": llama.published_layers(6),
    "rope": hf.FieldGroup(_read_ropes, _write_ropes),
}
from_published, to_published = hf.translators(Config, MODEL_TYPES, FIELDS)


def _required_scale(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scale of attention. llama.cpp recognises the 27B model by its 62 layers; only this model has a scale
    other than head_dim^-0.5."""
    return {"attention_scale": (values["dim"] / values["n_heads"]) ** -0.5 if values["n_layers"] == 62 else None}


GGUF = {
    "gemma3": gguf.GgufArchitecture(
        names=gguf.unit_offset(gguf.LLAMA | gguf.QK_NORM | gguf.POST_NORMS), fields=gguf.WINDOW_FIELDS,
        fixed={
            "activation": "gelu_tanh", "local_rope_theta": 10_000.0, "local_rope_scaling": None, "global_layers": None,
            "attention_bias": False, "dropout": 0.0,
        },
        windows=True, derive=_required_scale,
    ),
}  # fmt: skip

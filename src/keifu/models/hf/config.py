"""Rotary settings and activation names as Hugging Face's config.json writes them; knows no model's layers."""

from typing import Any

from keifu.errors import UserError
from keifu.layers.activations import ACTIVATIONS
from keifu.layers.attention.positions import RopeScaling

# theirs -> ours, where the names differ
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
    "linear": "identity",
}

# ours -> theirs, for what a scaling may say beside its kind and factor
_FIELDS = {
    "original_context_length": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "truncate": "truncate",
}
_WRITTEN = {
    "linear": (),
    "dynamic": (),
    "llama3": ("original_context_length", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "original_context_length", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
    ),
}  # fmt: skip


def activation_name(published: str) -> str:
    """Our name of an activation that transformers calls `published`; an unknown one is a `ValueError`."""
    name = _ACTIVATIONS.get(published, published)
    if name not in ACTIVATIONS:
        raise UserError(f"The activation {published!r} is not supported. Known: {', '.join(sorted(ACTIVATIONS))}.")
    return name


def published_activation(name: str) -> str:
    """The name that transformers has for one of our activations."""
    return {"gelu_tanh": "gelu_new", "identity": "linear"}.get(name, name)


def read_rope(json: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """The base and the scaling. `rope_parameters` (transformers 5) goes before `rope_scaling` with `rope_theta`."""
    rope = json.get("rope_parameters") or json.get("rope_scaling") or {}
    theta = rope.get("rope_theta", json.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", json.get("partial_rotary_factor", 1.0)) not in (None, 1.0):
        raise UserError(
            f"partial_rotary_factor {rope.get('partial_rotary_factor')} is not supported: a whole head turns."
        )
    if kind == "default":
        return float(theta), None
    context = json["max_position_embeddings"]
    given = {ours: _number(ours, rope[theirs]) for ours, theirs in _FIELDS.items() if rope.get(theirs) is not None}
    original = json.get("original_max_position_embeddings", context)
    given = {"original_context_length": original} | given
    if kind == "dynamic":  # published code stretches from the configured length, whatever else is written
        given["original_context_length"] = context
    factor = rope["factor"] if rope.get("factor") is not None else context / given["original_context_length"]
    return float(theta), RopeScaling(kind, float(factor), **given)


def _number(name: str, value: Any) -> Any:
    return value if name in ("original_context_length", "truncate") else float(value)


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Both spellings, so that transformers 4 and 5, vLLM and llama.cpp's converter read the same."""
    if scaling is None:
        new = {"rope_type": "default"}
    else:
        fields = {_FIELDS[ours]: value for ours, value in vars(scaling).items() if ours in _WRITTEN[scaling.kind]}
        new = {"rope_type": scaling.kind, "factor": scaling.factor}
        new |= {theirs: value for theirs, value in fields.items() if value is not None}
    return {
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else new,
        "rope_parameters": new | {"rope_theta": theta},
    }


def read_window(json: dict[str, Any]) -> tuple[int | None, int]:
    """The window and the first layer that has it. Qwen2 and 3 say both in several ways; Mistral means all layers."""
    if not json.get("use_sliding_window", json["model_type"] == "mistral"):
        return None, 0
    kinds, default = json.get("layer_types"), 0 if json["model_type"] == "mistral" else 28
    first = json.get("max_window_layers", default)
    if kinds:
        first = kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)
        if kinds != ["full_attention"] * first + ["sliding_attention"] * (len(kinds) - first):
            raise ValueError(
                f"layer_types {kinds} mixes windows in an order that is not supported: full ones come first."
            )
    window = json.get("sliding_window", 4096)
    return (window, first) if window and first < json["num_hidden_layers"] else (None, 0)


def write_window(window: int | None, first_layer: int) -> dict[str, Any]:
    """What `read_window` reads, as Qwen2 and Qwen3 write it."""
    return {"sliding_window": window, "max_window_layers": first_layer, "use_sliding_window": window is not None}

"""Reading and writing the fields of a published config.json by each model's table; and the settings that many models of
transformers share: activation names, rotary positions, sliding windows."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, TypeVar

from keifu.errors import UserError
from keifu.layers.activations import ACTIVATIONS
from keifu.layers.attention.positions import RopeScaling

Config = TypeVar("Config")
_REQUIRED: Any = object()


def _unchanged(value: Any) -> Any:
    return value


class Field(NamedTuple):
    """One field of a published config. A model's table maps the Config's fields to `Field`s.

    name: the published name. default: the published value if the field is missing, or a function that computes it from
    the config (null then counts as missing); without a default the field is required. read, write: convert the
    published value to the Config's, and back. also: further names under which the value is written. if_none: computes
    from the Config what to write if it has None; without it, nothing is written.
    """

    name: str
    default: Any = _REQUIRED
    read: Callable[[Any], Any] = _unchanged
    write: Callable[[Any], Any] = _unchanged
    also: tuple[str, ...] = ()
    if_none: Callable[[Any], Any] | None = None


class FieldGroup(NamedTuple):
    """Fields that are read and written together, such as those of rotary positions.

    read: returns fields of the Config from a published config. write: returns published fields from the Config.
    """

    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[Any], Mapping[str, Any]]


# by the name of the Config's field, or of the group; a plain string is the published name of a required field
Fields = dict[str, str | Field | FieldGroup]


def translators(
    config_class: type[Config], model_types: Mapping[str, str], fields: Fields
) -> tuple[Callable[[dict[str, Any]], Config], Callable[[Config], dict[str, Any]]]:
    """Return `from_published` and `to_published` of a model whose table describes its whole published config."""

    def from_published(json: dict[str, Any]) -> Config:
        return config_class(**read_fields(json, fields))

    return from_published, partial(write, model_types=model_types, fields=fields)


def read_fields(json: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """Return the values of a Config's fields. Raises KeyError for a missing required field (the loader's error names
    the file), and UserError for a value that cannot be converted."""
    values: dict[str, Any] = {}
    for ours, field in fields.items():
        if isinstance(field, FieldGroup):
            values |= field.read(json)
        else:
            values[ours] = read_field(json, field if isinstance(field, Field) else Field(field))
    return values


def read_field(json: Mapping[str, Any], field: Field) -> Any:
    """Return the Config's value of one field."""
    name, default = field.name, field.default
    value = json[name] if default is _REQUIRED else json.get(name, None if callable(default) else default)
    if value is None and callable(default):
        value = default(json)
    try:
        return field.read(value)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} cannot be {value!r}.") from error


def write_fields(config: Any, fields: Fields) -> dict[str, Any]:
    """Return the published fields of a Config. None, which leaves a value to the model, is not written."""
    published_fields: dict[str, Any] = {}
    for ours, field in fields.items():
        if isinstance(field, FieldGroup):
            published_fields |= field.write(config)
        else:
            published_fields |= _write_field(config, ours, field if isinstance(field, Field) else Field(field))
    return published_fields


def _write_field(config: Any, ours: str, field: Field) -> dict[str, Any]:
    if (value := vars(config)[ours]) is not None:
        value = field.write(value)
    elif field.if_none is not None:
        value = field.if_none(config)
    else:
        return {}
    return dict.fromkeys((field.name, *field.also), value)


def write(config: Any, model_types: Mapping[str, str], fields: Fields) -> dict[str, Any]:
    """Return the config.json of a Config, with the first of these model_types and its architecture. diffusers' configs,
    in which both are the name of a class, have no architectures."""
    name, architecture = next(iter(model_types.items()))
    architectures = {} if architecture == name else {"architectures": [architecture]}
    return {"model_type": name, **architectures, **write_fields(config, fields)}


def write_native(model_type: str, config: Any) -> dict[str, Any]:
    """Return keifu's form of config.json, for a Config that no published format can represent: every field with its own
    name."""
    return {"model_type": model_type, "architectures": ["keifu"], **asdict(config)}


def activation_field(name: str, default: str) -> Field:
    """Return the field of an activation, whose names differ from keifu's. GELU by tanh has several names: that of the
    default is written."""
    published = {"gelu_tanh": default if activation_name(default) == "gelu_tanh" else "gelu_new", "identity": "linear"}
    return Field(name, default, activation_name, lambda ours: published.get(ours, ours))


def choice(name: str, config_values: Mapping[Any, Any]) -> Field:
    """Return a field with few implemented values. config_values: published value → the Config's value; the first is the
    default."""

    def read(value: Any) -> Any:
        if value not in config_values:
            raise UserError(
                f"its {name} is {value!r}, and what is implemented is {', '.join(map(repr, config_values))}."
            )
        return config_values[value]

    def write(value: Any) -> Any:
        return next((theirs for theirs, ours in config_values.items() if ours == value), next(iter(config_values)))

    return Field(name, next(iter(config_values)), read, write)


def constants(**values: Any) -> FieldGroup:
    """Return the group of fields that are written with the only value that is implemented, and not read."""
    return FieldGroup(lambda json: {}, lambda config: values)


def null(config: Any) -> None:
    """Write null for a field that the Config has as None: without it, a reader would take another default."""


def rate(value: float | None) -> float:
    """Convert a dropout rate; null is 0."""
    return float(value or 0.0)


SIZE_FIELDS: Fields = {  # in most configs of transformers since BERT
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
}

MOST_LAYERS = 10_000  # the most layers of a plausible config


def check_layers(json: Mapping[str, Any], name: str) -> int:
    """Return the number of layers, checked before lists of that length are made."""
    if (layers := json[name]) > MOST_LAYERS:
        raise UserError(f"{name} is {layers:,}, and at most {MOST_LAYERS:,} are read.")
    return layers


# theirs → ours, if the names differ
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "swish": "silu",
    "linear": "identity",
}

_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
# ours → theirs, for the fields of a scaling other than its kind and factor
_FIELDS = {
    "original_context_length": "original_max_position_embeddings",
    "short_divisors": "short_factor",
    "long_divisors": "long_factor",
    **{name: name for name in ("low_freq_factor", "high_freq_factor", *_YARN)},
}
_WRITTEN = {  # fields to write, by kind
    "llama3": ("original_context_length", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_context_length", *_YARN),
    "longrope": ("original_context_length", "attention_factor", "short_divisors", "long_divisors"),
}


def activation_name(published: str) -> str:
    """Return keifu's name for transformers' activation `published`. Raises UserError for an unknown one."""
    name = _ACTIVATIONS.get(published, published)
    if name not in ACTIVATIONS:
        raise UserError(f"The activation {published!r} is not supported. Known: {', '.join(sorted(ACTIVATIONS))}.")
    return name


def read_rope(json: Mapping[str, Any], default_theta: float = 10_000.0, partial: bool = False) -> dict[str, Any]:
    """Read `rope_theta` and `rope_scaling` of the Config, from `rope_parameters` (transformers 5) or from
    `rope_scaling` and `rope_theta`.

    partial: whether the model supports rotating a part of each head. Raises UserError if
    `rope_parameters` and `rope_scaling` name different scalings.
    """
    both = [scaling for name in ("rope_parameters", "rope_scaling") if (scaling := json.get(name))]
    if len({(rope.get("rope_type", rope.get("type")), rope.get("factor")) for rope in both}) > 1:
        raise UserError("rope_parameters and rope_scaling in config.json name two scalings: leave out one of them.")
    rope = both[0] if both else {}
    theta = float(rope.get("rope_theta", json.get("rope_theta", default_theta)))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if (part := read_part(json)) != 1.0 and not partial:
        raise UserError(f"partial_rotary_factor {part} is not supported: a whole head turns.")
    if rope_type in ("su", "yarn") and "short_factor" in rope:  # Phi-3's first names of longrope
        rope_type = "longrope"
    if rope_type == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    context = json["max_position_embeddings"]
    fields = {ours: _number(ours, rope[theirs]) for ours, theirs in _FIELDS.items() if rope.get(theirs) is not None}
    fields = {"original_context_length": json.get("original_max_position_embeddings", context)} | fields
    if rope_type == "dynamic":  # published code scales from the configured length and ignores other fields
        fields["original_context_length"] = context
    factor = rope["factor"] if rope.get("factor") is not None else context / fields["original_context_length"]
    return {"rope_theta": theta, "rope_scaling": RopeScaling(rope_type, float(factor), **fields)}


def read_part(json: Mapping[str, Any], default: float = 1.0) -> float:
    """Return the part of each head that is rotated."""
    rope = json.get("rope_parameters") or json.get("rope_scaling") or {}
    part = rope.get("partial_rotary_factor", json.get("partial_rotary_factor"))
    return default if part is None else float(part)


def write_part(rope: dict[str, Any], part: float) -> dict[str, Any]:
    """Return the fields of `write_rope`, and the part of each head that is rotated."""
    partial_factor = {"partial_rotary_factor": part}
    return {**rope, **partial_factor, "rope_parameters": rope["rope_parameters"] | partial_factor}


def _number(name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(float, value))
    return value if name in ("original_context_length", "truncate") else float(value)


def write_rope(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return both forms of the fields, for transformers 4 and 5, vLLM and llama.cpp's converter."""
    if scaling is None:
        new = {"rope_type": "default"}
    else:
        scaling_values = {ours: vars(scaling)[ours] for ours in _WRITTEN.get(scaling.kind, ())}
        new = {"rope_type": scaling.kind, "factor": scaling.factor}
        new |= {_FIELDS[ours]: value for ours, value in scaling_values.items() if value is not None}
    return {
        "rope_theta": theta,
        "rope_scaling": None if scaling is None else new,
        "rope_parameters": new | {"rope_theta": theta},
    }


def rope(default_theta: float = 10_000.0) -> FieldGroup:
    """Return the group of rotary positions that turn whole heads."""
    read_fields_of_rope = partial(read_rope, default_theta=default_theta)
    return FieldGroup(read_fields_of_rope, lambda config: write_rope(config.rope_theta, config.rope_scaling))


MODULES = "modules.json"  # sentence-transformers' list of modules, in the config under this name
SENTENCES = "config_sentence_transformers.json"  # its settings, likewise
_NO_WINDOW = {"sliding_window": None, "first_window_layer": 0}


def read_window(json: Mapping[str, Any]) -> dict[str, Any]:
    """Read `sliding_window` and `first_window_layer` of the Config. Qwen2 and Qwen3 write them in several ways; in
    Mistral every layer has the window."""
    mistral = json["model_type"] == "mistral"
    if not json.get("use_sliding_window", mistral):
        return _NO_WINDOW
    kinds = json.get("layer_types")
    first = json.get("max_window_layers", 0 if mistral else 28)
    if kinds:
        first = kinds.index("sliding_attention") if "sliding_attention" in kinds else len(kinds)
        if kinds != ["full_attention"] * first + ["sliding_attention"] * (len(kinds) - first):
            raise ValueError(f"layer_types {kinds} mixes windows in an unsupported order: full layers come first.")
    window = json.get("sliding_window", 4096)
    if not window or first >= json["num_hidden_layers"]:
        return _NO_WINDOW
    return {"sliding_window": window, "first_window_layer": first}


def write_window(window: int | None, first_layer: int) -> dict[str, Any]:
    """Return the fields of a sliding window as Qwen2 and Qwen3 write them."""
    return {"sliding_window": window, "max_window_layers": first_layer, "use_sliding_window": window is not None}


WINDOW = FieldGroup(read_window, lambda config: write_window(config.sliding_window, config.first_window_layer))


def read_layer_types(json: Mapping[str, Any], other: str = "sliding_attention") -> list[str] | None:
    """Return `layer_types`, if there are any. Raises UserError for another type than full_attention and `other`, and
    for another number than that of the layers."""
    types, n_layers = json.get("layer_types"), json["num_hidden_layers"]
    if types and (len(types) != n_layers or {*types} - {"full_attention", other}):
        kinds = ", ".join(sorted({*map(str, types)}))
        raise UserError(
            f"its layer_types must be full_attention or {other} for each of {n_layers} layers, not {len(types)} of "
            f"{kinds[:200]}."
        )
    return types or None


def read_global_layers(json: Mapping[str, Any], every: int, other: str = "sliding_attention") -> tuple[int, ...] | None:
    """Return the layers with full attention, from `layer_types` or the older `sliding_window_pattern`.

    None means the model's default: the last of each `every` layers. other: the published type of the other layers.
    """
    n_layers, pattern = check_layers(json, "num_hidden_layers"), json.get("sliding_window_pattern", every)
    layers = tuple(range(pattern - 1, n_layers, pattern))
    if types := read_layer_types(json, other):
        layers = tuple(layer for layer, name in enumerate(types) if name == "full_attention")
    return None if layers == tuple(range(every - 1, n_layers, every)) else layers


def layer_types(n_layers: int, full: Collection[int], other: str = "sliding_attention") -> list[str]:
    """Return the published `layer_types`. full: the layers with full attention."""
    return ["full_attention" if layer in full else other for layer in range(n_layers)]


def partial_rope(head_dim: int, share: float) -> FieldGroup:
    """Return the fields of rotary positions that turn the first `rope_dim` numbers of a head. head_dim, share: the
    published defaults of the head's size and of the turned share."""

    def read(json: Mapping[str, Any]) -> dict[str, Any]:
        rope_dim = int(json.get("head_dim", head_dim) * read_part(json, share))
        return {**read_rope(json, partial=True), "rope_dim": rope_dim}

    def write(config: Any) -> dict[str, Any]:
        return write_part(write_rope(config.rope_theta, config.rope_scaling), config.rope_dim / config.head_dim)

    return FieldGroup(read, write)

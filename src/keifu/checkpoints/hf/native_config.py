"""keifu's config.json: a Config as plain JSON, field by field, for models without a published format.

Its model_type is keifu_ and the model's name; the fields have the Config's names. `check_types` validates the values of
any Config.
"""

from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from keifu.errors import UserError
from keifu.ranges import LARGEST

ZERO_ALLOWED = (
    "first_window_layer", "n_dense_layers", "n_shared_layers", "layer_dim", "start_id", "end_id", "pad_id",
    "steps_offset", "n_classes", "n_predictions",
)  # fmt: skip


def from_json(config_class: type, json: dict[str, Any]) -> Any:
    """Build a Config of this class from JSON. Every field must be present. Other entries are ignored."""
    hints = get_type_hints(config_class)
    return config_class(**{field.name: _value(hints[field.name], json[field.name]) for field in fields(config_class)})


def _value(hint: Any, value: Any) -> Any:
    """Convert a value from JSON to its field's type: a tuple or a dataclass."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, dict):
        inner = [member for member in kinds if isinstance(member, type) and is_dataclass(member)]
        fitting = [member for member in inner if {field.name for field in fields(member)} == value.keys()] or inner
        return from_json(fitting[0], value) if inner else value
    return tuple(value) if isinstance(value, list) and any(get_origin(member) is tuple for member in kinds) else value


def check_types(config: Any, where: str) -> None:
    """Raise UserError if a value of a Config does not have its field's type, or is a size below one."""
    check_kinds(config, where)
    for name, value in vars(config).items():
        if is_dataclass(value):
            check_types(value, where)
        elif type(value) is int and value < (0 if name in ZERO_ALLOWED else 1):
            raise UserError(f"{where} gives {value} for {name}, which must be at least 1.")
        elif isinstance(value, int | float) and not abs(value) <= LARGEST:  # also true for NaN
            raise UserError(f"{where} gives {value} for {name}, which must be a number of at most {LARGEST:,}.")


def check_kinds(options: Any, where: str) -> None:
    """Raise UserError if a value of a dataclass, at any depth, does not have its field's type."""
    for name, hint in get_type_hints(type(options)).items():
        if name not in vars(options):  # a class attribute, not a field
            continue
        if is_dataclass(value := vars(options)[name]):
            check_kinds(value, where)
        elif not _fits(value, hint):
            kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            names = " or ".join(str(member) if get_args(member) else member.__name__ for member in kinds)
            names = names.replace("NoneType", "null").replace("typing.", "")
            raise UserError(f"{where} gives {value!r:.200} for {name}, which must be {names}.")


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the type of a hint. Other kinds of hints accept everything."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, hint) for hint in inner)
    if origin is Literal:
        return any(type(value) is type(literal) and value == literal for literal in inner)
    if origin is tuple:
        types = inner[:1] * len(value) if isinstance(value, tuple) and inner[1:] == (...,) else inner
        return isinstance(value, tuple) and len(value) == len(types) and all(map(_fits, value, types))
    if hint in (int, bool, str, float, type(None)):
        return type(value) in ((float, int) if hint is float else (hint,))
    return not isinstance(hint, type) or isinstance(value, hint)

"""keifu's own config.json: a Config as plain JSON, field by field, for models without a published format.

The model_type is then keifu_ and the name of the model; every field has the Config's own name. `check_types` validates
the values of any Config.
"""

from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from keifu.errors import UserError
from keifu.ranges import LARGEST

ZERO_ALLOWED = ("first_window_layer", "start_id", "end_id", "pad_id", "steps_offset", "n_classes")


def to_json(config: Any) -> dict[str, Any]:
    """All fields of a Config."""
    return asdict(config)


def from_json(kind: type, json: dict[str, Any]) -> Any:
    """The Config of class `kind`. Every field must be there; what else the file says is not the model's."""
    hints = get_type_hints(kind)
    return kind(**{field.name: _value(hints[field.name], json[field.name]) for field in fields(kind)})


def _value(hint: Any, value: Any) -> Any:
    """JSON has no tuples and no dataclasses: the field's type says where one stood."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, dict):
        inner = [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]
        fitting = [kind for kind in inner if {field.name for field in fields(kind)} == value.keys()] or inner
        return from_json(fitting[0], value) if inner else value
    return tuple(value) if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds) else value


def check_types(config: Any, where: str) -> None:
    """Refuses a Config whose whole numbers, names or switches are something else, or whose sizes are below one."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, allowed = vars(config)[field.name], _plain(hints[field.name])
        if is_dataclass(value):
            check_types(value, where)
            continue
        if allowed and not _fits(value, allowed):
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
            raise UserError(f"{where} gives {value!r} for {field.name}, which must be {names}.")
        if type(value) is int and value < (0 if field.name in ZERO_ALLOWED else 1):
            raise UserError(f"{where} gives {value} for {field.name}, which must be at least 1.")
        if isinstance(value, int | float) and not abs(value) <= LARGEST:  # nor is "not a number" below anything
            raise UserError(f"{where} gives {value} for {field.name}, which must be a number of at most {LARGEST:,}.")


def _plain(hint: Any) -> tuple[type, ...]:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return kinds if all(kind in (int, float, str, bool, type(None)) for kind in kinds) else ()


def _fits(value: Any, allowed: tuple[type, ...]) -> bool:
    return type(value) in allowed or (float in allowed and type(value) is int)

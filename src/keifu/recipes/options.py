"""Options of recipes: common ones, their names on the command line, and conversion to and from JSON."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import tyro

from keifu.ranges import Positive, check_value, range_of


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Options of every recipe: its time limit, and destinations of a run's figures apart from its folder."""

    minutes: Positive | None = None
    """Time limit of the run, with validations, samples and saving. The number of steps follows the pace of the machine,
    and the learning rate schedule with it. Unset: none."""
    tensorboard: bool = False
    """Write TensorBoard events too."""
    wandb: bool = False
    """Log to Weights & Biases too."""

    def logging(self) -> dict[str, Any]:
        """Return these options as settings of the training loop."""
        return {"minutes": self.minutes, "tensorboard": self.tensorboard, "wandb": self.wandb}


def value_or(value: float | int | None, default: float | int) -> float | int:
    """Return the value of an option, or `default` if it is unset."""
    return default if value is None else value


ARGUMENT: Any = type(tyro.conf.arg())  # class of annotations that rename an option; tyro does not export it


def to_json(recipe: Any) -> dict[str, Any]:
    """Return all options, nested like the dataclass. Tuples become lists, and paths become strings."""
    return json.loads(json.dumps(asdict(recipe), default=str))


def from_json(defaults: Any, json: Mapping[str, Any]) -> Any:
    """Return a recipe with options from `to_json`. Missing options are those of `defaults`, a recipe or a class with
    defaults."""
    hints = get_type_hints(defaults if isinstance(defaults, type) else type(defaults))
    field_names = {field.name for field in fields(defaults)} & json.keys()
    values = {name: _value(hints[name], json[name], getattr(defaults, name, None)) for name in field_names}
    return defaults(**values) if isinstance(defaults, type) else replace(defaults, **values)


def _value(hint: Any, value: Any, default: Any) -> Any:
    """Convert a JSON value to the type of its field: a tuple, a path or a dataclass."""
    if isinstance(value, dict) and (nested := default if is_dataclass(default) else _dataclass(hint)):
        return from_json(nested, value)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return Path(value) if isinstance(value, str) and Path in kinds and str not in kinds else _tupled(value)


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def by_option(options_class: type, values: Mapping[str, Any], hints: bool = False) -> dict[str, Any]:
    """Return the values of `to_json` by option name, such as model.n-layers; with hints=True also the types."""
    return {name: (value, hint) if hints else value for name, _, value, hint in _walk(options_class, values, "", ())}


def check_ranges(cls: type, values: Mapping[str, Any]) -> None:
    """Raise `UserError` for the first number outside its range. values: the options as `to_json` returns them."""
    for option, (value, hint) in by_option(cls, values, hints=True).items():
        allowed = range_of(hint)
        number = isinstance(value, (int, float, list)) and not isinstance(value, bool)
        if allowed and number and (option.rpartition(".")[2], value) != ("max-tokens", 0):  # 0: the whole context
            check_value(f"--{option}", value, allowed)


def paths(options_class: type, values: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return for each option name its path in the result of `to_json`."""
    return {name: path for name, path, *_ in _walk(options_class, values, "", ())}


def _walk(
    options_class: type, values: Mapping[str, Any], prefix: str, above: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...], Any, Any]]:
    hints = get_type_hints(options_class, include_extras=True)
    for key, value in values.items():
        name, inner, path = _option(key, hints.get(key), prefix), _dataclass(hints.get(key)), (*above, key)
        if isinstance(value, Mapping) and inner:
            yield from _walk(inner, value, name, path)
        else:
            yield name, path, value, hints.get(key)


def _option(field: str, hint: Any, prefix: str) -> str:
    """Return a field's name on the command line. tyro omits a field that is annotated with an empty name."""
    notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    option_names = [note.name for note in notes if isinstance(note, ARGUMENT)]
    word = option_names[0] if option_names and option_names[0] is not None else field.replace("_", "-")
    return ".".join(part for part in (prefix, word) if part)


def _dataclass(hint: Any) -> type | None:
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    kinds = get_args(bare) if get_origin(bare) in (Union, UnionType) else (bare,)
    return next((member for member in kinds if isinstance(member, type) and is_dataclass(member)), None)


def put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set an option in the result of `to_json`."""
    for key in path[:-1]:
        values = values[key]
    values[path[-1]] = value

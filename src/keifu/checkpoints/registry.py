"""Registry of model families: the form of each model_type's config.json and the names of its weights.

A model's file is imported only when one of its model_types is requested. Everything about a model is declared in its
own file (`keifu/models/registration`), and the index of names is written by `python -m keifu.models.sizes`.
"""

from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from keifu.checkpoints.hf.native_config import check_types, from_json
from keifu.checkpoints.hf.weight_names import Table
from keifu.errors import UserError
from keifu.layers.meta import on_meta
from keifu.models.hf.config import write_native
from keifu.models.registration import read_index

# Settings of any published config that are not implemented, with their neutral value.
UNSUPPORTED: Mapping[str, Any] = {"quantization_config": None}

Aliases = Callable[[Any], Mapping[str, tuple[str, ...]]]


def _tie(config: Any, tied: bool) -> Any:
    return replace(config, tied=tied)


@dataclass(frozen=True)
class Family:
    """One model_type: its form of config.json and its weight names.

    - config_class, build: the class of its Config, and the function that builds a model from one.
    - read, write: convert a config.json to a Config and back.
    - names: the table of weight names.
    - prefix: prefix of published names, which files of the model without its head omit; files of the architectures
      `without_prefix` always do. Without "model." in the table, the default changes nothing.
    - old_endings, old_beginnings: today's ending (beginning) of a published name → the one in old files.
    - not_weights: patterns of tensors that are not weights, with fields of the Config in braces.
    - predictions: patterns of the tensors that predict further tokens. They are left out unless a load reads them.
    - copies: a tensor → the tensor of the file that it repeats.
    - full_precision: patterns of tensors that keep the file's dtype if it is wider than the others'.
    - in_file: fields of the Config that are True if the file has a tensor, whatever its config says.
    - unsupported: settings, each with the only value that is implemented.
    - aliases: returns, for a Config, the other names in files of a matrix that is used in several places.
    - inside: prefix of the decoder that `tied` refers to.
    - tie: returns a Config with its head tied to the embedding, or not.
    - writes_text: whether the model reads or writes text, so that a tokenizer belongs to it.
    - files: names of the config and of the weights in a directory.
    """

    config_class: Any
    build: Callable[[Any], Any]
    model_type: str
    read: Callable[[dict[str, Any]], Any]
    write: Callable[[Any], dict[str, Any]]
    names: Table
    prefix: str = "model."
    not_weights: tuple[str, ...] = ()
    predictions: tuple[str, ...] = ()
    unsupported: Mapping[str, Any] = field(default_factory=dict)
    writes_text: bool = True
    aliases: Aliases | None = None
    in_file: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    old_endings: Mapping[str, str] = field(default_factory=dict)
    old_beginnings: Mapping[str, str] = field(default_factory=dict)
    without_prefix: tuple[str, ...] = ()
    full_precision: tuple[str, ...] = ()
    inside: str = ""
    files: tuple[str, str] = ("config.json", "model.safetensors")
    tie: Callable[[Any, bool], Any] = _tie

    def table(self, json: Mapping[str, Any]) -> Table:
        """Return the table of weight names for files with this config.json."""
        if self.names is None or not {*json.get("architectures", ())} & {*self.without_prefix}:
            return self.names
        return {ours: theirs.removeprefix(self.prefix) for ours, theirs in self.names.items()}


INDEX = read_index()
# file under keifu.models → the model_types of its configs, keifu's last
MODELS = {name: names.model_types for name, names in INDEX.items()}


@cache
def families_of(name: str) -> dict[str, Family]:
    """Import a model's file, and return its families by their model_types.

    There is one family for each published form, and one for keifu's form, in which every field of the Config keeps its
    name.
    """
    module: Any = import_module(f"keifu.models.{name}")
    offered, generic = vars(module), MODELS[name][-1]
    shared: dict[str, Any] = {
        "config_class": module.Config,
        "build": module.build,
        "names": offered.get("WEIGHT_NAMES"),
    }
    shared |= {part.name: offered[part.name.upper()] for part in fields(Family) if part.name.upper() in offered}
    shared |= {part: offered[part] for part in ("aliases", "tie") if part in offered}
    files = shared.pop("files", Family.files)  # of the published forms; keifu's form has the default ones
    families = {
        name: Family(model_type=name, read=module.from_published, write=module.to_published, files=files, **shared)
        for name in offered.get("MODEL_TYPES", ())
    }
    read, write = partial(from_json, module.Config), partial(write_native, generic)
    families.setdefault(generic, Family(model_type=generic, read=read, write=write, **shared))
    return _with_open_clip(**families) if name == "clip.clip" else families


def _with_open_clip(clip: Family, keifu_clip: Family) -> dict[str, Family]:
    """Return CLIP's families, including open_clip's, whose names cover a ResNet too."""
    from keifu.models.hf import open_clip

    published = replace(
        clip, model_type="open_clip", names=open_clip.WEIGHT_NAMES, not_weights=open_clip.NOT_WEIGHTS,
        read=open_clip.from_open_clip, write=open_clip.to_open_clip, files=open_clip.FILES,
    )  # fmt: skip
    return {"clip": clip, "open_clip": published, "keifu_clip": replace(keifu_clip, names=open_clip.WEIGHT_NAMES)}


class _Families(UserDict[str, Any]):
    """Every family by its model_type. Listing the keys imports no model; a lookup imports the model's file."""

    def __getitem__(self, model_type: str) -> Family:
        return families_of(self.data[model_type])[model_type]


FAMILY_FILES = {model_type: name for name, kinds in MODELS.items() for model_type in kinds}
FAMILIES: Mapping[str, Family] = _Families(FAMILY_FILES)


class _Published(dict[str, Any]):
    """A config.json that raises UserError with the name of a missing field."""

    def __init__(self, content: Mapping[str, Any], where: str):
        super().__init__(content)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.where} has no field {key!r}, which a {self['model_type']!r} model needs.")


def read_config(json: Mapping[str, Any], where: str) -> tuple[Family, Any]:
    """Return the family and the Config that a config.json describes. where: name of the file, for errors.

    Raises UserError for an unknown model_type, a setting that is not implemented, and a field that is missing or
    invalid.
    """
    model_type = json.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{where} has no model_type, so nothing says which model it is.")
    if model_type not in FAMILIES:  # no suggestion: the nearest name would be another architecture
        known_types = ", ".join(sorted(name for name in FAMILIES if not name.startswith("keifu_")))
        raise UserError(
            f"{where} has the model_type {model_type!r}, which keifu does not implement. It has: {known_types}."
        )
    family = FAMILIES[model_type]
    check_settings(json, {**UNSUPPORTED, **family.unsupported}, where)
    try:
        config = family.read(_Published(json, where))
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        if isinstance(error, UserError) and str(error).startswith(where):
            raise
        raise UserError(f"{where} cannot be read as a {model_type!r} model: {error}") from error
    check_types(config, where)
    _check_head_dim(json, config, where)
    return family, config


def _check_head_dim(json: Mapping[str, Any], config: Any, where: str) -> None:
    """Raise UserError for heads of another size than the model has. transformers takes head_dim from the config of
    models that do not list it, too."""
    head_dim, dim, n_heads = (json.get(name, 0) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if "head_dim" in vars(config) or not all(isinstance(size, int) and size > 0 for size in (head_dim, dim, n_heads)):
        return
    if head_dim != dim // n_heads:
        raise UserError(
            f"{where} sets head_dim to {head_dim}, which keifu does not implement for this model; only "
            f"{dim // n_heads}, hidden_size / num_attention_heads, is."
        )


def check_settings(json: Mapping[str, Any], implemented: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a setting whose value is not the implemented one. A missing setting is accepted."""
    for name, only in implemented.items():
        if json.get(name) is not None and json[name] != only:
            raise UserError(f"{where} sets {name} to {json[name]!r}, which keifu does not implement; only {only!r} is.")


def describe(config: Any) -> tuple[Family, dict[str, Any]]:
    """Return the family of a built model's Config and its config.json.

    The model_type is a published one if it can represent the whole Config, otherwise keifu's.
    """
    name = model_name(config)
    families = families_of(name).values() if name in MODELS else ()
    able = [family for family in families if isinstance(config, family.config_class)]
    if not able:
        class_name = f"{type(config).__module__}.{type(config).__name__}"
        raise UserError(f"{class_name} is the Config of no model that can be saved.")
    for family in able:
        json = family.write(config)
        published = FAMILIES[json["model_type"]]
        if family.names is not None and _same(config, published.read(json)):
            return published, json
    family = FAMILIES[MODELS[name][-1]]
    return family, family.write(config)


def describe_as(config: Any, model_type: str) -> tuple[Family, dict[str, Any]]:
    """Return the family `model_type` and its config.json for a built model's Config. Raises UserError if this form
    cannot represent it."""
    family = FAMILIES[model_type]
    if not isinstance(config, family.config_class):
        raise UserError(f"The format {model_type} has no {model_name(config)}: use hf.")
    json = family.write(config)
    if not _same(config, family.read(json)):
        raise UserError(f"The format {model_type} has no words for something in this model's config: use hf.")
    return family, json


def model_file(model_type: str) -> ModuleType:
    """Import the file of a model_type."""
    return import_module(f"keifu.models.{FAMILY_FILES[model_type]}")


def model_name(config: Any) -> str:
    """Return the name of a Config's model in `MODELS`."""
    return type(config).__module__.removeprefix("keifu.models.")


def _same(config: Any, back: Any) -> bool:
    """Return whether two Configs are equal, including nested ones. None in `config` equals any value in `back`. A field
    that `back` lacks has its default."""
    values = {name: vars(back).get(name, getattr(type(config), name, None)) for name in vars(config)}
    return all(
        value is None or value == values[name] or (is_dataclass(value) and _same(value, values[name]))
        for name, value in vars(config).items()
    )


def build(family: Family, config: Any, where: str) -> nn.Module:
    """Build the model on the meta device, without memory. Raises UserError for sizes that do not fit together."""
    try:
        with on_meta():
            return family.build(config)
    # torch's errors, e.g. for a size beyond 64 bits
    except (ValueError, RuntimeError, LookupError, ArithmeticError) as error:
        raise UserError(f"{where} describes a model that cannot be built: {error}") from error
